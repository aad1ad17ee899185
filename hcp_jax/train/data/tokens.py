"""Text to tokens, by the `tokenizers` package, and `hcp tokenize`: tokens to a folder of arrays.

A tokenised folder is three files that every process maps into memory and reads only where it uses
them:

    tokens.npy    uint16 or uint32, the documents' tokens one behind the other
    offsets.npy   int64, where each document begins, and at the end how many tokens there are
    meta.json     vocabulary, special ids, the tokenizer's checksum, the source

meta.json is written last: a folder without it is one that was not finished.
"""

import argparse
import dataclasses
import hashlib
import json
import pathlib
import time
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Int64, Integer

from hcp_jax import terminal
from hcp_jax.train.data import text

FILES = ("tokens.npy", "offsets.npy", "meta.json")
"""What a tokenised folder is made of."""

_TEXT_AT_ONCE = 2**22
"""Bytes that are turned into tokens together, by all cores."""


@dataclasses.dataclass(frozen=True)
class Meta:
    """What a tokenised folder says of itself.

    Attributes:
        vocab_size: no token's id is as great as this.
        bos_id: the id before the first token of every document.
        eos_id: the id that the last token of every document is followed by.
        tokenizer_sha256: of tokenizer.json, in hexadecimal.
        documents: how many.
        tokens: of all documents together, without the two above.
        source: the path of the text.
    """

    vocab_size: int
    bos_id: int
    eos_id: int
    tokenizer_sha256: str
    documents: int = 0
    tokens: int = 0
    source: str = ""


class Tokenised(NamedTuple):
    """Documents as tokens: document i is `ids[offsets[i] : offsets[i + 1]]`."""

    ids: Integer[np.ndarray, "n"]
    offsets: Int64[np.ndarray, "D+1"]
    meta: Meta


class Tokenizer:
    """A tokenizer.json, and which of its tokens begin and end a text.

    Special tokens that are written out in a text become special tokens; none are added.

    Args:
        path: the tokenizer.json.
        bos: the token that begins a text; None for what the tokenizer_config.json beside it says,
            and if that says nothing, the one that ends it.
        eos: the token that ends a text; None for what the tokenizer_config.json says.

    Raises:
        ValueError: if the file does not exist or is no tokenizer, if nothing says which token ends
            a text, or if it has not the token that was named.
    """

    def __init__(self, path: pathlib.Path, bos: str | None = None, eos: str | None = None):
        if not path.is_file():
            raise ValueError(f"tokenizer: {path} does not exist; give a tokenizer.json.")
        content = path.read_bytes()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # The package raises nothing narrower.
            raise ValueError(f"tokenizer: {path} is no tokenizer.json ({error}).") from None
        # Truncation and padding are for inference; a file may have them switched on.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        beside = _special_tokens(path.with_name("tokenizer_config.json"))
        eos = eos or beside.get("eos_token")
        if eos is None:
            raise ValueError(
                f"tokenizer: nothing says which token of {path} ends a text: there is no "
                "tokenizer_config.json beside it with an eos_token. Run hcp tokenize with --eos."
            )
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        # Ids may have gaps, so that the number of tokens is not enough.
        size = 1 + max(vocabulary.values())
        bos_id, eos_id = (
            _id_of(token, vocabulary, path)
            for token in (bos or beside.get("bos_token") or eos, eos)
        )
        self.meta = Meta(size, bos_id, eos_id, hashlib.sha256(content).hexdigest())

    @property
    def dtype(self) -> np.dtype:
        """The smallest that holds every id."""
        return np.dtype(np.uint16 if self.meta.vocab_size <= 2**16 else np.uint32)

    def __call__(self, texts: Iterable[bytes]) -> Iterator[Integer[np.ndarray, "n"]]:
        """The tokens of each text, in order; a few megabytes of text at a time are in memory."""
        for batch in _batches(texts):
            for encoded in self._tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                yield np.asarray(encoded.ids, self.dtype)


def tokenise(texts: Iterable[bytes], tokenizer: pathlib.Path) -> Tokenised:
    """All texts as tokens, in memory.

    Raises:
        ValueError: as `Tokenizer` does.
    """
    tokenize = Tokenizer(tokenizer)
    documents = list(tokenize(texts))
    offsets = np.concatenate([[0], np.cumsum([len(d) for d in documents], dtype=np.int64)])
    return Tokenised(np.concatenate(documents), offsets, tokenize.meta)


def is_tokenised(path: pathlib.Path) -> bool:
    """Whether this is a folder of tokens rather than text."""
    return (path / "tokens.npy").is_file()


def read(folder: pathlib.Path, tokenizer: str | None = None) -> Tokenised:
    """Maps a tokenised folder into memory; of the tokens, nothing is read.

    Args:
        folder: one that `hcp tokenize` made.
        tokenizer: the tokenizer.json that it must have been made with; None for any.

    Raises:
        ValueError: if a file is missing or does not fit the others, or if the tokenizer was another
            one.
    """
    place = f"data.path: {folder}"
    if not (folder / "meta.json").is_file():
        raise ValueError(
            f"{place} has tokens, but no meta.json: hcp tokenize did not finish. Remove the folder "
            "and run it again."
        )
    try:
        meta = Meta(**json.loads((folder / "meta.json").read_text()))
        ids, offsets = (np.load(folder / f"{n}.npy", mmap_mode="r") for n in ("tokens", "offsets"))
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"{place} is damaged: {error}") from None
    fits = offsets.size == meta.documents + 1 and ids.size == meta.tokens
    if not fits or offsets[0] != 0 or offsets[-1] != ids.size or np.any(np.diff(offsets) < 0):
        raise ValueError(
            f"{place} is damaged: offsets.npy, tokens.npy ({ids.size} tokens) and meta.json "
            f"({meta.documents} documents, {meta.tokens} tokens) do not fit each other."
        )
    if tokenizer is not None:
        checksum = hashlib.sha256(pathlib.Path(tokenizer).read_bytes()).hexdigest()
        if checksum != meta.tokenizer_sha256:
            raise ValueError(
                f"{place} was made with another tokenizer than data.tokenizer={tokenizer}: its "
                f"checksum begins with {meta.tokenizer_sha256[:12]}, that of the file with "
                f"{checksum[:12]}."
            )
    return Tokenised(ids, offsets, meta)


def write(texts: Iterable[bytes], tokenize: Tokenizer, folder: pathlib.Path, source: str) -> Meta:
    """Writes a tokenised folder; what it says of itself.

    Args:
        texts: the documents.
        tokenize: the tokenizer.
        folder: a new folder, or an empty one.
        source: where the texts come from.

    Raises:
        ValueError: if there is something in the folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--out {folder} exists and is not empty; give another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    ends = [0]
    with (folder / "tokens.npy").open("wb") as file:
        _write_header(file, tokenize.dtype, 0)
        begin = file.tell()
        for ids in tokenize(texts):
            file.write(ids.tobytes())
            ends.append(ends[-1] + ids.size)
        # NumPy leaves room in a header for the length to grow.
        file.seek(0)
        _write_header(file, tokenize.dtype, ends[-1])
        assert file.tell() == begin
    np.save(folder / "offsets.npy", np.asarray(ends, np.int64))
    meta = dataclasses.replace(
        tokenize.meta, documents=len(ends) - 1, tokens=ends[-1], source=source
    )
    (folder / "meta.json").write_text(json.dumps(dataclasses.asdict(meta), indent=2) + "\n")
    return meta


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hcp tokenize`."""
    parser.add_argument(
        "data", type=pathlib.Path, help="a .jsonl or text file, or a folder of them"
    )
    parser.add_argument(
        "--tokenizer", type=pathlib.Path, required=True, help="the model's tokenizer.json"
    )
    parser.add_argument(
        "--out", type=pathlib.Path, required=True, help="a new folder, to be named in data.path"
    )
    parser.add_argument("--field", default="text", help="field of a JSONL line (text)")
    for name, does in (("bos", "begins"), ("eos", "ends")):
        parser.add_argument(
            f"--{name}",
            metavar="TOKEN",
            help=f"the token that {does} a text, if no tokenizer_config.json beside the tokenizer "
            "says so",
        )


def uses_jax(args: argparse.Namespace) -> bool:
    """Return False: text is read on the host."""
    return False


def run(args: argparse.Namespace) -> int:
    """Runs `hcp tokenize`."""
    tokenize = Tokenizer(args.tokenizer, args.bos, args.eos)
    began = time.perf_counter()
    meta = write(text.documents(args.data, args.field), tokenize, args.out, str(args.data))
    seconds = time.perf_counter() - began
    terminal.say(
        f"{args.out}: {meta.documents:,} documents, {meta.tokens:,} tokens as {tokenize.dtype}, "
        f"vocabulary of {meta.vocab_size:,}, in {seconds:.0f} s"
    )
    return 0


def _write_header(file: BinaryIO, dtype: np.dtype, size: int) -> None:
    header = {"descr": dtype.str, "fortran_order": False, "shape": (size,)}
    np.lib.format.write_array_header_1_0(file, header)


def _batches(texts: Iterable[bytes]) -> Iterator[list[str]]:
    batch, size = [], 0
    for one in texts:
        batch.append(one.decode())
        size += len(one)
        if size >= _TEXT_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _special_tokens(file: pathlib.Path) -> dict[str, str]:
    """The tokens that a tokenizer_config.json names, by what they are for."""
    if not file.is_file():
        return {}
    try:
        values: Any = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"tokenizer: {file} is not JSON ({error}).") from None
    found = {name: values.get(name) for name in ("bos_token", "eos_token")}
    # Older files hold a token together with how it is stripped.
    tokens = {n: v.get("content") if isinstance(v, dict) else v for n, v in found.items()}
    return {name: token for name, token in tokens.items() if token}


def _id_of(token: str, vocabulary: dict[str, int], path: pathlib.Path) -> int:
    if token not in vocabulary:
        raise ValueError(
            f"tokenizer: {path} has no token {token!r}, which is to begin or end a text."
        )
    return vocabulary[token]
