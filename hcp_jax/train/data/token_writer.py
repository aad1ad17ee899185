"""Write folders of tokens, and continue writing where an earlier call stopped.

`tokens.py` describes the files.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, cast

import numpy as np

from hcp_jax.base.terminal import printable as shown
from hcp_jax.train.data.tokenizer import Tokenizer
from hcp_jax.train.data.tokens import BLOCK, Meta, read_json, tokenizer_meta


def write(
    texts: Callable[[], Iterable[bytes]],
    tokenizer: Tokenizer,
    folder: pathlib.Path,
    asked: dict[str, Any],
    tell: Callable[[str], None] = lambda line: None,
) -> Meta:
    """Write a tokenised folder, or continue one that an earlier call began; return its `Meta`.

    Args:
        texts: returns the documents, from the first one on.
        tokenizer: the tokenizer.
        folder: a new folder, an empty one, or one that the same call began.
        asked: settings that the texts depend on, "source" among them; to continue a folder, they
            must be the same.
        tell: called with a line if this call continues an earlier one.

    Raises:
        ValueError: if the folder holds other files, or was begun with other texts, or if another
            process is writing it.
    """
    fresh = tokenizer_meta(tokenizer)
    asked = json.loads(json.dumps({**asked, **dataclasses.asdict(fresh)}))
    progress = _begin(folder, tokenizer.dtype, asked)
    with (
        (folder / "tokens.npy").open("r+b") as tokens,
        (folder / "ends.part").open("r+b") as ends,
    ):
        _lock(tokens, folder)
        begin = _header_size(tokenizer.dtype)
        total, done, checksum = (progress[n] for n in ("tokens", "documents", "text_crc32"))
        _cut(tokens, begin + total * tokenizer.dtype.itemsize, folder)
        _cut(ends, done * 8, folder)
        rest = iter(texts())
        if done:
            tell(f"{shown(folder)}: going on after {done:,} documents, {total:,} tokens")
            _skip(rest, done, checksum, folder)
        for batch, encoded in tokenizer.batches(rest):
            sizes = np.array([ids.size for ids in encoded], np.int64)
            tokens.write(np.concatenate(encoded).tobytes())
            ends.write((total + np.cumsum(sizes)).tobytes())
            tokens.flush()
            ends.flush()
            total, done = total + int(sizes.sum()), done + sizes.size
            for text in batch:
                checksum = zlib.crc32(text, checksum)
            progress = {"documents": done, "tokens": total, "text_crc32": checksum}
            _write_json(folder / "progress.json", {**progress, "asked": asked})
        tokens.seek(0)
        _write_header(tokens, tokenizer.dtype, total)
        assert tokens.tell() == begin
    offsets = np.concatenate([[0], np.fromfile(folder / "ends.part", np.int64)])
    np.save(folder / "offsets.npy", offsets)
    meta = dataclasses.replace(
        fresh,
        documents=done,
        tokens=total,
        source=str(asked.get("source", "")),
        offsets_crc32=zlib.crc32(offsets.tobytes()),
        tokens_crc32=tuple(_block_checksums(folder / "tokens.npy", begin)),
    )
    meta = dataclasses.replace(meta, crc32=meta.checksum())
    _write_json(folder / "meta.json", dataclasses.asdict(meta))
    for name in ("progress.json", "ends.part"):
        (folder / name).unlink()
    return meta


def _begin(folder: pathlib.Path, dtype: np.dtype[Any], asked: dict[str, Any]) -> dict[str, int]:
    """Return how much has been written; make the files if nothing has."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "tokens.npy").open("wb") as file:
            _write_header(file, dtype, 0)
        (folder / "ends.part").touch()
        nothing = {"documents": 0, "tokens": 0, "text_crc32": 0}
        _write_json(folder / "progress.json", {**nothing, "asked": asked})
        return nothing
    if (folder / "meta.json").exists() or not (folder / "progress.json").is_file():
        raise ValueError(
            f"--out {shown(folder)} exists and is not empty; give another folder, or remove it."
        )
    progress = read_json(folder / "progress.json")
    before = progress.get("asked")
    differ = [name for name in asked if not before or before.get(name) != asked[name]]
    numbers: dict[str, Any] = {
        name: progress.get(name) for name in ("documents", "tokens", "text_crc32")
    }
    if differ or any(type(value) is not int for value in numbers.values()):
        what = f"another {', '.join(differ)}" if differ else "a progress.json that is damaged"
        raise ValueError(
            f"--out {shown(folder)} was begun with {what}; give another folder, or remove it."
        )
    return {name: int(value) for name, value in numbers.items()}


def _skip(texts: Iterator[bytes], count: int, checksum: int, folder: pathlib.Path) -> None:
    """Skip documents whose tokens have been written, and check that they are the same."""
    found = 0
    for _ in range(count):
        text = next(texts, None)
        found = zlib.crc32(text or b"", found)
    if found != checksum:
        raise ValueError(
            f"--out {shown(folder)} was begun with other text than there is now; give another "
            "folder, or remove it."
        )


def _cut(file: BinaryIO, size: int, folder: pathlib.Path) -> None:
    """Cut a file to the size that progress.json recorded last, and move to its end."""
    if os.fstat(file.fileno()).st_size < size:
        raise ValueError(
            f"--out {shown(folder)}: {shown(pathlib.Path(file.name).name)} is shorter than it was; "
            "remove the folder and begin again."
        )
    file.truncate(size)
    file.seek(size)


def _lock(file: BinaryIO, folder: pathlib.Path) -> None:
    # On a file system without locks, go on without one.
    with contextlib.suppress(OSError):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"--out {shown(folder)}: another hcp tokenize is writing there."
            ) from None


def _block_checksums(path: pathlib.Path, begin: int) -> Iterator[int]:
    with path.open("rb") as file:
        file.seek(begin)
        yield from (zlib.crc32(block) for block in iter(lambda: file.read(BLOCK), b""))


def _header_size(dtype: np.dtype[Any]) -> int:
    class Counter:
        size = 0

        def write(self, data: bytes) -> None:
            self.size += len(data)

    counter = Counter()
    _write_header(cast(BinaryIO, counter), dtype, 0)
    return counter.size


def _write_header(file: BinaryIO, dtype: np.dtype[Any], size: int) -> None:
    # NumPy pads a header, so that its size does not change with the length.
    header = {"descr": dtype.str, "fortran_order": False, "shape": (size,)}
    np.lib.format.write_array_header_1_0(file, header)


def _write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
    """Write a file so that it is never half-written: by renaming a temporary one."""
    written = path.with_suffix(".tmp")
    written.write_text(json.dumps(values, indent=2) + "\n")
    written.replace(path)
