"""Pack segments of documents into streams; only the sizes of documents are needed.

Documents are cut into segments of `seq_len` tokens and a rest; a document that fits a stream is one
segment. Segments are shuffled anew each epoch and packed window by window (`packing.py`). A stream
is built when it is asked for; of a window, only the numbers of its segments are kept.
"""

import operator
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, SupportsIndex

import grain
import numpy as np
from jaxtyping import Bool, Int32, Int64

from hcp_jax.train.data.corpus import Corpus
from hcp_jax.train.data.packing import Window, num_windows, pack_dense, pack_whole
from hcp_jax.train.sections import Packing

_COUNTED = 50_000  # segments that are packed to measure how full streams are

_NONE_LEFT = np.zeros((0, 2), np.int64)


class Segments:
    """All documents of a corpus, each cut into parts of `seq_len` tokens and a rest.

    Attributes:
        seq_len: tokens of a whole segment.
        sizes: tokens of each segment.
    """

    def __init__(self, corpus: Corpus, seq_len: int):
        self._corpus, self.seq_len = corpus, seq_len
        # The number of the first segment of each document, and after the last one of all segments.
        parts = -(-(corpus.sizes + 1) // seq_len)
        self._first = np.concatenate([[0], np.cumsum(parts)])
        self.sizes = np.full(len(self), seq_len, np.int64)
        self.sizes[self._first[1:] - 1] = corpus.sizes + 1 - (parts - 1) * seq_len

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def fits(self) -> Bool[np.ndarray, "S"]:
        """True for each segment that is a whole document."""
        return np.repeat(np.diff(self._first) == 1, np.diff(self._first))

    def document(self, index: SupportsIndex) -> int:
        """Return the number of a segment's document."""
        return int(np.searchsorted(self._first, operator.index(index), side="right")) - 1

    def refs(
        self, index: SupportsIndex, begin: int = 0, end: int | None = None
    ) -> Int64[np.ndarray, "t"]:
        """Return the references of tokens `begin` to `end - 1` of a segment; see `Corpus`."""
        number = operator.index(index)
        size = int(self.sizes[number])
        return self.refs_of_parts(np.array([[number, begin, size if end is None else end]]))

    def refs_of_parts(self, parts: Int64[np.ndarray, "p 3"]) -> Int64[np.ndarray, "t"]:
        """Return the references of the tokens of parts (segment, begin, end), end to end."""
        numbers, begins, ends = parts.T
        which = np.searchsorted(self._first, numbers, side="right") - 1
        firsts = (numbers - self._first[which]) * self.seq_len
        return self._corpus.refs_of_parts(which, firsts + begins, firsts + ends)


class Stream(NamedTuple):
    """A packed stream whose ids have not been read yet.

    Attributes:
        refs: references of its tokens; 0 for padding. See `Corpus`.
        segment_ids: from 1; 0 for padding.
        positions: position of each token in its part of a segment.
    """

    refs: Int64[np.ndarray, "T"]
    segment_ids: Int32[np.ndarray, "T"]
    positions: Int32[np.ndarray, "T"]


class Streams(grain.IterDataset[Stream]):
    """Streams of `segments.seq_len` tokens, the segments shuffled anew each epoch.

    Args:
        segments: the segments of the corpus.
        seed: seed of the order; None: do not shuffle.
        num_epochs: how often all segments come; None: without end.
        only: numbers of the segments to use; None for all.
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
            # An epoch must fill a stream, or its segments would be left over again and again.
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
        """Return the numbers of the segments in the order of an epoch."""
        if self.seed is None:
            return self._numbers
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, shuffled(self._numbers, self.seed, epoch)
        return self._order[1]

    def window(self, epoch: int, number: int, left_over: Int64[np.ndarray, "m 2"]) -> Window:
        """Pack a window of an epoch.

        Args:
            epoch: from 0.
            number: the window's number in the epoch.
            left_over: what the window before left over; see `Window`.
        """
        order, sizes, count = self.order(epoch), self.segments.sizes, self._windows
        borders = np.arange(count + 1) * order.size // count
        numbers = order[borders[number] : borders[number + 1]]
        last = number + 1 == count and epoch + 1 == self.num_epochs
        if self.packing == "dense":
            return pack_dense(numbers, sizes, self.segments.seq_len, left_over, last)
        # Not (seed, epoch, 0): it is equal to the seed of the order.
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
        """Return the epoch and number of the next window; None after the last one."""
        if number + 1 < self._windows:
            return epoch, number + 1
        return None if epoch + 1 == self.num_epochs else (epoch + 1, 0)

    def describe(self) -> str:
        """Return a line that says how full streams are and how many documents stay whole.

        The first windows of the first epoch are counted, at least `_COUNTED` segments.
        """
        counted = streams = tokens = fitting = whole = 0
        fits, sizes = ~self._may_cut, self.segments.sizes
        for packed in self._first_windows():
            numbers, begins, ends = packed.parts.T
            counted, streams = counted + len(numbers), streams + len(packed)
            tokens += int((ends - begins).sum())
            # A document that is cut counts where it begins.
            begin_here = fits[numbers] & (begins == 0)
            fitting += int(begin_here.sum())
            whole += int((begin_here & (ends == sizes[numbers])).sum())
            if counted >= _COUNTED:
                break
        share = f"{whole / fitting:.1%} of the documents" if fitting else "no document"
        fill = tokens / max(1, streams * self.segments.seq_len)
        hint = " (documents of these lengths do not fill streams whole; 'dense' would)"
        return (
            f"packing {self.packing!r}: {share} that fit{'' if fitting else 's'} "
            f"{self.segments.seq_len:,} tokens, whole; {fill:.1%} of the slots hold a token"
            f"{hint if fill < 0.95 else ''}"
        )

    def _first_windows(self) -> Iterator[Window]:
        """Yield the windows of the first epoch, and later ones until there is a stream."""
        window: tuple[int, int] | None = (0, 0)
        left_over, streams = _NONE_LEFT, 0
        while window is not None and (window[0] == 0 or streams == 0):
            packed = self.window(*window, left_over)
            yield packed
            left_over, streams = packed.left_over, streams + len(packed)
            window = self.next_window(*window)


def shuffled(numbers: Int64[np.ndarray, "n"], seed: int, epoch: int) -> Int64[np.ndarray, "n"]:
    """Return the numbers in the order of an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(numbers)


def make_stream(segments: Segments, parts: Int64[np.ndarray, "p 3"]) -> Stream:
    """Return the stream of parts (segment, begin, end), padded at its end."""
    sizes = parts[:, 2] - parts[:, 1]
    used = int(sizes.sum())
    refs, ids, positions = np.zeros((3, segments.seq_len), np.int64)
    refs[:used] = segments.refs_of_parts(parts)
    ids[:used] = np.repeat(np.arange(1, len(parts) + 1), sizes)
    positions[:used] = np.arange(used) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return Stream(refs, ids.astype(np.int32), positions.astype(np.int32))


class _Iterator(grain.DatasetIterator[Stream]):
    """State: the epoch, the window, the next stream in it, and what was left over before it."""

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
        # Older checkpoints, from before `packing`, hold dense streams, an epoch in one window.
        state = {"packing": "dense", "window_in_epoch": 0, **state}
        require_same_data(state, _identity(self._streams))
        left_over = np.array(state["left_over"], np.int64).reshape(-1, 2)
        self._begin(state["epoch"], state["window_in_epoch"], left_over)
        self._next = state["next"]


def require_same_data(state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuse the state of a data pipeline with another order of documents.

    Args:
        state: from a checkpoint; holds, among others, the settings that its order depended on.
        own: the settings that this run's order depends on, by the same names.

    Raises:
        ValueError: if a setting differs or is not in the state; says which.
    """
    for name, ours in own.items():
        if state.get(name) != ours:
            raise ValueError(
                f"checkpoint and run use different data: {name} was "
                f"{state.get(name, 'not saved')} and is {ours}. Resume with the same data, "
                "seq_len, seed, data.packing and parallel.dynamic.enabled: the order of documents "
                f"depends on them{_hint(name, state)}."
            )


def _hint(name: str, state: Mapping[str, Any]) -> str:
    if name != "packing":
        return ""
    return f"; --data.packing {state.get(name)} packs them as before"


def _identity(streams: Streams) -> dict[str, Any]:
    """Return the settings that the order of streams depends on; see `require_same_data`."""
    return {
        "segments": len(streams),
        "tokens": int(streams.segments.sizes.sum()),
        "seq_len": streams.segments.seq_len,
        "seed": streams.seed,
        "packing": streams.packing,
    }
