"""Text files to documents: UTF-8 bytes, checked, one at a time.

Apart from `data`, so that what turns text into tokens reads it in the same way as training does.
"""

import json
import os
import pathlib
import sysconfig
from collections.abc import Iterator

_STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def documents(path: pathlib.Path, field: str = "text") -> Iterator[bytes]:
    """Every document of a file or a folder that is not empty; lines of JSONL one by one.

    Args:
        path: a .jsonl file (one document a line), any other text file (one document), or a folder
            of them, searched to its depth without hidden files, always in the same order.
        field: the field of a JSONL line that holds its text.

    Raises:
        ValueError: if the path does not exist, holds no text, or holds something that is not UTF-8
            text or not JSONL with the field; names the file and the line.
    """
    if not path.exists():
        raise ValueError(
            f"data.path: {path} does not exist; give a .txt or .jsonl file, or a folder of "
            "text files."
        )
    files = _walk(path) if path.is_dir() else iter([path])
    seen_file = seen_text = False
    for file in files:
        seen_file = True
        for text in _read(file, field):
            if text:
                seen_text = True
                yield text
    if not seen_text:
        what = "is empty" if seen_file else "holds no text files"
        raise ValueError(f"data.path: {path} {what}; training needs at least one document.")


def standard_library() -> Iterator[bytes]:
    """The source files of the running Python's standard library, which every machine has."""
    for file in files_of_standard_library():
        text = file.read_bytes()
        # Python also runs sources in older encodings; those few are left out.
        if text and _fault(text) is None:
            yield text


def files_of_standard_library() -> Iterator[pathlib.Path]:
    """List the files that `standard_library` reads."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    return (file for file in _walk(root, _STDLIB_LEFT_OUT) if file.suffix == ".py")


def files(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """List the files that `documents` reads of a folder, in its order."""
    return _walk(folder)


def _walk(root: pathlib.Path, left_out: set[str] | None = None) -> Iterator[pathlib.Path]:
    """All files below a folder in an order that is the same on every machine; no hidden ones."""
    for folder, subfolders, files in os.walk(root):
        seen = (name for name in subfolders if not name.startswith("."))
        subfolders[:] = sorted(name for name in seen if name not in (left_out or ()))
        yield from (
            pathlib.Path(folder, name) for name in sorted(files) if not name.startswith(".")
        )


def _read(file: pathlib.Path, field: str) -> Iterator[bytes]:
    if file.suffix != ".jsonl":
        text = file.read_bytes()
        _require_text(file, text)
        yield text
        return
    offset = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            _require_text(file, line, offset, number)
            offset += len(line)
            if line.strip():
                yield _field(line, field, f"data.path: {file}, line {number}")


def _require_text(file: pathlib.Path, text: bytes, offset: int = 0, line: int = 1) -> None:
    """Refuses bytes that are no text; they begin at `offset`, in line `line`, of the file."""
    at = _fault(text)
    if at is not None:
        line += text.count(b"\n", 0, at)
        raise ValueError(
            f"data.path: {file} is not text: byte 0x{text[at]:02x} at offset {offset + at} "
            f"(line {line}). Training reads UTF-8 text."
        )


def _fault(text: bytes) -> int | None:
    """Where these bytes stop being text; None if they are text to the end."""
    at = text.find(b"\0")
    if at < 0:
        try:
            text.decode()
        except UnicodeDecodeError as error:
            return error.start
    return None if at < 0 else at


def _field(line: bytes, field: str, place: str) -> bytes:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON ({error}).") from None
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        has = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(
            f"{place}: no text in field {field!r} (it has: {has or 'nothing'}); "
            "name the field with data.field."
        )
    # A lone surrogate is valid JSON, but no text.
    try:
        return record[field].encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: field {field!r} is not text ({error}).") from None
