"""Pack segments into streams: keep documents whole, or fill every slot. Only sizes are needed.

A *part* is `(segment, begin, end)`, tokens `begin` to `end - 1` of a segment; a stream is a few
parts. The epoch's order is cut into windows, each packed by itself; segments that fill no stream
well are left over for the next window. So only one window is in memory, and the state of the
pipeline is the epoch, the window, the next stream in it, and what was left over before it.

`pack_whole` builds one stream after the other: it takes the largest document left, then again and
again the largest that fits, and at the end the one or two that leave the smallest gap (after the
minimum bin slack heuristic of Gupta and Ho, 1999). Streams that stay nearly empty wait for later
windows, but only for a few. Documents longer than a stream are cut anyway, so their last segments
are cut once more where they fill gaps. At most `MOST_CUT` of the documents that fit are cut, and
only if `GOAL` of all slots can be filled by it. (Documents of 0.9 · seq_len, for example, fill 90 %
of the slots, and no packing that keeps them whole can do better.)

`pack_dense` puts segments end to end and cuts every seq_len tokens: no padding, but documents are
cut anywhere.
"""

import bisect
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64

GOAL = 0.972
"""The share of slots that should hold a token; a stream this full does not wait for more."""

MOST_CUT = 0.009
"""The share of the documents that fit a stream which may be cut to reach `GOAL`."""

WINDOW = 4096
"""The least number of segments in a window, if an epoch has as many."""

_WINDOW_STREAMS = 32  # the least number of streams that a window's tokens fill, likewise
_WAITING_STREAMS = 16  # the most streams that may wait for the next window
_WAITING_SEGMENTS = 4096  # the most segments in them: they are in every checkpoint
_WINDOWS_WAITED = 8  # the most windows that a segment may wait for
_BUNDLES = 256  # segments shorter than seq_len / 256 are packed in bundles of that size
_SHORTEST_CUT = 64  # gaps shorter than seq_len / 64 are not worth a cut


class Window(NamedTuple):
    """The streams of a window: stream i is `parts[starts[i] : starts[i + 1]]`.

    Attributes:
        parts: (segment, begin, end) of each part.
        starts: index of the first part of each stream, and at the end the number of parts.
        left_over: a row for each segment that is left over for the next window: its number, and
            the first token left (`pack_dense`) or the windows it has waited (`pack_whole`).
    """

    parts: Int64[np.ndarray, "n 3"]
    starts: Int64[np.ndarray, "S+1"]
    left_over: Int64[np.ndarray, "m 2"]

    def __len__(self) -> int:
        return self.starts.size - 1

    def stream(self, index: int) -> Int64[np.ndarray, "p 3"]:
        """Return the parts of a stream."""
        return self.parts[self.starts[index] : self.starts[index + 1]]


def num_windows(sizes: Int64[np.ndarray, "S"], seq_len: int) -> int:
    """Return into how many windows to cut an epoch for `pack_whole`.

    Args:
        sizes: tokens of each segment of the epoch.
        seq_len: tokens of a stream.
    """
    streams = int(sizes.sum()) // seq_len
    return max(1, min(sizes.size // WINDOW, streams // _WINDOW_STREAMS))


def pack_dense(
    numbers: Int64[np.ndarray, "n"],
    sizes: Int64[np.ndarray, "S"],
    seq_len: int,
    left_over: Int64[np.ndarray, "m 2"],
    last: bool,
) -> Window:
    """Pack segments end to end and cut every `seq_len` tokens; a full segment is a stream.

    Args:
        numbers: the segments of the window, in their order.
        sizes: tokens of every segment of the corpus.
        seq_len: tokens of a stream.
        left_over: `Window.left_over` of the window before.
        last: whether this is the last window, so that the last stream may not be full.
    """
    whole = sizes[numbers] == seq_len
    at_whole, at_rest = np.flatnonzero(whole), np.flatnonzero(~whole)
    rests = np.concatenate([left_over[:, 0], numbers[at_rest]])
    begins = np.concatenate([left_over[:, 1], np.zeros_like(at_rest)])
    # The ends of rests and of streams, with all rests end to end: a part ends at each of them.
    ends = np.cumsum(sizes[rests] - begins)
    total = int(ends[-1]) if ends.size else 0
    count = -(-total // seq_len) if last else total // seq_len
    stops = np.minimum(seq_len * np.arange(1, count + 1), total)
    bounds = np.union1d(ends, stops)
    which = np.searchsorted(ends, bounds)
    until = sizes[rests[which]] - (ends[which] - bounds)
    row = np.stack([rests[which], until - np.diff(bounds, prepend=0), until], axis=1)
    used = np.searchsorted(bounds, stops[-1], side="right") if count else 0
    made, rest = row[:used], row[used:]
    # Streams are ordered by their last tokens, in the order of the segments.
    at = np.concatenate([np.full(len(left_over), -1), at_rest])
    closes = at[np.searchsorted(ends, stops)] if count else np.zeros(0, np.int64)
    if count * seq_len > total:
        closes[-1] = numbers.size
    order = np.argsort(np.concatenate([at_whole, closes]), kind="stable")
    entire = numbers[at_whole]
    parts = np.concatenate(
        [np.stack([entire, np.zeros_like(entire), np.full_like(entire, seq_len)], axis=1), made]
    )
    last_parts = np.searchsorted(bounds, stops, side="right")
    counts = np.concatenate([np.ones_like(entire), np.diff(last_parts, prepend=0)])
    return _window(parts, counts, order, rest[:, :2])


def pack_whole(
    numbers: Int64[np.ndarray, "n"],
    sizes: Int64[np.ndarray, "S"],
    seq_len: int,
    left_over: Int64[np.ndarray, "m 2"],
    last: bool,
    *,
    may_cut: Bool[np.ndarray, "S"],
    rng: np.random.Generator | None,
) -> Window:
    """Pack segments so that documents that fit a stream stay whole.

    Args:
        numbers: the segments of the window, in their order.
        sizes: tokens of every segment of the corpus.
        seq_len: tokens of a stream.
        left_over: `Window.left_over` of the window before.
        last: whether this is the last window, so that no segment can wait for the next.
        may_cut: True for segments of documents that are cut anyway.
        rng: shuffles the streams; None: keep them in the order of their first segments.
    """
    items = np.concatenate([left_over[:, 0], numbers])
    waited = np.concatenate([left_over[:, 1], np.zeros_like(numbers)])
    sizes_here = sizes[items]
    free = may_cut[items] & (sizes_here < seq_len)
    bins = _Bins(seq_len)
    groups = _groups(sizes_here, ~free, seq_len)
    for chosen in _fill_streams(np.array([size for _, size in groups], np.int64), seq_len):
        parts_of_stream = [part for i in chosen for part in groups[i][0]]
        bins.open(parts_of_stream, sum(groups[i][1] for i in chosen))
    for group, size in reversed(_groups(sizes_here, free, seq_len)):
        bins.spread(group, size)
    waits: list[int] = []
    if not last:
        waits = _take_waiting(bins, sizes_here, waited)
    _cut_some(bins, free)
    firsts = [min(item for item, _, _ in parts) for parts in bins.parts]
    order = np.argsort(np.array(firsts, np.int64)) if rng is None else rng.permutation(len(firsts))
    parts = np.array([part for parts in bins.parts for part in parts], np.int64).reshape(-1, 3)
    parts[:, 0] = items[parts[:, 0]]
    counts = np.array([len(parts) for parts in bins.parts], np.int64)
    rest = np.stack([items[waits], waited[waits] + 1], axis=1)
    return _window(parts, counts, order, rest)


class _Bins:
    """Streams that are being filled with parts (item, begin, end).

    Attributes:
        parts: the parts of each stream.
        gaps: the free slots of each stream.
    """

    def __init__(self, seq_len: int):
        self.seq_len = seq_len
        self.parts: list[list[tuple[int, int, int]]] = []
        self.gaps: list[int] = []
        self._by_gap: list[tuple[int, int]] = []  # (gap, stream), ascending, without full streams

    def fit(self, parts: Sequence[tuple[int, int, int]], size: int) -> bool:
        """Put parts into the fullest stream with room for all; return whether there is one."""
        at = bisect.bisect_left(self._by_gap, (size, -1))
        if at == len(self._by_gap):
            return False
        self._put(self._by_gap.pop(at)[1], parts, size)
        return True

    def open(self, parts: Sequence[tuple[int, int, int]], size: int) -> None:
        """Add a stream with these parts."""
        self.parts.append([])
        self.gaps.append(self.seq_len)
        self._put(len(self.parts) - 1, parts, size)

    def spread(self, parts: Sequence[tuple[int, int, int]], size: int) -> None:
        """Put parts into one stream, or, where none has room, cut them over the widest gaps."""
        least = max(1, self.seq_len // _SHORTEST_CUT)
        while not self.fit(parts, size):
            if not self._by_gap or self._by_gap[-1][0] < least:
                self.open(parts, size)
                return
            gap, which = self._by_gap.pop()
            head, parts = _split(parts, gap)
            self._put(which, head, gap)
            size -= gap

    def remove(self, which: Sequence[int]) -> list[tuple[int, int, int]]:
        """Remove streams; return their parts."""
        gone = set(which)
        removed = [part for i in which for part in self.parts[i]]
        stay = [i for i in range(len(self.parts)) if i not in gone]
        self.parts, self.gaps = [self.parts[i] for i in stay], [self.gaps[i] for i in stay]
        self._by_gap = sorted((gap, i) for i, gap in enumerate(self.gaps) if gap)
        return removed

    def emptiest(self) -> list[int]:
        """Return the numbers of all streams, the emptiest first; among equal ones, the latest."""
        return sorted(range(len(self.gaps)), key=lambda i: (-self.gaps[i], -i))

    def _put(self, which: int, parts: Sequence[tuple[int, int, int]], size: int) -> None:
        self.parts[which].extend(parts)
        self.gaps[which] -= size
        if self.gaps[which]:
            bisect.insort(self._by_gap, (self.gaps[which], which))


def _fill_streams(sizes: Int64[np.ndarray, "n"], seq_len: int) -> Iterator[list[int]]:
    """Yield the indices of the sizes that fill each stream; `sizes` ascend."""
    left, index = sizes, np.arange(sizes.size)
    while left.size:
        chosen: list[int] = []
        room = seq_len
        while left.size and left[0] <= room:
            fit = int(np.searchsorted(left, room, side="right")) - 1
            taken = [fit]
            # If two more fit beside the largest, the end of the stream is not reached yet.
            if chosen and left[fit] + 2 * left[0] > room:
                taken = _best_end(left, room, fit)
            chosen += index[taken].tolist()
            room -= int(left[taken].sum())
            left, index = np.delete(left, taken), np.delete(index, taken)
        yield chosen


def _best_end(left: Int64[np.ndarray, "n"], room: int, fit: int) -> list[int]:
    """Return the indices of the one or two sizes that fill the room best.

    Args:
        left: sizes, ascending.
        room: slots that they must fit into.
        fit: index of the largest that fits alone.
    """
    first = np.arange(fit + 1)
    # The largest partner with a smaller index, if there is one.
    second = np.searchsorted(left, room - left[: fit + 1], side="right") - 1
    second = np.minimum(second, first - 1)
    together = np.where(second >= 0, left[: fit + 1] + left[second], 0)
    best = int(together.argmax())
    return [best, int(second[best])] if together[best] > left[fit] else [fit]


def _groups(
    sizes: Int64[np.ndarray, "n"], chosen: Bool[np.ndarray, "n"], seq_len: int
) -> list[tuple[list[tuple[int, int, int]], int]]:
    """Return lists of parts of the chosen items, each with its size; sizes ascend.

    An item is a list of its own; tiny items are bundled, so that a stream is never put together
    from more than a few hundred lists.
    """
    bundle = seq_len // _BUNDLES
    large = np.flatnonzero(chosen & (sizes > bundle))
    found = [([(i, 0, n)], n) for i, n in zip(large.tolist(), sizes[large].tolist(), strict=True)]
    tiny = np.flatnonzero(chosen & (sizes <= bundle))
    if tiny.size:
        before = np.cumsum(sizes[tiny]) - sizes[tiny]
        borders = np.flatnonzero(np.diff(before // bundle)) + 1
        for group in np.split(tiny, borders):
            parts = [(i, 0, n) for i, n in zip(group.tolist(), sizes[group].tolist(), strict=True)]
            found.append((parts, int(sizes[group].sum())))
    found.sort(key=lambda parts_and_size: parts_and_size[1])
    return found


def _take_waiting(
    bins: _Bins, sizes: Int64[np.ndarray, "n"], waited: Int64[np.ndarray, "n"]
) -> list[int]:
    """Remove the emptiest streams, so that their items wait; return these items."""
    most = min(_WAITING_STREAMS, max(1, len(bins.parts) // 8))
    taken: list[int] = []
    budget = _WAITING_SEGMENTS
    for i in bins.emptiest()[:most]:
        parts = bins.parts[i]
        # A cut item cannot wait, since its other part does not.
        if any(end - begin < sizes[item] for item, begin, end in parts):
            continue
        if any(waited[item] >= _WINDOWS_WAITED for item, _, _ in parts):
            continue
        nearly_full = bins.gaps[i] <= (1 - GOAL) * bins.seq_len
        if not nearly_full and len(parts) <= budget:
            taken.append(i)
            budget -= len(parts)
    return sorted(item for item, _, _ in bins.remove(taken))


def _cut_some(bins: _Bins, free: Bool[np.ndarray, "n"]) -> None:
    """Spread the emptiest streams over the gaps of others, if `GOAL` can be reached by it."""
    tokens = sum(bins.seq_len - gap for gap in bins.gaps)
    surplus = len(bins.parts) - -(-tokens // max(1, int(GOAL * bins.seq_len)))
    if surplus <= 0:
        return
    chosen = bins.emptiest()[:surplus]
    documents = sum(not free[item] for parts in bins.parts for item, _, _ in parts)
    cut = sum(not free[item] for i in chosen for item, _, _ in bins.parts[i])
    if cut > MOST_CUT * documents:
        return
    for part in sorted(bins.remove(chosen), key=lambda part: part[1] - part[2]):
        bins.spread([part], part[2] - part[1])


def _split(
    parts: Sequence[tuple[int, int, int]], size: int
) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
    """Return the first `size` tokens of parts, and the rest."""
    head: list[tuple[int, int, int]] = []
    for at, (item, begin, end) in enumerate(parts):
        if end - begin > size:
            first = [(item, begin, begin + size)] if size else []
            return head + first, [(item, begin + size, end), *parts[at + 1 :]]
        head.append((item, begin, end))
        size -= end - begin
    return head, []


def _window(
    parts: Int64[np.ndarray, "n 3"],
    counts: Int64[np.ndarray, "S"],
    order: Int64[np.ndarray, "S"],
    left_over: Int64[np.ndarray, "m 2"],
) -> Window:
    """Return a window: cut `parts` into streams of `counts` parts each, and reorder the streams."""
    firsts = np.cumsum(counts) - counts
    starts = np.concatenate([[0], np.cumsum(counts[order])])
    index = np.repeat(firsts[order] - starts[:-1], counts[order]) + np.arange(starts[-1])
    return Window(parts[index], starts, left_over)
