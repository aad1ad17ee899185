"""Segments packed into streams, from their sizes alone.

Documents are cut into segments of `seq_len` tokens and a rest. Whole segments are streams; rests
are laid end to end, in the order of the epoch, and cut every `seq_len` tokens:

    order     A₁ b A₂ c D₁ d …      capitals are whole
    streams   A₁ | A₂ | bc | D₁ …   "bc" once its last token is there; the end of c begins the next

What is left over at the end of an epoch begins the rests of the next one, so that only the last
stream of a run that ends has padding. A stream is made when it is asked for: an epoch is held as a
few arrays of numbers, and its place in a checkpoint is two numbers and what was left over.
"""

import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex

import grain
import numpy as np
from jaxtyping import Int32, Int64

if TYPE_CHECKING:
    from hcp_jax.train.data import Corpus


class Segments:
    """Each document in parts of `seq_len` tokens and a rest.

    Attributes:
        seq_len: tokens of a whole segment.
        sizes: tokens of each segment.
    """

    def __init__(self, corpus: "Corpus", seq_len: int):
        self._corpus, self.seq_len = corpus, seq_len
        # The number of the first segment of each document, and of all.
        parts = -(-(corpus.sizes + 1) // seq_len)
        self._first = np.concatenate([[0], np.cumsum(parts)])
        self.sizes = np.full(len(self), seq_len, np.int64)
        self.sizes[self._first[1:] - 1] = corpus.sizes + 1 - (parts - 1) * seq_len

    def __len__(self) -> int:
        return int(self._first[-1])

    def document(self, index: SupportsIndex) -> int:
        """The number of the document that a segment is of."""
        return int(np.searchsorted(self._first, operator.index(index), side="right")) - 1

    def places(
        self, index: SupportsIndex, begin: int = 0, end: int | None = None
    ) -> Int64[np.ndarray, "t"]:
        """The places of tokens `begin` to `end` of a segment; see `Corpus`."""
        number, which = operator.index(index), self.document(index)
        first = (number - int(self._first[which])) * self.seq_len
        size = int(self.sizes[number])
        return self._corpus.places(which, first + begin, first + (size if end is None else end))


class Stream(NamedTuple):
    """A packed stream; of its ids, none has been read.

    Attributes:
        places: of its tokens; 0 for padding. See `Corpus`.
        segment_ids: from 1; 0 for padding.
        positions: of each token in its part of a segment.
    """

    places: Int64[np.ndarray, "T"]
    segment_ids: Int32[np.ndarray, "T"]
    positions: Int32[np.ndarray, "T"]


class Streams(grain.IterDataset[Stream]):
    """Streams of `segments.seq_len` tokens, the segments shuffled anew each epoch.

    Args:
        segments: of the corpus.
        seed: of the order; None for the order that they have.
        num_epochs: how often all segments come; None: for ever.
        only: numbers of the segments that are meant; None for all.
    """

    def __init__(
        self,
        segments: Segments,
        seed: int | None,
        num_epochs: int | None = None,
        only: Int64[np.ndarray, "n"] | None = None,
    ):
        super().__init__()
        self.segments, self.seed, self.num_epochs = segments, seed, num_epochs
        self._numbers = np.arange(len(segments)) if only is None else only

    def __iter__(self) -> "_Iterator":
        return _Iterator(self)

    def order(self, epoch: int) -> Int64[np.ndarray, "S"]:
        """The numbers of the segments, in the order of an epoch."""
        if self.seed is None:
            return self._numbers
        return shuffled(self._numbers, self.seed, epoch)


def shuffled(numbers: Int64[np.ndarray, "n"], seed: int, epoch: int) -> Int64[np.ndarray, "n"]:
    """The order of an epoch, whatever is made of the segments."""
    return np.random.default_rng((seed, epoch)).permutation(numbers)


class _Epoch:
    """The streams that end in one epoch."""

    def __init__(self, segments: Segments, order: np.ndarray, left_over: np.ndarray):
        """`left_over` is `[n, 2]`: the segments of the epochs before, and where they go on."""
        self._segments, length = segments, segments.seq_len
        whole = segments.sizes[order] == length
        self._whole, at_whole, at_rest = order[whole], np.flatnonzero(whole), np.flatnonzero(~whole)
        self._rests = np.concatenate([left_over[:, 0], order[at_rest]])
        self._begins = np.concatenate([left_over[:, 1], np.zeros_like(at_rest)])
        # Where each ends, in the row of all.
        self._ends = np.cumsum(segments.sizes[self._rests] - self._begins)
        self._total = int(self._ends[-1]) if self._ends.size else 0
        self._cut = self._total // length
        # A stream stands where its last token does, among the segments of the epoch.
        last = np.searchsorted(self._ends, length * np.arange(1, self._cut + 1))
        at = np.concatenate([np.full(len(left_over), -1), at_rest])[last]
        self._which = np.argsort(np.concatenate([at_whole, at]), kind="stable")

    def __len__(self) -> int:
        return self._which.size

    def __getitem__(self, index: int) -> Stream:
        which = int(self._which[index])
        if which < self._whole.size:
            return self._stream([(int(self._whole[which]), 0, self._segments.seq_len)])
        first = (which - self._whole.size) * self._segments.seq_len
        return self._stream(self._parts(first, first + self._segments.seq_len))

    def left_over(self) -> Int64[np.ndarray, "n 2"]:
        """What fills no stream any more: segments, and where they go on."""
        parts = self._parts(self._cut * self._segments.seq_len, self._total)
        return np.array([part[:2] for part in parts], np.int64).reshape(-1, 2)

    def last_stream(self) -> Stream | None:
        """What is left over as a stream of its own, padded; None if nothing is."""
        parts = self._parts(self._cut * self._segments.seq_len, self._total)
        return self._stream(parts) if parts else None

    def _parts(self, begin: int, end: int) -> list[tuple[int, int, int]]:
        """(segment, from, to) of tokens `begin` to `end` of the row of rests."""
        first, last = np.searchsorted(self._ends, [begin, end - 1], side="right")
        parts = []
        for i in range(int(first), int(last) + 1 if end > begin else 0):
            number, offset = int(self._rests[i]), int(self._ends[i])
            size = int(self._segments.sizes[number])
            start = offset - (size - int(self._begins[i]))
            skipped, short = max(begin - start, 0), max(offset - end, 0)
            parts.append((number, int(self._begins[i]) + skipped, size - short))
        return parts

    def _stream(self, parts: list[tuple[int, int, int]]) -> Stream:
        sizes = [end - begin for _, begin, end in parts]
        padding = self._segments.seq_len - sum(sizes)
        places = [self._segments.places(*part) for part in parts]
        counts = np.arange(1, len(parts) + 1)
        ids = np.repeat(np.append(counts, 0), [*sizes, padding])
        positions = [np.arange(size) for size in [*sizes, 0]]
        return Stream(
            np.pad(np.concatenate(places), (0, padding)),
            ids.astype(np.int32),
            np.pad(np.concatenate(positions), (0, padding)).astype(np.int32),
        )


class _Iterator(grain.DatasetIterator[Stream]):
    """Its state is the epoch, the place in it, and what was left over before it."""

    def __init__(self, streams: Streams):
        super().__init__()
        self._streams = streams
        self._begin(0, np.zeros((0, 2), np.int64))

    def _begin(self, epoch: int, left_over: np.ndarray) -> None:
        self._epoch, self._next, self._before = epoch, 0, left_over
        streams = self._streams
        self._packed = _Epoch(streams.segments, streams.order(epoch), left_over)

    def __next__(self) -> Stream:
        while self._next >= len(self._packed):
            if self._epoch + 1 == self._streams.num_epochs:
                last = self._packed.last_stream() if self._next == len(self._packed) else None
                if last is None:
                    raise StopIteration
                self._next += 1
                return last
            self._begin(self._epoch + 1, self._packed.left_over())
        stream = self._packed[self._next]
        self._next += 1
        return stream

    def get_state(self) -> dict[str, Any]:
        return {
            **_identity(self._streams),
            "epoch": self._epoch,
            "next": self._next,
            "left_over": self._before.tolist(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        require_same_data(state, _identity(self._streams))
        self._begin(state["epoch"], np.array(state["left_over"], np.int64).reshape(-1, 2))
        self._next = state["next"]


def require_same_data(state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuses a place in an order of documents that is not this run's.

    Args:
        state: from a checkpoint; has what its order depended on, and more.
        own: what this run's order depends on, by the same names.

    Raises:
        ValueError: if something differs, or was not kept; says what.
    """
    for name, ours in own.items():
        if state.get(name) != ours:
            raise ValueError(
                f"the checkpoint's data are not this run's: {name} was "
                f"{state.get(name, 'not told')} and is {ours}. A run goes on with its own data, "
                "seq_len, seed and parallel.dynamic.enabled, which make its order of documents."
            )


def _identity(streams: Streams) -> dict[str, Any]:
    """What the order of streams depends on, so that no other's place passes for it."""
    sizes = streams.segments.sizes
    return {
        "segments": len(sizes),
        "tokens": int(sizes.sum()),
        "seq_len": streams.segments.seq_len,
        "seed": streams.seed,
    }
