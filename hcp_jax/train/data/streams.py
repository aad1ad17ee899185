"""Segments packed into streams, from their sizes alone.

Documents are cut into segments of `seq_len` tokens and a rest; a document that fits a stream is one
segment. Segments are shuffled anew each epoch and packed window by window (`packing.py`). A stream
is made when it is asked for: of a window, only the numbers of its segments are held.
"""

import operator
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex

import grain
import numpy as np
from jaxtyping import Bool, Int32, Int64

from hcp_jax.train.data.packing import Window, num_windows, pack_dense, pack_whole
from hcp_jax.train.sections import Packing

if TYPE_CHECKING:
    from hcp_jax.train.data import Corpus


_COUNTED = 50_000  # segments that are packed to tell how full streams are

_NONE_LEFT = np.zeros((0, 2), np.int64)


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

    @property
    def fits(self) -> Bool[np.ndarray, "S"]:
        """Whether each segment is a whole document."""
        return np.repeat(np.diff(self._first) == 1, np.diff(self._first))

    def document(self, index: SupportsIndex) -> int:
        """Return the number of the document that a segment is of."""
        return int(np.searchsorted(self._first, operator.index(index), side="right")) - 1

    def places(
        self, index: SupportsIndex, begin: int = 0, end: int | None = None
    ) -> Int64[np.ndarray, "t"]:
        """Return the places of tokens `begin` to `end` of a segment; see `Corpus`."""
        number = operator.index(index)
        size = int(self.sizes[number])
        return self.places_of(np.array([[number, begin, size if end is None else end]]))

    def places_of(self, parts: Int64[np.ndarray, "p 3"]) -> Int64[np.ndarray, "t"]:
        """Return the places of the tokens of parts (segment, begin, end), end to end."""
        numbers, begins, ends = parts.T
        which = np.searchsorted(self._first, numbers, side="right") - 1
        firsts = (numbers - self._first[which]) * self.seq_len
        return self._corpus.places_of(which, firsts + begins, firsts + ends)


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
        packing: "whole" keeps documents whole that fit a stream, "dense" leaves no padding.
    """

    def __init__(
        self,
        segments: Segments,
        seed: int | None,
        num_epochs: int | None = None,
        only: Int64[np.ndarray, "n"] | None = None,
        packing: Packing = "whole",
    ):
        super().__init__()
        self.segments, self.seed, self.num_epochs = segments, seed, num_epochs
        self.packing = packing
        self._numbers = np.arange(len(segments)) if only is None else only
        sizes = segments.sizes[self._numbers]
        tokens = int(sizes.sum())
        if num_epochs is None and 0 < tokens < segments.seq_len:
            # An epoch must fill a stream, or what is left over would be packed again and again.
            self._numbers = np.tile(self._numbers, -(-segments.seq_len // tokens))
            sizes = segments.sizes[self._numbers]
        self._windows = num_windows(sizes, segments.seq_len) if packing == "whole" else 1
        self._may_cut = ~segments.fits
        self._order: tuple[int, np.ndarray] | None = None

    def __iter__(self) -> "_Iterator":
        return _Iterator(self)

    def __len__(self) -> int:
        """Return the number of segments in an epoch."""
        return self._numbers.size

    def order(self, epoch: int) -> Int64[np.ndarray, "S"]:
        """Return the numbers of the segments, in the order of an epoch."""
        if self.seed is None:
            return self._numbers
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, shuffled(self._numbers, self.seed, epoch)
        return self._order[1]

    def window(self, epoch: int, number: int, left_over: Int64[np.ndarray, "m 2"]) -> Window:
        """Pack a window of an epoch.

        Args:
            epoch: from 0.
            number: of the window in the epoch.
            left_over: of the window before.
        """
        order, sizes, count = self.order(epoch), self.segments.sizes, self._windows
        borders = np.arange(count + 1) * order.size // count
        numbers = order[borders[number] : borders[number + 1]]
        last = number + 1 == count and epoch + 1 == self.num_epochs
        if self.packing == "dense":
            return pack_dense(numbers, sizes, self.segments.seq_len, left_over, last)
        # (seed, epoch, 0) would draw what the order was drawn with.
        rng = None if self.seed is None else np.random.default_rng((self.seed, epoch, 1 + number))
        return pack_whole(
            numbers,
            sizes,
            self.segments.seq_len,
            left_over,
            last,
            may_cut=self._may_cut,
            rng=rng,
        )

    def next_window(self, epoch: int, number: int) -> tuple[int, int] | None:
        """Return the epoch and number of the window that follows; None if none does."""
        if number + 1 < self._windows:
            return epoch, number + 1
        return None if epoch + 1 == self.num_epochs else (epoch + 1, 0)

    def describe(self) -> str:
        """Return how full the streams are, and how many documents stay whole, in words.

        It counts the first windows of the first epoch, at least `_COUNTED` segments.
        """
        counted = streams = tokens = fitting = whole = 0
        fits, sizes = ~self._may_cut, self.segments.sizes
        for packed in self._first_windows():
            numbers, begins, ends = packed.parts.T
            counted, streams = counted + len(numbers), streams + len(packed)
            tokens += int((ends - begins).sum())
            # A document that was cut counts where it begins.
            begin_here = fits[numbers] & (begins == 0)
            fitting += int(begin_here.sum())
            whole += int((begin_here & (ends == sizes[numbers])).sum())
            if counted >= _COUNTED:
                break
        share = f"{whole / fitting:.1%} of the documents" if fitting else "no document"
        fill = tokens / max(1, streams * self.segments.seq_len)
        return (
            f"packing {self.packing!r}: {share} that fit{'' if fitting else 's'} "
            f"{self.segments.seq_len:,} tokens, whole; {fill:.1%} of the places hold a token"
        )

    def _first_windows(self) -> Iterator[Window]:
        """Yield the windows of the first epoch, and those after it until there is a stream."""
        at: tuple[int, int] | None = (0, 0)
        left_over, streams = _NONE_LEFT, 0
        while at is not None and (at[0] == 0 or streams == 0):
            packed = self.window(*at, left_over)
            yield packed
            left_over, streams, at = packed.left_over, streams + len(packed), self.next_window(*at)


def shuffled(numbers: Int64[np.ndarray, "n"], seed: int, epoch: int) -> Int64[np.ndarray, "n"]:
    """Return the order of an epoch, whatever is made of the segments."""
    return np.random.default_rng((seed, epoch)).permutation(numbers)


def make_stream(segments: Segments, parts: Int64[np.ndarray, "p 3"]) -> Stream:
    """Return the stream of these parts, padded at its end."""
    sizes = parts[:, 2] - parts[:, 1]
    used = int(sizes.sum())
    places, ids, positions = np.zeros((3, segments.seq_len), np.int64)
    places[:used] = segments.places_of(parts)
    ids[:used] = np.repeat(np.arange(1, len(parts) + 1), sizes)
    positions[:used] = np.arange(used) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return Stream(places, ids.astype(np.int32), positions.astype(np.int32))


class _Iterator(grain.DatasetIterator[Stream]):
    """Its state is the epoch, the window, the place in it, and what was left over before it."""

    def __init__(self, streams: Streams):
        super().__init__()
        self._streams = streams
        self._begin(0, 0, _NONE_LEFT)

    def _begin(self, epoch: int, number: int, left_over: np.ndarray) -> None:
        self._epoch, self._number, self._next = epoch, number, 0
        self._left_over = left_over.tolist()
        self._window = self._streams.window(epoch, number, left_over)

    def __next__(self) -> Stream:
        while self._next >= len(self._window):
            following = self._streams.next_window(self._epoch, self._number)
            if following is None:
                raise StopIteration
            self._begin(*following, self._window.left_over)
        parts = self._window.stream(self._next)
        self._next += 1
        return make_stream(self._streams.segments, parts)

    def get_state(self) -> dict[str, Any]:
        return {
            **_identity(self._streams),
            "epoch": self._epoch,
            "window_in_epoch": self._number,
            "next": self._next,
            "left_over": self._left_over,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        # Checkpoints of before there was a choice are of dense streams, an epoch in one window.
        state = {"packing": "dense", "window_in_epoch": 0, **state}
        require_same_data(state, _identity(self._streams))
        left_over = np.array(state["left_over"], np.int64).reshape(-1, 2)
        self._begin(state["epoch"], state["window_in_epoch"], left_over)
        self._next = state["next"]


def require_same_data(state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuse a place in an order of documents that is not this run's.

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
                "seq_len, seed, data.packing and parallel.dynamic.enabled, which make its order of "
                f"documents{_hint(name, state)}."
            )


def _hint(name: str, state: Mapping[str, Any]) -> str:
    if name != "packing":
        return ""
    return f"; --data.packing {state.get(name)} goes on as it was packed before"


def _identity(streams: Streams) -> dict[str, Any]:
    """Return what the order of streams depends on, so that no other's place passes for it."""
    return {
        "segments": len(streams),
        "tokens": int(streams.segments.sizes.sum()),
        "seq_len": streams.segments.seq_len,
        "seed": streams.seed,
        "packing": streams.packing,
    }
