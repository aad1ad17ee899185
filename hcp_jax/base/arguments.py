"""Values of the command line: types for argparse, which check at the door.

Each function takes the text of one option and returns its value, or raises ArgumentTypeError with
what came and what is needed. No jax, no NumPy: `hcp COMMAND --help` imports this.
"""

import argparse
import errno
import math
import os
import pathlib
import re
import tempfile
from collections.abc import Callable

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}
MOST_TOKENS = 2**31 - 1
"""The longest stream: positions in it are int32."""


def length(text: str) -> int:
    """Return a number of tokens: `131072`, `128K` (times 1024) or `1M` (times 1024²).

    >>> length("128K"), length("1M"), length("0.5m"), length("131_072")
    (131072, 1048576, 524288, 131072)
    """
    tokens = parse_length(text)
    if tokens is None or tokens < 1:
        raise argparse.ArgumentTypeError(
            f"must be a number of tokens, such as 131072, 128K or 1M, got {text!r}"
        )
    if tokens > MOST_TOKENS:
        raise argparse.ArgumentTypeError(
            f"must be at most {MOST_TOKENS:,} tokens (positions are int32), got {text!r}"
        )
    return tokens


def parse_length(text: str) -> int | None:
    """Return the whole number that a text says, with K, M and G for 1024, 1024² and 1024³.

    None if it says no whole number.
    """
    found = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?)\s*([kmg]?)", text.strip().lower())
    if found is None:
        return None
    number, unit = found[1].replace("_", ""), _UNITS[found[2]]
    if "." not in number:
        return int(number) * unit
    value = float(number) * unit
    return int(value) if value.is_integer() else None


def whole(least: int = 1, most: int = 2**31 - 1) -> Callable[[str], int]:
    """Return a type for whole numbers from `least` to `most`."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            bounds = f"at least {least}" if value is None or value < least else f"at most {most:,}"
            raise argparse.ArgumentTypeError(f"must be a whole number, {bounds}, got {text!r}")
        return value

    return convert


def positive(text: str) -> float:
    """Return a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, got {text!r}")
    return value


def filled(text: str) -> str:
    """Return a text that is not empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; give a value, or leave the option out")
    return text


def there(text: str) -> pathlib.Path:
    """Return the path of a folder that exists."""
    path = pathlib.Path(filled(text))
    if not _exists(path):
        raise argparse.ArgumentTypeError(f"{text}: there is no such folder")
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"needs a folder, and {text} is a file")
    return path


def file(text: str) -> pathlib.Path:
    """Return the path of a file that exists."""
    path = pathlib.Path(filled(text))
    if not _exists(path):
        raise argparse.ArgumentTypeError(f"{text}: there is no such file")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"needs a file, and {text} is a folder")
    return path


def folder(text: str) -> pathlib.Path:
    """Return the path of a folder that is there, or can be made."""
    path = pathlib.Path(filled(text))
    _require_writable(path, "a folder")
    if _exists(path) and not path.is_dir():
        raise argparse.ArgumentTypeError(f"needs a folder, and {text} is a file")
    return path


def output(*suffixes: str, screen: bool = False) -> Callable[[str], str]:
    """Return a type for files to write: refused before the work that fills them.

    Args:
        *suffixes: what the name may end in, such as ".png"; anything if none is given.
        screen: accept `-`, which stands for the screen.
    """

    def convert(text: str) -> str:
        if screen and text == "-":
            return text
        path = pathlib.Path(filled(text))
        if _exists(path) and path.is_dir():
            raise argparse.ArgumentTypeError(f"needs a file, and {text} is a folder")
        if suffixes and path.suffix.lower() not in suffixes:
            raise argparse.ArgumentTypeError(
                f"{text}: give a name that ends in {', '.join(suffixes)}"
            )
        if not _exists(path.parent):
            raise argparse.ArgumentTypeError(f"{text}: there is no folder {path.parent}")
        _require_writable(path, "a file")
        return text

    return convert


def _exists(path: pathlib.Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:  # a name that is too long, or has a NUL in it
        reason = error.strerror if isinstance(error, OSError) else error
        raise argparse.ArgumentTypeError(f"{str(path)[:200]!r}: {reason}") from None
    return True


def _require_writable(path: pathlib.Path, what: str) -> None:
    """Refuse a path where `what` cannot be written, as far as the file system says beforehand."""
    there = path
    while not _exists(there) and there != there.parent:
        there = there.parent
    if not there.is_dir() and there != path:
        raise argparse.ArgumentTypeError(f"{path}: {there} is not a folder")
    try:
        if there.is_dir():
            # To ask for permissions is not enough: /proc, or a full disk, would grant them.
            tempfile.TemporaryFile(dir=there).close()
        elif not os.access(there, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"{path}: {what} cannot be written there ({error.strerror})"
        ) from None
