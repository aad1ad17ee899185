"""Text to batches: documents as bytes, packed one behind the other into streams.

A document of n bytes becomes n + 1 tokens with n + 1 targets, each the token that comes next:

    tokens   SEP  b0  b1  …  b(n-1)
    targets  b0   b1  b2  …  SEP

Documents longer than a stream are cut into segments of `seq_len` tokens and a rest. Segments are
shuffled anew each epoch; whole ones are streams, and the others are laid end to end and cut every
`seq_len` tokens. So streams have no padding, a batch is not all of one document, and every token
has its true target, also the last one before a cut. Behind a cut, positions begin at 0 again, and
the batch's mask lets no token see past the beginning of its segment, still less of its document.

Everything is held in memory as bytes and nothing is random but the seed, so a pipeline's state is a
few integers: they are saved with a checkpoint, and the batches after it are the same ones. In a run
of several processes each makes the whole global batch and puts its own part on its devices; the
state is then the same everywhere and fits any number of processes.
"""

import dataclasses
import json
import operator
import os
import pathlib
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from typing import Any, SupportsIndex

import grain
import numpy as np
from jaxtyping import Int32, Int64, UInt8

from hcp_jax.mask import Mask, causal, documents

SEPARATOR = 256
"""The token before the first and after the last byte of a document."""

VOCAB_SIZE = 257
"""Bytes and the separator. A model may have more ids (a multiple of 8, for the GPU and for tp)."""

_STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the text comes from.

    Attributes:
        path: a .jsonl file (one document a line), any other text file (one document), or a folder
            of them, searched to its depth without hidden files. None: the source files of the
            running Python's standard library, which every machine has.
        field: the field of a JSONL line that holds its text.
        prefetch: batches that a thread prepares ahead of the step.
    """

    path: str | None = None
    field: str = "text"
    prefetch: int = 2

    def __post_init__(self):
        if self.prefetch < 1:
            raise ValueError(f"data.prefetch must be at least 1, got {self.prefetch}.")


class Corpus:
    """Documents as bytes, in memory, one behind the other.

    Attributes:
        source: where they come from, in words.
    """

    def __init__(self, texts: Sequence[bytes], source: str):
        self.source = source
        self._bytes = np.frombuffer(b"".join(texts), np.uint8)
        self._offsets = np.concatenate([[0], np.cumsum([len(t) for t in texts], dtype=np.int64)])

    @property
    def num_bytes(self) -> int:
        """Bytes of all documents together."""
        return self._bytes.size

    @property
    def sizes(self) -> Int64[np.ndarray, "D"]:
        """Bytes of each document."""
        return np.diff(self._offsets)

    def __len__(self) -> int:
        return self._offsets.size - 1

    def __getitem__(self, index: SupportsIndex) -> UInt8[np.ndarray, "n"]:
        at = operator.index(index)
        return self._bytes[self._offsets[at] : self._offsets[at + 1]]

    def __repr__(self) -> str:
        return f"{len(self):,} documents, {self.num_bytes / 1e6:.1f} MB, from {self.source}"


def open_corpus(config: DataConfig) -> Corpus:
    """Reads, and checks, all the text that the config names.

    Raises:
        ValueError: if the path does not exist, holds no text, or holds something that is not UTF-8
            text or not JSONL with the field; names the file and the line.
    """
    if config.path is None:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        return Corpus(list(_standard_library()), f"Python {version}'s standard library")
    root = pathlib.Path(config.path)
    if not root.exists():
        raise ValueError(
            f"data.path: {config.path} does not exist; give a .txt or .jsonl file, or a folder of "
            "text files."
        )
    files = list(_walk(root)) if root.is_dir() else [root]
    texts = [text for file in files for text in _read(file, config.field) if text]
    if not texts:
        what = "holds no text files" if root.is_dir() and not files else "is empty"
        raise ValueError(f"data.path: {config.path} {what}; training needs at least one document.")
    return Corpus(texts, config.path)


def streams(
    corpus: Corpus, seq_len: int, seed: int, num_epochs: int | None = None
) -> grain.IterDataset:
    """The corpus in streams of `seq_len` tokens, shuffled each epoch.

    Each stream is a dict of `pairs` `[T, 2]` (a token and its target), `pairs_segment_ids` `[T]`
    (from 1; 0 is padding, in the last streams of the last epoch) and `pairs_positions` `[T]`.

    Args:
        corpus: the documents.
        seq_len: T, tokens per stream.
        seed: of the order of the segments.
        num_epochs: how often all documents come; None: for ever.
    """
    segments = Segments(corpus, seq_len)
    shuffled = grain.MapDataset.source(segments).seed(seed).shuffle().repeat(num_epochs)
    # Documents are views of memory: threads that read ahead would have nothing to wait for.
    in_order = shuffled.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    return grain.experimental.ConcatThenSplitIterDataset(
        in_order, length_struct={"pairs": seq_len}, split_full_length_features=False
    )


class Segments:
    """Each document in parts of `seq_len` tokens and a rest, as pairs of a token and its target.

    Attributes:
        sizes: tokens of each segment.
    """

    def __init__(self, corpus: Corpus, seq_len: int):
        self._corpus, self._seq_len = corpus, seq_len
        # The number of the first segment of each document, and of all.
        parts = -(-(corpus.sizes + 1) // seq_len)
        self._first = np.concatenate([[0], np.cumsum(parts)])
        self.sizes: Int64[np.ndarray, S] = np.full(len(self), seq_len, np.int64)
        self.sizes[self._first[1:] - 1] = corpus.sizes + 1 - (parts - 1) * seq_len

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: SupportsIndex) -> dict[str, Int32[np.ndarray, "t 2"]]:
        number = operator.index(index)
        which = int(np.searchsorted(self._first, number, side="right")) - 1
        document = self._corpus[which]
        begin = (number - int(self._first[which])) * self._seq_len
        end = min(begin + self._seq_len, document.size + 1)
        pairs = np.full((end - begin, 2), SEPARATOR, np.int32)
        before, after = document[max(begin - 1, 0) : end - 1], document[begin:end]
        pairs[pairs.shape[0] - before.size :, 0] = before
        pairs[: after.size, 1] = after
        return {"pairs": pairs}


def _in_documents(segment_ids: Int32[np.ndarray, "B T"]) -> Mask:
    return causal() & documents(segment_ids, padding_id=0)


def make_batches(
    corpus: Corpus,
    *,
    batch_size: int,
    seq_len: int,
    seed: int,
    mask: Callable[[Int32[np.ndarray, "B T"]], Mask] = _in_documents,
    prefetch: int = 2,
) -> grain.DatasetIterator:
    """Batches of packed streams, on the host and in natural order, without end.

    Each is a dict of `tokens`, `targets`, `positions` (int32) and `weights` (float32), all
    `[B, T]`, and `mask`. Weights are 1 but on padding.

    Args:
        corpus: the documents.
        batch_size: B, streams per batch, of all processes together.
        seq_len: T, tokens per stream.
        seed: of the order of the documents.
        mask: the model's mask for streams whose documents have these segment ids
            (`ModelConfig.mask`).
        prefetch: batches prepared ahead by a thread.
    """
    batches = streams(corpus, seq_len, seed).batch(batch_size).map(lambda x: _batch(x, mask))
    ahead = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=prefetch)
    return iter(ahead)


def restore(batches: grain.DatasetIterator, state: dict[str, Any]) -> None:
    """Puts an iterator where `state = batches.get_state()` was taken; state may come from JSON."""
    # JSON has no tuples, and grain compares with them: a list would pass for another state.
    batches.set_state(_tuples(state))


def _batch(packed: dict[str, np.ndarray], mask: Callable) -> dict[str, Any]:
    segment_ids = packed["pairs_segment_ids"]
    return {
        "tokens": np.ascontiguousarray(packed["pairs"][..., 0]),
        "targets": np.ascontiguousarray(packed["pairs"][..., 1]),
        "positions": packed["pairs_positions"],
        "weights": (segment_ids > 0).astype(np.float32),
        "mask": mask(segment_ids),
    }


def _tuples(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _tuples(value) for key, value in state.items()}
    return tuple(map(_tuples, state)) if isinstance(state, list | tuple) else state


def _standard_library() -> Iterator[bytes]:
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for file in _walk(root, _STDLIB_LEFT_OUT):
        if file.suffix == ".py":
            text = file.read_bytes()
            # Python also runs sources in older encodings; those few are left out.
            if text and _fault(text) is None:
                yield text


def _walk(root: pathlib.Path, left_out: set[str] | None = None) -> Iterator[pathlib.Path]:
    """All files below a folder in an order that is the same on every machine; no hidden ones."""
    for folder, subfolders, files in os.walk(root):
        seen = (name for name in subfolders if not name.startswith("."))
        subfolders[:] = sorted(name for name in seen if name not in (left_out or ()))
        yield from (
            pathlib.Path(folder, name) for name in sorted(files) if not name.startswith(".")
        )


def _read(file: pathlib.Path, field: str) -> Iterator[bytes]:
    text = file.read_bytes()
    fault = _fault(text)
    if fault is not None:
        raise ValueError(f"data.path: {file} is not text: {fault}. Training reads UTF-8 text.")
    if file.suffix != ".jsonl":
        yield text
        return
    for number, line in enumerate(text.split(b"\n"), 1):
        if line.strip():
            yield _field(line, field, f"data.path: {file}, line {number}")


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


def _fault(text: bytes) -> str | None:
    """Why these bytes are no text; None if they are."""
    at = text.find(b"\0")
    if at < 0:
        try:
            text.decode()
        except UnicodeDecodeError as error:
            at = error.start
        else:
            return None
    line = text.count(b"\n", 0, at) + 1
    return f"byte 0x{text[at]:02x} at offset {at} (line {line})"
