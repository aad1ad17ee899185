"""Read the bytes of a file piece by piece, decompressed if it is compressed."""

import bz2
import gzip
import lzma
import pathlib
import zlib
from collections.abc import Iterator
from typing import IO, Any

from hcp_jax.base.terminal import printable as shown

PIECE = 2**20
"""Bytes read at a time."""

PACKED = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\0"}
"""The first bytes of compressed files, by suffix."""


def pieces(file: pathlib.Path) -> Iterator[bytes]:
    """Yield the bytes of a file, unpacked if it is compressed."""
    with file.open("rb") as raw:
        begins = raw.read(6)
        raw.seek(0)
        packed = next((s for s, magic in PACKED.items() if begins.startswith(magic)), None)
        if packed is None and file.suffix.lower() in PACKED and begins:
            raise ValueError(f"data.path: {shown(file)} is damaged: no {file.suffix} file.")
        if packed is None:
            yield from iter(lambda: raw.read(PIECE), b"")
            return
        try:
            yield from _unpacked(file, raw, packed)
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            raise ValueError(f"data.path: {shown(file)} is damaged: {error}") from None


def _unpacked(file: pathlib.Path, raw: IO[bytes], packed: str) -> Iterator[bytes]:
    if packed == ".zst":
        yield from _unpacked_zstd(require_package("zstandard", file), raw)
        return
    unpack: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    opened = unpack[packed](raw)
    yield from iter(lambda: opened.read(PIECE), b"")


def _unpacked_zstd(zstandard: Any, raw: IO[bytes]) -> Iterator[bytes]:
    # The package's own reader accepts a file that is cut off.
    rest = b""
    while data := rest or raw.read(PIECE // 8):
        frame = zstandard.ZstdDecompressor().decompressobj()
        while True:
            try:
                if text := frame.decompress(data):
                    yield text
            except zstandard.ZstdError as error:
                raise OSError(str(error)) from None
            if frame.eof:
                break
            data = raw.read(PIECE // 8)
            if not data:
                raise EOFError("it is cut off")
        rest = frame.unused_data


def require_package(name: str, file: pathlib.Path) -> Any:
    """Return the module `name`, which reading `file` needs.

    Raises:
        ValueError: if its package is not installed; says how to install it.
    """
    try:
        return __import__(name, fromlist=["_"])
    except ImportError:
        package = name.partition(".")[0]
        raise ValueError(
            f"data.path: {shown(file)} needs the package {package}: pip install {package} (the "
            "extra 'data' of hcp_jax has it)."
        ) from None
