"""Read a file as text that is checked to be UTF-8, in pieces or line by line."""

import codecs
import pathlib
from collections.abc import Callable, Iterator

from hcp_jax.base.terminal import printable as shown
from hcp_jax.train.data.unpacking import pieces

BOM = codecs.BOM_UTF8

Bad = Callable[[str], None]
"""Called with what is wrong with a line or record; raises, or returns so that it is skipped."""


def checked_pieces(file: pathlib.Path) -> Iterator[bytes]:
    """Yield the pieces of a file after checking that they are text; each ends after a character."""
    offset, line, begun = 0, 1, b""
    for piece in pieces(file):
        text = begun + piece
        if offset == 0 and text.startswith(BOM):
            text, offset = text[len(BOM) :], len(BOM)
        size = _require_text(file, text, offset, line, final=False)
        begun, text = text[size:], text[:size]
        offset, line = offset + size, line + text.count(b"\n")
        if text:
            yield text
    _require_text(file, begun, offset, line, final=True)


def _require_text(file: pathlib.Path, text: bytes, offset: int, line: int, final: bool) -> int:
    """Return how many of the bytes are whole characters; raise ValueError if they are not text.

    Args:
        file: the file, for the message.
        text: some of its bytes.
        offset: the offset of the first of them in the file.
        line: the line of the first of them in the file.
        final: whether these are the last bytes, so that no character may be cut.
    """
    at, size = text.find(b"\0"), len(text)
    wide = offset == 0 and text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if wide:
        at = 0
    if at < 0:
        try:
            size = codecs.utf_8_decode(text, "strict", final)[1]
        except UnicodeDecodeError as error:
            at = error.start
    if at >= 0:
        line += text.count(b"\n", 0, at)
        raise ValueError(
            f"data.path: {shown(file)} is not text: byte 0x{text[at]:02x} at offset {offset + at} "
            f"(line {line}). Training reads UTF-8 text{', and this is UTF-16' if wide else ''}."
        )
    return size


def numbered_lines(file: pathlib.Path, bad: Bad) -> Iterator[tuple[int, bytes]]:
    """Yield the number and the bytes of each line that is text; numbers begin at 1."""
    offset = 0
    for number, line in enumerate(_cut_lines(pieces(file)), 1):
        text = line
        if number == 1 and text.startswith(BOM):
            text, offset = text[len(BOM) :], len(BOM)
        try:
            _require_text(file, text, offset, number, final=True)
        except ValueError as error:
            bad(str(error))
            text = b""
        yield number, text
        offset += len(line) + 1


def _cut_lines(pieces: Iterator[bytes]) -> Iterator[bytes]:
    begun: list[bytes] = []
    for piece in pieces:
        first, *more = piece.split(b"\n")
        begun.append(first)
        if more:
            yield b"".join(begun)
            yield from more[:-1]
            begun = [more[-1]]
    yield b"".join(begun)
