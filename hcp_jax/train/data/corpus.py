"""Read the documents of a run as token ids: bytes, or tokens of a tokenizer.

A document of n ids becomes n + 1 tokens with n + 1 targets, each the token that comes next:

    tokens   SEP  b0  b1  …  b(n-1)
    targets  b0   b1  b2  …  END

For bytes, SEP and END are both id 256; for a tokenizer they are the tokens that it begins and ends
a text with.

Documents longer than a stream are cut into segments (`streams.py`), so that a batch holds more than
one document. Every token has its true target, also the last one before a cut. After a cut,
positions begin at 0 again, and the batch's mask lets no token see past the beginning of its
segment, and so of its document.

Text is read in pieces and held in memory; the tokens of a tokenised folder are read when they are
needed.
"""

import array
import copy
import operator
import pathlib
import zlib
from collections.abc import Iterable, Sequence
from typing import SupportsIndex

import numpy as np
from jaxtyping import Bool, Int32, Int64, Integer

from hcp_jax.train.data import tokens
from hcp_jax.train.data.background import Work, in_background
from hcp_jax.train.data.formats import Piece
from hcp_jax.train.data.text import Texts
from hcp_jax.train.data.tokenizer import Tokenizer
from hcp_jax.train.sections import DataConfig

SEPARATOR = 256
"""The token before the first and after the last byte of a document."""

VOCAB_SIZE = 257
"""Bytes and the separator. A model may have more ids (a multiple of 8, for the GPU and for tp)."""


class Corpus:
    """Documents end to end, as the ids of their tokens.

    A token's *reference* is a number from which the token and its target can be read:
    `4 * (1 + n) + 2 * first + last`, where n is the number of ids of the whole corpus before the
    target, `first` is 1 if the token is the separator, and `last` is 1 if the target is the end.
    Reference 0 is padding.

    Args:
        texts: documents that stay bytes.
        source: a description of where they come from.

    Attributes:
        source: as given.
        report: lines that say what was read, what was left out, and which tokens begin and end a
            document.
        separator: the id before the first one of every document.
        end: the id after the last one of every document.
        vocab_size: all ids are below this.
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
        """Return a corpus of documents that stay bytes and come in pieces."""
        corpus = cls.__new__(cls)
        corpus._fill(pieces, source)
        return corpus

    @classmethod
    def from_tokens(cls, tokenised: "tokens.Tokenised", source: str) -> "Corpus":
        """Return a corpus of tokenised documents."""
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
        """Return the chosen documents, in this order; no id is read or copied."""
        selected = copy.copy(self)
        selected._begins, selected._ends = self._begins[chosen], self._ends[chosen]
        return selected

    @property
    def num_ids(self) -> int:
        """Number of bytes, or tokens, of all documents together."""
        return int(self.sizes.sum())

    @property
    def sizes(self) -> Int64[np.ndarray, "D"]:
        """Number of ids of each document, without separators."""
        return self._ends - self._begins

    def fingerprint(self) -> dict[str, int]:
        """Return numbers that differ for other data; no id is read for them."""
        return {
            "the number of documents": len(self),
            f"the number of {self._unit} in them": self.num_ids,
            "the checksum of their sizes": zlib.crc32(self._offsets.tobytes()),
            "the vocabulary": self.vocab_size,
        }

    def __len__(self) -> int:
        return self._ends.size

    def __getitem__(self, index: SupportsIndex) -> Integer[np.ndarray, "n"]:
        number = operator.index(index)
        if not 0 <= number < len(self):
            raise IndexError(f"there is no document {number} of {len(self)}")
        return self._ids[self._begins[number] : self._ends[number]]

    def refs(self, index: SupportsIndex, begin: int, end: int) -> Int64[np.ndarray, "n"]:
        """Return the references of tokens `begin` to `end - 1` of a document."""
        return self.refs_of_parts(*np.array([[operator.index(index)], [begin], [end]]))

    def refs_of_parts(
        self,
        documents: Int64[np.ndarray, "p"],
        begins: Int64[np.ndarray, "p"],
        ends: Int64[np.ndarray, "p"],
    ) -> Int64[np.ndarray, "n"]:
        """Return the references of the tokens of parts of documents, end to end.

        Args:
            documents: the number of each part's document.
            begins: the first token of each part; token 0 of a document is its separator.
            ends: the token after the last one of each part.
        """
        sizes = ends - begins
        stops = np.cumsum(sizes)
        within = np.arange(stops[-1] if stops.size else 0) - np.repeat(stops - sizes, sizes)
        refs = 4 * (1 + within + np.repeat(self._begins[documents] + begins, sizes))
        refs[(stops - sizes)[begins == 0]] += 2
        refs[(stops - 1)[ends == (self._ends - self._begins)[documents] + 1]] += 1
        return refs

    def tokens_at(self, refs: Int64[np.ndarray, "..."]) -> Int32[np.ndarray, "..."]:
        """Return the tokens at these references, 0 for padding; no other id is read."""
        return self._read(refs // 4 - 2, refs & 2 > 0, self.separator, refs)

    def targets_at(self, refs: Int64[np.ndarray, "..."]) -> Int32[np.ndarray, "..."]:
        """Return the targets at these references, 0 for padding; no other id is read."""
        return self._read(refs // 4 - 1, refs & 1 > 0, self.end, refs)

    def further(self, refs: Int64[np.ndarray, "..."], places: int) -> Int64[np.ndarray, "..."]:
        """Return the references `places` tokens further on in the same document, 0 past its end.

        Where a document is cut, they go on behind the cut, as targets do.

        Args:
            refs: references; 0 for padding.
            places: number of tokens, 1 or more.

        >>> corpus = Corpus([b"abcd", b"xy"], "two texts")
        >>> refs = corpus.refs(0, 0, 5)
        >>> corpus.targets_at(corpus.further(refs, 2)).tolist()
        [99, 100, 256, 0, 0]
        """
        # The target of a last token is the end, which is no id: only there may the index be that
        # of the next document's first id.
        index = refs // 4 - 1
        inside = (refs > 0) & (refs & 1 == 0)
        ends = self._offsets[
            np.searchsorted(self._offsets, np.where(inside, index, -1), side="right")
        ]
        left = np.where(inside, ends - index, 0)
        return np.where(left >= places, 4 * (1 + index + places) + (left == places), 0)

    def documents_at(self, refs: Int64[np.ndarray, "..."]) -> Int64[np.ndarray, "..."]:
        """Return the numbers of the documents of these references; none may be padding.

        The numbers count all documents of the text, even if this corpus is a selection of them.
        """
        # After the last token's target, which is the end, the next document begins.
        within = refs // 4 - 1 - ((refs & 1) > (refs & 2) // 2)
        return np.searchsorted(self._offsets, within, side="right") - 1

    def sizes_at(self, refs: Int64[np.ndarray, "..."]) -> Int64[np.ndarray, "..."]:
        """Return the sizes of the documents of these references; see `documents_at`."""
        return np.diff(self._offsets)[self.documents_at(refs)]

    def _read(
        self,
        index: Int64[np.ndarray, "..."],
        special: Bool[np.ndarray, "..."],
        token: int,
        refs: Int64[np.ndarray, "..."],
    ) -> Int32[np.ndarray, "..."]:
        result = np.where(special, np.int32(token), np.int32(0))
        ordinary = (refs > 0) & ~special
        result[ordinary] = self._ids[index[ordinary]]
        return result

    def __repr__(self) -> str:
        unit = "MB" if self._unit == "bytes" else "M tokens"
        return f"{len(self):,} documents, {self.num_ids / 1e6:.1f} {unit}, from {self.source}"


def open_corpus(config: DataConfig, vocab_size: int | None = None) -> Corpus:
    """Read the text, or open the tokenised folder, that the config names, and check it.

    Ctrl-C ends it at any time, because the work is done in a thread.

    Args:
        config: where the text is.
        vocab_size: the model's number of ids; None if there is no model yet.

    Raises:
        ValueError: if the path does not exist or holds no text; if a file is not UTF-8 text or a
            record has no text in the field (names the file and the line); if a tokenised folder is
            damaged or was made with another tokenizer; if the model has fewer ids than the text.
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
        # Opened first, so that its errors come before a large text is read.
        tokenizer = Tokenizer(pathlib.Path(config.tokenizer), special_tokens=config.special_tokens)
    texts = Texts(path, config.field, config.bad_lines, config.skip)
    if tokenizer is None:
        corpus = Corpus.from_pieces(work.through(texts.pieces()), texts.source)
    else:
        made = tokens.tokenise(work.through(texts.documents()), tokenizer)
        corpus = Corpus.from_tokens(made, texts.source)
    corpus.report = [*texts.report(), *corpus.report]
    return corpus
