"""Pack segments into streams: keep documents whole, or fill every place. Only sizes are needed.

A *part* is `(segment, begin, end)`, tokens `begin` to `end` of a segment; a stream is a few parts.
Segments come in windows of the epoch's order, each packed by itself; what fills no stream well is
left over for the next window. So memory is that of a window, and a place in the streams is an
epoch, a window, a number within it, and what was left over before it.

`pack_whole` makes one stream after the other: it takes the largest document left, again and again
the largest that fits, and at the end the one or two that leave the smallest gap (after the minimum
bin slack heuristic of Gupta and Ho, 1999). Streams that stay nearly empty wait for the next
windows, but not for ever. Documents longer than a stream are cut anyway, so their last segments
are cut once more where they fill gaps. At most `MOST_CUT` of the documents that fit are cut, and
only if `GOAL` of all places can be filled by it: documents of 0.9 · seq_len fill 90 % of the
places, and no packing that keeps them whole can do better.

`pack_dense` lays segments end to end and cuts every seq_len tokens: no padding, but documents cut
anywhere.
"""

import bisect
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64

GOAL = 0.972
"""The share of places that should hold a token; fuller streams need not wait for more segments."""

MOST_CUT = 0.009
"""The share of documents that fit a stream which may be cut to reach `GOAL`."""

WINDOW = 4096
"""Segments that are packed together, at least, if an epoch has as many."""

_WINDOW_STREAMS = 32  # likewise, the streams that their tokens fill
_WAITING_STREAMS = 16  # streams that may wait for the next window, at most
_WAITING_SEGMENTS = 4096  # the segments in them, at most: they are in every checkpoint
_WINDOWS_WAITED = 8  # windows that a segment may wait for
_BUNDLES = 256  # segments smaller than this part of a stream are packed in bundles of that size
_SHORTEST_CUT = 64  # no gap smaller than this part of a stream is worth a cut


class Window(NamedTuple):
    """The streams of a window: stream i is `parts[starts[i] : starts[i + 1]]`.

    Attributes:
        parts: (segment, begin, end) of each part.
        starts: where the parts of each stream begin, and their number.
        left_over: a row for each segment that comes in the next window instead: its number, and
            the token it goes on with (`pack_dense`) or the windows it has waited (`pack_whole`).
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
    """Return the number of windows that `pack_whole` should be given an epoch in.

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
    """Pack segments end to end, cut every `seq_len` tokens; whole segments are streams.

    Args:
        numbers: the segments, in their order.
        sizes: tokens of every segment there is.
        seq_len: tokens of a stream.
        left_over: of the window before.
        last: whether no window follows, so that a stream that is not full is made, too.
    """
    whole = sizes[numbers] == seq_len
    at_whole, at_rest = np.flatnonzero(whole), np.flatnonzero(~whole)
    rests = np.concatenate([left_over[:, 0], numbers[at_rest]])
    begins = np.concatenate([left_over[:, 1], np.zeros_like(at_rest)])
    # Where each rest, and each stream, ends in the row of all rests: a part ends at either.
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
    # A stream stands where its last token does, among the segments of the epoch.
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
        numbers: the segments, in their order.
        sizes: tokens of every segment there is.
        seq_len: tokens of a stream.
        left_over: of the window before.
        last: whether no window follows, so that no segment can wait for one.
        may_cut: which segments are of documents that are cut anyway.
        rng: shuffles the streams; None leaves them in the order of their largest segment.
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
    order = np.arange(len(bins.parts)) if rng is None else rng.permutation(len(bins.parts))
    parts = np.array([part for parts in bins.parts for part in parts], np.int64).reshape(-1, 3)
    parts[:, 0] = items[parts[:, 0]]
    counts = np.array([len(parts) for parts in bins.parts], np.int64)
    rest = np.stack([items[waits], waited[waits] + 1], axis=1)
    return _window(parts, counts, order, rest)


class _Bins:
    """Streams in the making, of parts (item, begin, end).

    Attributes:
        parts: those of each stream.
        gaps: the places that each stream has left.
    """

    def __init__(self, seq_len: int):
        self.seq_len = seq_len
        self.parts: list[list[tuple[int, int, int]]] = []
        self.gaps: list[int] = []
        self._by_gap: list[tuple[int, int]] = []  # (gap, stream), ascending, but for full ones

    def fit(self, parts: Sequence[tuple[int, int, int]], size: int) -> bool:
        """Lay parts into the fullest stream that has room for all of them, if there is one."""
        at = bisect.bisect_left(self._by_gap, (size, -1))
        if at == len(self._by_gap):
            return False
        self._put(self._by_gap.pop(at)[1], parts, size)
        return True

    def open(self, parts: Sequence[tuple[int, int, int]], size: int) -> None:
        """Begin a stream with these parts."""
        self.parts.append([])
        self.gaps.append(self.seq_len)
        self._put(len(self.parts) - 1, parts, size)

    def spread(self, parts: Sequence[tuple[int, int, int]], size: int) -> None:
        """Lay parts where there is room, cut over the widest gaps if there is not at one place."""
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
        """Return the numbers of all streams, the emptiest first; of equal ones the latest."""
        return sorted(range(len(self.gaps)), key=lambda i: (-self.gaps[i], -i))

    def _put(self, which: int, parts: Sequence[tuple[int, int, int]], size: int) -> None:
        self.parts[which].extend(parts)
        self.gaps[which] -= size
        if self.gaps[which]:
            bisect.insort(self._by_gap, (self.gaps[which], which))


def _fill_streams(sizes: Int64[np.ndarray, "n"], seq_len: int) -> Iterator[list[int]]:
    """Yield the numbers of the groups that make each stream; `sizes` ascend."""
    left, index = sizes, np.arange(sizes.size)
    while left.size:
        chosen: list[int] = []
        room = seq_len
        while left.size and left[0] <= room:
            fit = int(np.searchsorted(left, room, side="right")) - 1
            taken = [fit]
            # Two more may fit beside the largest: then the end of the stream is not reached yet.
            if chosen and left[fit] + 2 * left[0] > room:
                taken = _best_end(left, room, fit)
            chosen += index[taken].tolist()
            room -= int(left[taken].sum())
            left, index = np.delete(left, taken), np.delete(index, taken)
        yield chosen


def _best_end(left: Int64[np.ndarray, "n"], room: int, fit: int) -> list[int]:
    """Return which one or two of the sizes `left`, which ascend, fill the room best.

    Args:
        left: sizes.
        room: that they must fit into.
        fit: the largest that fits alone.
    """
    first = np.arange(fit + 1)
    # The largest partner that comes before it, if there is one.
    second = np.searchsorted(left, room - left[: fit + 1], side="right") - 1
    second = np.minimum(second, first - 1)
    together = np.where(second >= 0, left[: fit + 1] + left[second], 0)
    best = int(together.argmax())
    return [best, int(second[best])] if together[best] > left[fit] else [fit]


def _groups(
    sizes: Int64[np.ndarray, "n"], chosen: Bool[np.ndarray, "n"], seq_len: int
) -> list[tuple[list[tuple[int, int, int]], int]]:
    """Return the parts of the chosen items with their size; sizes ascend.

    Items that are tiny beside a stream are bundled, so that a stream never has to be put together
    from more than a few hundred of them one by one.
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
    """Take out the emptiest streams, whose items are to wait; return these items."""
    most = min(_WAITING_STREAMS, max(1, len(bins.parts) // 8))
    taken: list[int] = []
    budget = _WAITING_SEGMENTS
    for i in bins.emptiest()[:most]:
        parts = bins.parts[i]
        # What was cut cannot wait, as its other part does not.
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
    """Return streams of so many of the parts each, put into this order."""
    firsts = np.cumsum(counts) - counts
    starts = np.concatenate([[0], np.cumsum(counts[order])])
    index = np.repeat(firsts[order] - starts[:-1], counts[order]) + np.arange(starts[-1])
    return Window(parts[index], starts, left_over)
