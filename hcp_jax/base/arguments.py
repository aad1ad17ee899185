"""Parse values of the command line: argparse types that check each value before any work starts.

Each function takes the text of one option and returns its value, or raises ArgumentTypeError with
what came and what is needed. It imports neither jax nor NumPy, because `hcp COMMAND --help`
imports it.
"""

import argparse
import errno
import math
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Sequence

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}
MOST_TOKENS = 2**31 - 1
"""Longest stream; token positions are int32."""


def completed(action: argparse.Action, words: Sequence[str]) -> None:
    """Let a shell complete the value of an argument to one of `words`; other values stay allowed.

    `argcomplete`, which `hcp` uses if it is installed, looks for this attribute.
    """
    action.completer = lambda **_: words  # type: ignore[attr-defined]


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
    """Return the whole number in a text such as "128K"; K, M and G mean 1024, 1024² and 1024³.

    Return None if the text is not a whole number.
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
    """Return an argparse type for whole numbers from `least` to `most`."""

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
    """Return the text as a finite number greater than 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, got {text!r}")
    return value


def non_empty(text: str) -> str:
    """Return the text unchanged; refuse it if it is empty or blank."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; give a value, or leave the option out")
    return text


def existing_folder(text: str) -> pathlib.Path:
    """Return the text as the path of a folder that exists."""
    path = pathlib.Path(non_empty(text))
    if not _exists(path):
        raise argparse.ArgumentTypeError(f"{text}: there is no such folder")
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"needs a folder, and {text} is a file")
    return path


def existing_file(text: str) -> pathlib.Path:
    """Return the text as the path of a file that exists."""
    path = pathlib.Path(non_empty(text))
    if not _exists(path):
        raise argparse.ArgumentTypeError(f"{text}: there is no such file")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"needs a file, and {text} is a folder")
    return path


def writable_folder(text: str) -> pathlib.Path:
    """Return the text as the path of a folder that exists and is writable, or can be created."""
    path = pathlib.Path(non_empty(text))
    _require_writable(path, "a folder")
    if _exists(path) and not path.is_dir():
        raise argparse.ArgumentTypeError(f"needs a folder, and {text} is a file")
    return path


def output(*suffixes: str, screen: bool = False) -> Callable[[str], str]:
    """Return an argparse type for a file to write; it checks now that the file can be written.

    Args:
        *suffixes: allowed file name suffixes, such as ".png"; any suffix if none is given.
        screen: also accept `-`, which means standard output.
    """

    def convert(text: str) -> str:
        if screen and text == "-":
            return text
        path = pathlib.Path(non_empty(text))
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
    except (OSError, ValueError) as error:  # the name is too long or contains a NUL
        reason = error.strerror if isinstance(error, OSError) else error
        raise argparse.ArgumentTypeError(f"{str(path)[:200]!r}: {reason}") from None
    return True


def _require_writable(path: pathlib.Path, what: str) -> None:
    """Raise ArgumentTypeError if `what` cannot be written at `path`.

    The check creates and deletes a temporary file in the nearest existing folder.
    """
    existing = path
    while not _exists(existing) and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir() and existing != path:
        raise argparse.ArgumentTypeError(f"{path}: {existing} is not a folder")
    try:
        if existing.is_dir():
            # Permission bits are not enough: they also look fine in /proc and on a full disk.
            tempfile.TemporaryFile(dir=existing).close()
        elif not os.access(existing, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"{path}: {what} cannot be written there ({error.strerror})"
        ) from None
