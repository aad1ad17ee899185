"""Read documents from one file: text, JSON lines, JSON arrays, CSV and Parquet, also compressed.

The format of a file is recognised by its name and its first bytes. Files are read in pieces of
about a megabyte, so that a file needs no more memory than its longest document; a plain text file
is one document in several pieces.
"""

import contextlib
import csv
import json
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from hcp_jax.base.terminal import printable as shown
from hcp_jax.train.data import unpacking
from hcp_jax.train.data.unpacking import PACKED, pieces, require_package
from hcp_jax.train.data.utf8 import BOM, Bad, checked_pieces, numbered_lines

_HEAD = 2**16  # bytes by which a format is recognised
_LINES = {".jsonl", ".ndjson", ".jsonlines", ".ldjson"}
_TABLES = {".csv", ".tsv"}
_PARQUET = {".parquet", ".parq", ".pq"}
_KEYS_SHOWN = 12


class Piece(NamedTuple):
    """A part of a document's text, in UTF-8.

    Attributes:
        text: the bytes; a character may go on in the next piece.
        ends: whether the document ends with them.
    """

    text: bytes
    ends: bool


class NoRecordsError(ValueError):
    """A JSON file is not a list of documents; in a folder, such a file is left out."""


def detect_format(file: pathlib.Path, field: str) -> str:
    """Return the format of a file: "text", "JSON lines", "JSON", "CSV" or "Parquet".

    Args:
        file: a regular file.
        field: the field that holds a record's text; JSON is recognised by it in files with other
            names.

    Raises:
        ValueError: if the file is compressed and cannot be read.
    """
    suffixes = [s.lower() for s in file.suffixes]
    while suffixes and (suffixes[-1] in PACKED or suffixes[-1] == ".txt"):
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    with file.open("rb") as opened:
        if suffix in _PARQUET or opened.read(4) == b"PAR1":
            return "Parquet"
    if suffix in _LINES:
        return "JSON lines"
    if suffix in _TABLES:
        return "CSV"
    head = b""
    for piece in pieces(file):
        head += piece
        if len(head) >= _HEAD:
            break
    head = head[:_HEAD].removeprefix(BOM)
    if suffix == ".json":
        return "JSON lines" if _has_lines(head) else "JSON"
    if re.match(rb'\s*\[\s*\{\s*"', head) and _has_field(head[head.index(b"{") :], field):
        return "JSON"
    if re.match(rb'\s*\{\s*"', head) and _has_field(head, field):
        return "JSON lines"
    return "text"


def read(file: pathlib.Path, format_: str, field: str, bad: Bad) -> Iterator[Piece]:
    """Yield the documents of a file that are not empty, in pieces.

    Args:
        file: a regular file.
        format_: from `detect_format`.
        field: the field that holds a record's text.
        bad: see `Bad`.

    Raises:
        ValueError: if the file is damaged, or not what it seems to be.
        NoRecordsError: if it is JSON, but no list of documents.
    """
    readers = {
        "JSON lines": _json_lines,
        "JSON": _json_array,
        "CSV": _csv,
        "Parquet": _parquet,
    }
    if format_ == "text":
        yield from _text(file)
        return
    for text in readers[format_](file, field, bad):
        if text:
            yield Piece(text, True)


def check_text(file: pathlib.Path) -> None:
    """Read a file, and raise ValueError if it is not text."""
    for _ in _text(file):
        pass


def _text(file: pathlib.Path) -> Iterator[Piece]:
    last = b""
    for piece in checked_pieces(file):
        if last:
            yield Piece(last, False)
        last = piece
    if last:
        yield Piece(last, True)


def _json_lines(file: pathlib.Path, field: str, bad: Bad) -> Iterator[bytes]:
    for number, line in numbered_lines(file, bad):
        if line.strip():
            where = f"data.path: {shown(file)}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                bad(f"{where}: not JSON ({error}).")
                continue
            yield _field(record, field, where, bad)


def _json_array(file: pathlib.Path, field: str, bad: Bad) -> Iterator[bytes]:
    """Yield the texts of the records of an array; only one record is in memory at a time."""
    decoder, pieces = json.JSONDecoder(), checked_pieces(file)
    text, at, number, ended = "", 0, 0, False

    def more(least: int) -> None:
        nonlocal text, at, ended
        read = [text[at:]]
        while least > 0 and not ended:
            piece = next(pieces, None)
            ended = piece is None
            read.append((piece or b"").decode())
            least -= len(read[-1])
        text, at = "".join(read), 0

    def skip(pattern: str) -> str:
        """Skip white space; if one of these characters follows, skip and return it, else ""."""
        nonlocal at
        while True:
            match = re.compile(r"\s*").match(text, at)
            assert match is not None
            at = match.end()
            if at < len(text) or ended:
                break
            more(1)
        found = text[at : at + 1]
        if found and found in pattern:
            at += 1
            return found
        return ""

    name = shown(file)
    if not skip("["):
        if text[at : at + 1] in ("", "{"):
            yield from _json_object(file, text, field)
            return
        raise NoRecordsError(f"data.path: {name} is JSON, but not a list of records.")
    if skip("]"):
        return
    while True:
        number += 1
        skip("")
        wanted = unpacking.PIECE
        while True:
            try:
                record, end = decoder.raw_decode(text, at)
                break
            except (ValueError, RecursionError) as error:
                if ended:
                    message = f"data.path: {name}, record {number}: not JSON ({error})."
                    raise ValueError(message) from None
            more(wanted)
            wanted *= 2  # so that a long record is not parsed again after each piece
        at = end
        if isinstance(record, str):
            record = {field: record}
        yield _field(record, field, f"data.path: {name}, record {number}", bad)
        if skip("]"):
            if skip("") or at < len(text):
                raise ValueError(f"data.path: {name}: more text after the list of records.")
            return
        if not skip(","):
            raise ValueError(
                f"data.path: {name}: the list of records breaks off after record {number}."
            )


def _json_object(file: pathlib.Path, begun: str, field: str) -> Iterator[bytes]:
    """Yield the text of a file that is a single object."""
    if not begun.strip():
        return
    where = f"data.path: {shown(file)}"
    try:
        record = json.loads(b"".join(checked_pieces(file)))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error}).") from None
    if not isinstance(record.get(field), str):
        raise NoRecordsError(
            f"{where} is JSON, but not a list of records, and has no text in field "
            f"{shown(field)!r}."
        )

    def refuse(message: str) -> None:
        raise ValueError(message)

    yield _field(record, field, where, refuse)


def _csv(file: pathlib.Path, field: str, bad: Bad) -> Iterator[bytes]:
    def refuse(message: str) -> None:
        raise ValueError(message)

    # A line that is not text may be in the middle of a record, so it cannot be skipped.
    lines = (line.decode() + "\n" for _, line in numbered_lines(file, refuse))
    name = f"data.path: {shown(file)}"
    first = next(lines, "")
    tables = [(delimiter, next(csv.reader([first], delimiter=delimiter))) for delimiter in ",;\t"]
    found = [(delimiter, names) for delimiter, names in tables if field in names]
    if not first.strip():
        return
    if not found:
        raise ValueError(
            f"{name}, line 1: no column {field!r} (it has: {_listed(tables[0][1])}); name the "
            "column with data.field."
        )
    delimiter, names = found[0]
    # The csv module refuses fields of more than 128 kB; documents are longer.
    with _longest_field(sys.maxsize):
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        while True:
            begins = rows.line_num + 2
            try:
                row = next(rows, None)
            except csv.Error as error:
                bad(f"{name}, line {begins}: not CSV ({error}).")
                continue
            if row is None:
                return
            if row and len(row) != len(names):
                bad(f"{name}, line {begins}: {len(row)} values, but {len(names)} columns.")
            elif row:
                yield row[names.index(field)].encode()


@contextlib.contextmanager
def _longest_field(size: int) -> Iterator[None]:
    # The module's limit is process-wide, so it is put back at the end.
    before = csv.field_size_limit(size)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _parquet(file: pathlib.Path, field: str, bad: Bad) -> Iterator[bytes]:
    pyarrow = require_package("pyarrow", file)
    parquet = require_package("pyarrow.parquet", file)
    name = f"data.path: {shown(file)}"
    try:
        with parquet.ParquetFile(file) as opened:
            names = opened.schema_arrow.names
            if field not in names:
                raise ValueError(
                    f"no column {field!r} (it has: {_listed(names)}); name the column with "
                    "data.field"
                )
            number = 0
            for batch in opened.iter_batches(batch_size=256, columns=[field]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield _field({field: value}, field, f"{name}, row {number}", bad)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{name} is damaged: {error}") from None
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith("data.path") else f"{name}: {text}.") from None


def _field(record: Any, field: str, where: str, bad: Bad) -> bytes:
    """Return the text of a record; if it has none, call `bad`, and return b""."""
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        has = _listed(record) if isinstance(record, dict) else type(record).__name__
        bad(f"{where}: no text in field {field!r} (it has: {has}); name the field with data.field.")
        return b""
    # A lone surrogate is valid JSON, but not text.
    text: str = record[field]
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        bad(f"{where}: field {field!r} is not text ({error}).")
        return b""


def _listed(names: Any) -> str:
    names = [shown(name)[:80] for name in names]
    more = f", and {len(names) - _KEYS_SHOWN} more" if len(names) > _KEYS_SHOWN else ""
    return (", ".join(names[:_KEYS_SHOWN]) or "nothing") + more


def _has_lines(head: bytes) -> bool:
    """Return whether a file with this head is JSON lines: its first object ends with its line."""
    first, _, rest = head.lstrip().partition(b"\n")
    if not first.startswith(b"{") or not rest.lstrip().startswith(b"{"):
        return False
    return first.rstrip().endswith(b"}")


def _has_field(head: bytes, field: str) -> bool:
    """Return whether the JSON object at the begin of a file has this field."""
    text = head.decode(errors="ignore").lstrip()
    try:
        record, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        # Of an object longer than the head, only the beginning can be looked at.
        whole = "\n" in text or len(head) < _HEAD // 2
        return not whole and f"{json.dumps(field)}:" in text.replace('" :', '":')
    return isinstance(record, dict) and isinstance(record.get(field), str) and end > 0
