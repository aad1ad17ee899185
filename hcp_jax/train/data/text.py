"""Find the text files of a folder and read their documents; report what was left out, and why.

Both training and `hcp tokenize` read text through this module, so that they read the same.
"""

import collections
import fnmatch
import os
import pathlib
import stat
import sys
import sysconfig
from collections.abc import Iterator, Sequence

from hcp_jax.base.terminal import printable as shown
from hcp_jax.train.data import formats
from hcp_jax.train.data.formats import Piece
from hcp_jax.train.sections import SKIPPED, BadLines

_STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_NAMES_SHOWN = 5


class Texts:
    """The documents of a file or a folder, read when they are asked for.

    Args:
        path: a file, or a folder of files; its subfolders are searched, too, hidden files are left
            out. None: the source files of the running Python's standard library, which every
            machine has.
        field: the field, or the column, that holds the text of a record.
        bad_lines: "refuse" a line or record that cannot be read, or "skip" and count it.
        skip: patterns, in lower case, of the names of files in a folder that are left out.

    Raises:
        ValueError: if the path does not exist or something in it is neither file nor folder.
    """

    def __init__(
        self,
        path: pathlib.Path | None,
        field: str = "text",
        bad_lines: BadLines = "refuse",
        skip: Sequence[str] = SKIPPED,
    ):
        self.path, self._field, self._bad_lines = path, field, bad_lines
        self._left_out: dict[str, list[str]] = collections.defaultdict(list)
        self._bad, self._first_bad = 0, ""
        self._files: collections.Counter[str] = collections.Counter()
        self._documents: collections.Counter[str] = collections.Counter()
        if path is None:
            found = _walk(self.root, self._left_out, leave_out=_STDLIB_LEFT_OUT)
            self.files = [file for file in found if file.suffix == ".py"]
            # Other files of the standard library do not belong to this text: do not report them.
            self._left_out.clear()
        elif path.is_dir():
            self.files = list(self._choose(_walk(path, self._left_out), skip))
        else:
            if not path.exists():
                raise ValueError(
                    f"data.path: {shown(path)} does not exist; give a .txt or .jsonl file, or a "
                    "folder of text files."
                )
            _require_file(path)
            self.files = [path]

    @property
    def root(self) -> pathlib.Path:
        """The folder that the files are below."""
        if self.path is None:
            return pathlib.Path(sysconfig.get_paths()["stdlib"])
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def source(self) -> str:
        """A description of where the documents come from."""
        if self.path is not None:
            return shown(self.path)
        return f"Python {sys.version_info.major}.{sys.version_info.minor}'s standard library"

    def pieces(self) -> Iterator[Piece]:
        """Yield all documents that are not empty, file by file, in pieces.

        Raises:
            ValueError: if there is none, or if a file is not text or a record has no text in the
                field; names the file and the line.
        """
        seen = False
        for file in self.files:
            for piece in self._read(file):
                seen = True
                yield piece
        if not seen:
            # The user may have meant a file that was left out.
            why = "".join(f" ({line})" for line in self.report()[1:])
            empty = self.files == [self.path] and set(self._left_out) <= {"empty"}
            what = "is empty" if empty else "holds no text files"
            raise ValueError(
                f"data.path: {self.source} {what}; training needs at least one document.{why}"
            )

    def documents(self) -> Iterator[bytes]:
        """Yield all documents that are not empty, each whole; see `pieces`."""
        begun: list[bytes] = []
        for text, ends in self.pieces():
            begun.append(text)
            if ends:
                yield b"".join(begun)
                begun = []

    def report(self) -> list[str]:
        """Return lines that say what was read, and what was left out and why.

        They are complete after all documents have been read.
        """
        read = (
            f"{_counted(count, 'file')} of {kind} ({_counted(self._documents[kind], 'document')})"
            for kind, count in sorted(self._files.items())
            if count
        )
        lines = [f"read: {', '.join(read) or 'nothing'}"]
        for why, names in sorted(self._left_out.items()):
            some = ", ".join(names[:_NAMES_SHOWN])
            more = f", and {len(names) - _NAMES_SHOWN:,} more" if len(names) > _NAMES_SHOWN else ""
            lines.append(f"left out, {why}: {some}{more}")
        if self._bad:
            first = self._first_bad.removeprefix("data.path: ")
            lines.append(f"skipped, {self._bad:,} bad lines or records; the first: {first}")
        return lines

    def _name(self, file: pathlib.Path) -> str:
        inside = self.root in file.parents
        return shown(str(file.relative_to(self.root)) if inside else file.name)

    def _choose(self, files: Iterator[pathlib.Path], skip: Sequence[str]) -> Iterator[pathlib.Path]:
        for file in files:
            if any(fnmatch.fnmatchcase(file.name.lower(), pattern.lower()) for pattern in skip):
                self._left_out["by data.skip"].append(self._name(file))
            else:
                yield file

    def _read(self, file: pathlib.Path) -> Iterator[Piece]:
        try:
            if self.path is None:
                formats.check_text(file)
                kind = "text"
            else:
                kind = formats.detect_format(file, self._field)
            # Check before the first piece: a document cannot be left out after it was yielded.
            if kind == "text" and self._bad_lines == "skip":
                formats.check_text(file)
            self._files[kind] += 1
            empty = True
            for piece in formats.read(file, kind, self._field, self._note_bad):
                self._documents[kind] += piece.ends
                empty = False
                yield piece
            if empty:
                self._files[kind] -= 1
                self._left_out["empty"].append(self._name(file))
        except formats.NoRecordsError:
            if file == self.path:
                raise
            self._files[kind] -= 1
            self._left_out["JSON, but not a list of records"].append(self._name(file))
        except ValueError as error:
            # A few of Python's sources are in older encodings; they are left out.
            if self.path is None:
                self._left_out["not UTF-8"].append(self._name(file))
            elif self._bad_lines == "skip" and "is not text" in str(error):
                self._left_out["not text"].append(self._name(file))
            else:
                raise

    def _note_bad(self, message: str) -> None:
        if self._bad_lines == "refuse":
            raise ValueError(f"{message} data.bad_lines: skip leaves such lines out.")
        self._bad, self._first_bad = self._bad + 1, self._first_bad or message


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _walk(
    root: pathlib.Path, left_out: dict[str, list[str]], leave_out: set[str] | None = None
) -> Iterator[pathlib.Path]:
    """Yield all files below a folder in an order that is the same on every machine.

    Links to folders are followed, each folder is read once; hidden files are left out.

    Args:
        root: the folder.
        left_out: names that are left out are added to it, by the reason.
        leave_out: names of folders that are not searched.

    Raises:
        ValueError: if an entry is neither a file nor a folder, such as a pipe or a device.
    """
    folders, seen = [root], set()
    while folders:
        folder = folders.pop()
        about = folder.stat()
        if (about.st_dev, about.st_ino) in seen:
            left_out["folders that were read before"].append(shown(folder.name))
            continue
        seen.add((about.st_dev, about.st_ino))
        below = []
        for name in sorted(os.listdir(folder)):
            path = folder / name
            if name.startswith("."):
                left_out["hidden"].append(shown(name))
            elif path.is_dir():
                if name not in (leave_out or ()):
                    below.append(path)
            else:
                _require_file(path)
                yield path
        folders += reversed(below)


def _require_file(path: pathlib.Path) -> None:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise ValueError(f"data.path: {shown(path)} is a link to nothing.") from None
    if stat.S_ISREG(mode):
        return
    kinds = ((stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
    what = next((what for is_kind, what in kinds if is_kind(mode)), "a device")
    raise ValueError(f"data.path: {shown(path)} is {what}; training reads files.")
