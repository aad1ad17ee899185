"""Read folders of tokens, which `hcp tokenize` makes (`token_writer.py`).

A tokenised folder is three files:

    tokens.npy    uint16 or uint32, the documents' tokens end to end
    offsets.npy   int64, where each document begins, and at the end the number of tokens
    meta.json     vocabulary, special ids, checksums, the tokenizer's checksum, the source

meta.json is written last. Until then there are progress.json, which says how much of the text the
other files hold, and ends.part, where each document ends; with them an interrupted call continues.

Tokens are read from the file when they are needed, not memory-mapped: if a mapped file is
shortened, SIGBUS ends the process, while a read that returns too little is an error that names the
file.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import weakref
import zlib
from collections.abc import Iterable
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Int64, Integer

from hcp_jax.base.terminal import printable as shown
from hcp_jax.train.data.tokenizer import Tokenizer, describe_special

FILES = ("tokens.npy", "offsets.npy", "meta.json")
"""The files of a tokenised folder."""

BLOCK = 2**26
"""Bytes of tokens that share one checksum."""

_BLOCKS_CHECKED = 4
"""The most blocks that are checked when a folder is opened."""


@dataclasses.dataclass(frozen=True)
class Meta:
    """The content of a tokenised folder's meta.json.

    Attributes:
        vocab_size: all ids are below this.
        bos_id: the id before the first token of every document.
        eos_id: the id after the last token of every document.
        tokenizer_sha256: checksum of tokenizer.json, in hexadecimal.
        documents: number of documents.
        tokens: number of tokens of all documents, without `bos_id` and `eos_id`.
        source: the path of the text.
        bos: the token of `bos_id`.
        eos: the token of `eos_id`.
        special_tokens: how text that spells a special token was encoded; see `Tokenizer`.
        offsets_crc32: checksum of the numbers in offsets.npy; None in folders of older versions.
        tokens_crc32: checksum of each 64 MiB of the numbers in tokens.npy; empty in folders of
            older versions.
        crc32: checksum of all of the above; None in folders of older versions.
    """

    vocab_size: int
    bos_id: int
    eos_id: int
    tokenizer_sha256: str
    documents: int = 0
    tokens: int = 0
    source: str = ""
    bos: str = ""
    eos: str = ""
    special_tokens: str = "control"
    offsets_crc32: int | None = None
    tokens_crc32: tuple[int, ...] = ()
    crc32: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "bos_id", "eos_id", "documents", "tokens"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise ValueError(f"{name} must be a number from 0, got {value!r}")
        for name in ("bos_id", "eos_id"):
            if getattr(self, name) >= self.vocab_size:
                raise ValueError(
                    f"{name}={getattr(self, name)} is not in a vocabulary of {self.vocab_size}"
                )
        if self.vocab_size > 2**31:
            raise ValueError(f"vocab_size={self.vocab_size} is more than int32 can hold")
        if self.crc32 is not None and self.crc32 != self.checksum():
            raise ValueError("meta.json is not what was written")

    def checksum(self) -> int:
        """Return the value that `crc32` must have."""
        values = {**dataclasses.asdict(self), "crc32": None}
        return zlib.crc32(json.dumps(values, sort_keys=True).encode())


class TokenFile:
    """The ids in a tokens.npy, read when they are asked for.

    Args:
        path: the file.
        vocab_size: all ids must be below this.

    Attributes:
        size: number of ids.
        dtype: uint16 or uint32.

    Raises:
        ValueError: if it is not an array of ids, or not as long as its header says.
    """

    def __init__(self, path: pathlib.Path, vocab_size: int):
        self._path, self._vocab_size = path, vocab_size
        with path.open("rb") as file:
            self.size, self.dtype = _read_header(file, ("<u2", "<u4"))
            self._begin = file.tell()
            self._file = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._file)

    def __getitem__(self, key: slice | Integer[np.ndarray, "n"]) -> Integer[np.ndarray, "n"]:
        """Return ids; consecutive ones are read together.

        Raises:
            OSError: if the file has become shorter.
            ValueError: if one is not in the vocabulary.
        """
        if isinstance(key, slice):
            begin, end, _ = key.indices(self.size)
            runs = [(begin, max(end, begin))]
        else:
            borders = np.flatnonzero(np.diff(key) != 1) + 1
            begins = key[np.append(0, borders)[: key.size]]
            ends = key[np.append(borders, key.size)[: key.size] - 1] + 1
            runs = list(zip(begins.tolist(), ends.tolist(), strict=True))
        ids = np.empty(sum(end - begin for begin, end in runs), self.dtype)
        at = 0
        for begin, end in runs:
            self._read(begin, ids[at : at + end - begin])
            at += end - begin
        if ids.size and int(ids.max()) >= self._vocab_size:
            raise ValueError(
                f"{shown(self._path)} is damaged: it has the id {int(ids.max())}, but its "
                f"vocabulary ends with {self._vocab_size - 1}."
            )
        return ids

    def _read(self, begin: int, ids: Integer[np.ndarray, "n"]) -> None:
        view, done = ids.view(np.uint8), 0
        offset = self._begin + begin * self.dtype.itemsize
        while done < len(view):
            got = os.preadv(self._file, [view[done:].data], offset + done)
            if not got:
                raise OSError(
                    f"{shown(self._path)} has become shorter since it was opened: nothing is left "
                    f"at byte {offset + done}. Restore the file, and go on from the last "
                    "checkpoint."
                )
            done += got


class Tokenised(NamedTuple):
    """Documents as tokens: document i is `ids[offsets[i] : offsets[i + 1]]`."""

    ids: TokenFile | Integer[np.ndarray, "n"]
    offsets: Int64[np.ndarray, "D+1"]
    meta: Meta
    report: list[str]


def tokenizer_meta(tokenizer: Tokenizer) -> Meta:
    """Return the `Meta` of a tokenizer, without documents."""
    return Meta(
        tokenizer.vocab_size,
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.sha256,
        bos=tokenizer.bos,
        eos=tokenizer.eos,
        special_tokens=tokenizer.special_tokens,
    )


def tokenise(texts: Iterable[bytes], tokenizer: Tokenizer) -> Tokenised:
    """Return all texts as tokens, in memory.

    Raises:
        ValueError: as `Tokenizer.batches` does.
    """
    documents = list(tokenizer(texts))
    offsets = np.concatenate([[0], np.cumsum([len(d) for d in documents], dtype=np.int64)])
    return Tokenised(
        np.concatenate(documents), offsets, tokenizer_meta(tokenizer), tokenizer.describe()
    )


def is_tokenised(path: pathlib.Path) -> bool:
    """Return whether a folder holds tokens rather than text."""
    names = ("tokens.npy", "offsets.npy", "meta.json")
    return sum((path / name).is_file() for name in names) >= 2 or (path / names[0]).is_file()


def read(folder: pathlib.Path, tokenizer: str | None = None) -> Tokenised:
    """Open a tokenised folder and check it.

    Up to 256 MB of its tokens are read and compared with their checksums; tokens that are read
    later are compared with the vocabulary.

    Args:
        folder: one that `hcp tokenize` made.
        tokenizer: the tokenizer.json that it must have been made with; None for any.

    Raises:
        ValueError: if a file is missing, damaged or does not fit the others, or if the folder was
            made with another tokenizer.
    """
    name = f"data.path: {shown(folder)}"
    if not (folder / "meta.json").is_file():
        raise ValueError(
            f"{name} has tokens, but no meta.json: hcp tokenize did not finish. Run it again: it "
            "goes on where it stopped."
        )
    try:
        meta = _read_meta(folder / "meta.json")
        offsets = _read_offsets(folder / "offsets.npy", meta)
        ids = TokenFile(folder / "tokens.npy", meta.vocab_size)
        if ids.size != meta.tokens or offsets[-1] != ids.size:
            raise ValueError(
                f"tokens.npy has {ids.size} tokens, offsets.npy {int(offsets[-1])} and meta.json "
                f"{meta.tokens}"
            )
        checked = _check_tokens(ids, meta)
    except Exception as error:  # A damaged file can raise anything.
        raise ValueError(f"{name} is damaged: {error}") from None
    if tokenizer is not None:
        checksum = hashlib.sha256(pathlib.Path(tokenizer).read_bytes()).hexdigest()
        if checksum != meta.tokenizer_sha256:
            raise ValueError(
                f"{name} was made with another tokenizer than data.tokenizer={tokenizer}: its "
                f"checksum begins with {meta.tokenizer_sha256[:12]}, that of the file with "
                f"{checksum[:12]}."
            )
    report = [
        f"a document begins with {shown(meta.bos)!r} ({meta.bos_id}) and ends with "
        f"{shown(meta.eos)!r} ({meta.eos_id})",
        describe_special(meta.special_tokens),
        checked,
    ]
    return Tokenised(ids, offsets, meta, report)


def _read_header(file: BinaryIO, dtypes: tuple[str, ...]) -> tuple[int, np.dtype[Any]]:
    """Return length and dtype of the 1-dim array in a .npy file, and move to its first number.

    Raises:
        ValueError: if it has other dims or dtypes, or is not as long as its header says.
    """
    name = pathlib.Path(file.name).name
    version = np.lib.format.read_magic(file)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"{name} is a .npy file of version {version}")
    shape, _, dtype = readers[version](file)
    if dtype.str not in dtypes or len(shape) != 1:
        names = " or ".join(str(np.dtype(x)) for x in dtypes)
        raise ValueError(
            f"{name} holds {dtype} of shape {shape}; it must be a 1-dim array of {names}"
        )
    length = os.fstat(file.fileno()).st_size
    expected = file.tell() + int(shape[0]) * dtype.itemsize
    if length != expected:
        raise ValueError(f"{name} has {length} bytes, but should have {expected}")
    return int(shape[0]), dtype


def _read_offsets(path: pathlib.Path, meta: Meta) -> Int64[np.ndarray, "D+1"]:
    with path.open("rb") as file:
        size, dtype = _read_header(file, ("<i8",))
        offsets = np.frombuffer(file.read(), dtype)
    if size != meta.documents + 1:
        raise ValueError(
            f"offsets.npy has {size} numbers; {meta.documents} documents need {meta.documents + 1}"
        )
    if offsets[0] != 0 or np.any(np.diff(offsets) < 0):
        raise ValueError("the numbers in offsets.npy must ascend from 0")
    if meta.offsets_crc32 is not None and zlib.crc32(offsets.tobytes()) != meta.offsets_crc32:
        raise ValueError("the numbers in offsets.npy are not those that were written")
    return offsets


def _check_tokens(ids: TokenFile, meta: Meta) -> str:
    """Compare tokens with their checksums; return a line that says how much was checked."""
    each = BLOCK // ids.dtype.itemsize
    count = -(-ids.size // each)
    if meta.tokens_crc32 and len(meta.tokens_crc32) != count:
        raise ValueError(f"meta.json has {len(meta.tokens_crc32)} checksums for {count} blocks")
    chosen = np.unique(np.linspace(0, count - 1, min(count, _BLOCKS_CHECKED)).astype(int))
    for block in chosen.tolist() if count else []:
        found = ids[block * each : (block + 1) * each]
        if meta.tokens_crc32 and zlib.crc32(found.tobytes()) != meta.tokens_crc32[block]:
            raise ValueError(
                f"tokens {block * each} to {block * each + found.size - 1} in tokens.npy are not "
                "those that were written"
            )
    what = "checksums" if meta.tokens_crc32 else "the vocabulary (it has no checksums)"
    return f"compared with {what}: {chosen.size if count else 0} of {count} parts of 64 MiB"


def _read_meta(path: pathlib.Path) -> Meta:
    values = read_json(path)
    known = {field.name for field in dataclasses.fields(Meta)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"meta.json has an unknown key: {shown(unknown[0])!r}")
    checksums = values.pop("tokens_crc32", ())
    if not isinstance(checksums, list | tuple) or any(type(x) is not int for x in checksums):
        raise ValueError("tokens_crc32 in meta.json must be a list of numbers")
    return Meta(**values, tokens_crc32=tuple(checksums))


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Return the keys and values of a JSON file.

    Raises:
        ValueError: if it holds something else.
    """
    values = json.loads(path.read_bytes())
    if not isinstance(values, dict):
        raise ValueError(f"{path.name} must hold keys and values, got {type(values).__name__}")
    return values
