"""Documents to batches: bytes or tokens, packed one behind the other into streams.

A document of n ids becomes n + 1 tokens with n + 1 targets, each the token that comes next:

    tokens   SEP  b0  b1  …  b(n-1)
    targets  b0   b1  b2  …  END

For bytes, SEP and END are both id 256; for a tokenizer they are its beginning and end of a text.

Documents longer than a stream are cut into segments (`streams.py` packs them), so that a batch is
not all of one document. Every token has its true target, also the last one before a cut. Behind a
cut, positions begin at 0 again, and the batch's mask lets no token see past the beginning of its
segment, still less of its document.

Text is held in memory, and read in pieces; a tokenised folder is read where it is used.
Nothing is random but the seed, so a pipeline's state is a few integers: they are saved with a
checkpoint, and the batches after it are the same ones.

Streams are packed from the sizes of documents alone. Every process does so for the whole global
batch, and so has the same state, which fits any number of processes; a batch knows of each token
its *place* in the corpus, and `ContextParallel.shard_batch` has tokens read at the places that lie
on a process's own devices, and no others.
"""

import array
import copy
import operator
import pathlib
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, SupportsIndex

import grain
import jax
import numpy as np
from jaxtyping import Int32, Int64, Integer

from hcp_jax.parallel.placing import Gathered
from hcp_jax.sequence.mask import Mask, causal, documents
from hcp_jax.train.data import tokens
from hcp_jax.train.data.background import Work, in_background
from hcp_jax.train.data.formats import Piece
from hcp_jax.train.data.streams import Segments, Stream, Streams
from hcp_jax.train.data.text import Texts
from hcp_jax.train.data.tokenizer import Tokenizer
from hcp_jax.train.sections import DataConfig, Packing

SEPARATOR = 256
"""The token before the first and after the last byte of a document."""

VOCAB_SIZE = 257
"""Bytes and the separator. A model may have more ids (a multiple of 8, for the GPU and for tp)."""


class Corpus:
    """Documents one behind the other, as the ids of their tokens.

    A token's *place* says where it and its target are, with nothing else to be looked up:
    `4 * (1 + n) + 2 * first + last`, where n ids of the whole corpus lie before its target, and
    `first` and `last` say that it is the separator, and that its target is the end. 0 is no place.

    Args:
        texts: documents that stay bytes.
        source: where they come from, in words.

    Attributes:
        source: as given.
        report: what was read, and left out, and which tokens frame a document, in lines.
        separator: the id before the first one of every document.
        end: the id that the last one of every document is followed by.
        vocab_size: no id is as great as this.
    """

    def __init__(self, texts: Sequence[bytes], source: str):
        self._fill((Piece(text, True) for text in texts), source)

    def _fill(self, pieces: Iterable[Piece], source: str) -> None:
        self.source = source
        self.report: list[str] = []
        self.separator = self.end = SEPARATOR
        self.vocab_size = VOCAB_SIZE
        self._unit = "bytes"
        held, offsets = bytearray(), array.array("q", [0])
        for text, ends in pieces:
            held += text
            if ends:
                offsets.append(len(held))
        self._ids: np.ndarray | tokens.TokenFile = np.frombuffer(held, np.uint8)
        self._set_offsets(np.frombuffer(offsets, np.int64))

    @classmethod
    def from_pieces(cls, pieces: Iterable[Piece], source: str) -> "Corpus":
        """Make a corpus of documents that stay bytes and come in pieces."""
        corpus = cls.__new__(cls)
        corpus._fill(pieces, source)
        return corpus

    @classmethod
    def from_tokens(cls, tokenised: "tokens.Tokenised", source: str) -> "Corpus":
        """Make a corpus of documents that a tokenizer made tokens of."""
        corpus = cls([], source)
        corpus._ids = tokenised.ids
        corpus._set_offsets(tokenised.offsets)
        corpus.separator, corpus.end = tokenised.meta.bos_id, tokenised.meta.eos_id
        corpus.vocab_size, corpus._unit = tokenised.meta.vocab_size, "tokens"
        corpus.report = tokenised.report
        return corpus

    def _set_offsets(self, offsets: Int64[np.ndarray, "D+1"]) -> None:
        self._offsets = offsets
        self._begins, self._ends = offsets[:-1], offsets[1:]

    def select(self, chosen: Integer[np.ndarray, "d"]) -> "Corpus":
        """Some of the documents, in the order given; no id is read or copied."""
        selected = copy.copy(self)
        selected._begins, selected._ends = self._begins[chosen], self._ends[chosen]
        return selected

    @property
    def num_ids(self) -> int:
        """Bytes, or tokens, of all documents together."""
        return int(self.sizes.sum())

    @property
    def sizes(self) -> Int64[np.ndarray, "D"]:
        """Ids of each document, separators not counted."""
        return self._ends - self._begins

    def fingerprint(self) -> dict[str, int]:
        """What tells other data apart, of which no id need be read: numbers and sizes."""
        return {
            "the number of documents": len(self),
            f"the number of {self._unit} in them": self.num_ids,
            "the checksum of their sizes": zlib.crc32(self._offsets.tobytes()),
            "the vocabulary": self.vocab_size,
        }

    def __len__(self) -> int:
        return self._ends.size

    def __getitem__(self, index: SupportsIndex) -> Integer[np.ndarray, "n"]:
        at = operator.index(index)
        if not 0 <= at < len(self):
            raise IndexError(f"there is no document {at} of {len(self)}")
        return self._ids[self._begins[at] : self._ends[at]]

    def places(self, index: SupportsIndex, begin: int, end: int) -> Int64[np.ndarray, "n"]:
        """Return the places of tokens `begin` to `end` of a document; see `places_of`."""
        return self.places_of(*np.array([[operator.index(index)], [begin], [end]]))

    def places_of(
        self,
        documents: Int64[np.ndarray, "p"],
        begins: Int64[np.ndarray, "p"],
        ends: Int64[np.ndarray, "p"],
    ) -> Int64[np.ndarray, "n"]:
        """Return the places of parts of documents, end to end.

        Args:
            documents: the number of the document that each part is of.
            begins: the first token of each part; token 0 of a document is its separator.
            ends: the token behind the last one of each part.
        """
        sizes = ends - begins
        stops = np.cumsum(sizes)
        within = np.arange(stops[-1] if stops.size else 0) - np.repeat(stops - sizes, sizes)
        places = 4 * (1 + within + np.repeat(self._begins[documents] + begins, sizes))
        places[(stops - sizes)[begins == 0]] += 2
        places[(stops - 1)[ends == (self._ends - self._begins)[documents] + 1]] += 1
        return places

    def tokens_at(self, places: Int64[np.ndarray, "..."]) -> Int32[np.ndarray, "..."]:
        """The tokens at these places, and 0 where there is none; no other id is read."""
        return self._read(places // 4 - 2, places & 2 > 0, self.separator, places)

    def targets_at(self, places: Int64[np.ndarray, "..."]) -> Int32[np.ndarray, "..."]:
        """The tokens that come next, and 0 where there is no place; no other id is read."""
        return self._read(places // 4 - 1, places & 1 > 0, self.end, places)

    def documents_at(self, places: Int64[np.ndarray, "..."]) -> Int64[np.ndarray, "..."]:
        """The numbers of the documents that these places, of which none is 0, are in.

        They count all documents of the text, also where this is a selection of them.
        """
        # Behind the last token's target, the end, the next document begins.
        within = places // 4 - 1 - ((places & 1) > (places & 2) // 2)
        return np.searchsorted(self._offsets, within, side="right") - 1

    def sizes_at(self, places: Int64[np.ndarray, "..."]) -> Int64[np.ndarray, "..."]:
        """Return the sizes of the documents at these places; see `documents_at`."""
        return np.diff(self._offsets)[self.documents_at(places)]

    def _read(
        self, index: np.ndarray, special: np.ndarray, token: int, places: np.ndarray
    ) -> Int32[np.ndarray, "..."]:
        result = np.where(special, np.int32(token), np.int32(0))
        ordinary = (places > 0) & ~special
        result[ordinary] = self._ids[index[ordinary]]
        return result

    def __repr__(self) -> str:
        unit = "MB" if self._unit == "bytes" else "M tokens"
        return f"{len(self):,} documents, {self.num_ids / 1e6:.1f} {unit}, from {self.source}"


def open_corpus(config: DataConfig, vocab_size: int | None = None) -> Corpus:
    """Open, and check, all that the config names: text is read, a tokenised folder is opened.

    Ctrl-C ends it at any time: the work is done in a thread.

    Args:
        config: where it is.
        vocab_size: how many ids the model knows; None if there is no model yet.

    Raises:
        ValueError: if the path does not exist, holds no text, or holds something that is not UTF-8
            text or has no text in the field (names the file and the line); if a tokenised folder is
            damaged or of another tokenizer; if the model knows fewer ids than there are.
    """
    corpus = in_background(lambda work: _open(config, work))
    if vocab_size is not None and corpus.vocab_size > vocab_size:
        ids = "bytes and the separator are" if corpus._unit == "bytes" else "the tokenizer has"
        raise ValueError(
            f"model.vocab_size={vocab_size} is too small: {ids} {corpus.vocab_size} ids."
        )
    return corpus


def _open(config: DataConfig, work: Work) -> Corpus:
    path = None if config.path is None else pathlib.Path(config.path)
    if path is not None and tokens.is_tokenised(path):
        return Corpus.from_tokens(tokens.read(path, config.tokenizer), str(path))
    tokenizer = None
    if config.tokenizer is not None:
        # Made first: what is wrong with it is told before a large text is read.
        tokenizer = Tokenizer(pathlib.Path(config.tokenizer), special_tokens=config.special_tokens)
    texts = Texts(path, config.field, config.bad_lines, config.skip)
    if tokenizer is None:
        corpus = Corpus.from_pieces(work.through(texts.pieces()), texts.source)
    else:
        made = tokens.tokenise(work.through(texts.documents()), tokenizer)
        corpus = Corpus.from_tokens(made, texts.source)
    corpus.report = [*texts.report(), *corpus.report]
    return corpus


def held_out_batches(
    corpus: Corpus,
    *,
    batch_size: int,
    seq_len: int,
    tokens: int | None,
    mask: Callable[[Int32[np.ndarray, "B T"]], Mask],
) -> list[dict[str, Any]]:
    """Batches to evaluate on, each token once: the same ones in the same order, always.

    Args:
        corpus: the documents.
        batch_size: B; the last batch is filled up with rows that count nothing.
        seq_len: T.
        tokens: how many, about; segments are taken from the whole corpus evenly. None: all of them.
        mask: as in `make_batches`, whose batches these are like.
    """
    segments = Segments(corpus, seq_len)
    order = evenly(len(segments))
    if tokens is not None:
        order = order[: 1 + np.searchsorted(np.cumsum(segments.sizes[order]), tokens)]
    rows = list(Streams(segments, None, 1, only=np.sort(order)))
    rows += [jax.tree.map(np.zeros_like, rows[0])] * (-len(rows) % batch_size)
    batches = (rows[i : i + batch_size] for i in range(0, len(rows), batch_size))
    return [_batch(corpus, jax.tree.map(lambda *x: np.stack(x), *batch), mask) for batch in batches]


def evenly(number: int) -> Int64[np.ndarray, "n"]:
    """0 … number - 1 in an order of which every beginning is spread over the whole evenly.

    Multiples of the golden ratio modulo 1 do that (Knuth, The Art of Computer Programming, 6.4).

    >>> evenly(10)[:3].tolist()
    [0, 5, 2]
    """
    golden = np.uint64(0x9E3779B97F4A7C15)  # 2⁶⁴ divided by the golden ratio
    return np.argsort(np.arange(number, dtype=np.uint64) * golden, kind="stable")


def describe_packing(corpus: Corpus, *, seq_len: int, seed: int, packing: Packing) -> str:
    """Return how full streams are and how many documents stay whole in them, in words.

    Args:
        corpus: the documents.
        seq_len: T, tokens per stream.
        seed: as in `make_batches`.
        packing: likewise.
    """
    return Streams(Segments(corpus, seq_len), seed, packing=packing).describe()


def packing_metrics(corpus: Corpus, batch: Mapping[str, Any]) -> dict[str, float]:
    """Return how a batch of `make_batches` is packed.

    Args:
        corpus: the documents.
        batch: before it is put on devices.

    Returns:
        "fill", the share of the places that hold a token, and "whole_documents": of the documents
        that would fit a stream, the share that is whole; a document that is cut counts in the
        batch where it begins. 1 if there is none.
    """
    places, positions = batch["tokens"].places, batch["positions"]
    used = places > 0
    begins = used & (positions == 0)
    ends = used & np.pad((positions == 0)[:, 1:], ((0, 0), (0, 1)), constant_values=True)
    first, last = places[begins], places[ends]
    from_start = first & 2 > 0
    fits = corpus.sizes_at(first[from_start]) < positions.shape[1]
    whole = last[from_start] & 1 > 0
    share = float(whole[fits].mean()) if fits.any() else 1.0
    return {"fill": float(used.mean()), "whole_documents": share}


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
    place: Callable[[dict[str, Any]], Any] = lambda batch: batch,
    packing: Packing = "whole",
) -> grain.DatasetIterator:
    """Batches of packed streams, in natural order, without end.

    Each is a dict of `tokens` and `targets` (`Gathered`: not read yet), `positions` (int32) and
    `weights` (float32), all `[B, T]`, and `mask`. Weights are 1 but on padding.

    Args:
        corpus: the documents.
        batch_size: B, streams per batch, of all processes together.
        seq_len: T, tokens per stream.
        seed: of the order of the documents.
        mask: the model's mask for streams whose documents have these segment ids
            (`ModelConfig.mask`).
        prefetch: batches prepared ahead by a thread.
        place: what that thread does with each batch, such as `ContextParallel.shard_batch`.
        packing: whether documents stay whole or every place is filled; see `DataConfig`.
    """

    def prepare(rows: Stream) -> Any:
        return place(_batch(corpus, rows, mask))

    streams = Streams(Segments(corpus, seq_len), seed, packing=packing)
    batches = streams.batch(batch_size).map(prepare)
    ahead = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=prefetch)
    return iter(ahead)


def _batch(corpus: Corpus, rows: Stream, mask: Callable) -> dict[str, Any]:
    return {
        "tokens": Gathered(rows.places, corpus.tokens_at),
        "targets": Gathered(rows.places, corpus.targets_at),
        "positions": rows.positions,
        "weights": (rows.segment_ids > 0).astype(np.float32),
        "mask": mask(rows.segment_ids),
    }
