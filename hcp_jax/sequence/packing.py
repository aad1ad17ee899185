"""Pack the documents of a microbatch into device buffers: documents, positions, intervals, runs.

A group of g devices holds its documents as one stream, one after the other. The global index of a
token counts along that stream: the begin of its document plus its position in the document. So a
query sees `[begin of its document, its own index + 1)`, whatever else the group holds. Each group
has its own stream; streams of different groups never interact.

Each document is cut zigzag by itself, into 2g chunks; device j of the group holds chunks j and
2g-1-j of every document, in stream order:

    documents of 9 and 4 tokens on g = 2 devices (M = 7)

    stream   0 1 2 | 3 4 | 5 6 | 7 8 || 9 | 10 | 11 | 12       4 chunks each
    device 0 0 1 2               7 8    9              12      runs [0,3) [7,10) [12,13): 6 tokens
    device 1         3 4   5 6            10   11              runs [3,7) [10,12): 6 tokens

The chunks of a document differ by one token at most, so no document is padded. Where 2g does not
divide a length, the remaining tokens are dealt to the devices in turn, and the next document
continues with the device after the last one served. So the devices of a group never differ by more
than one token, and a group that holds g·M tokens holds exactly M on each device.

All arrays are NumPy arrays with the meaning of `layout.KeyRuns` and `mask.Intervals`.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from hcp_jax.base import checks
from hcp_jax.sequence import groupings


@dataclasses.dataclass(frozen=True)
class Microbatch:
    """One execution of the program: a grouping and the documents of each of its groups.

    Attributes:
        layout: group sizes in device order.
        documents: for each group, the indices of its documents in the schedule's lengths.
    """

    layout: groupings.Layout
    documents: tuple[tuple[int, ...], ...]

    def lengths(self, lengths: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Return the lengths of each group's documents."""
        return tuple(tuple(lengths[d] for d in group) for group in self.documents)


class Runs(NamedTuple):
    """The key runs of every device: `layout.KeyRuns` with a row per device.

    Attributes:
        starts: global index of the first key of each run.
        offsets: first slot of each run, followed by the end of the last run; runs may be empty.
    """

    starts: Int32[np.ndarray, "D R"]
    offsets: Int32[np.ndarray, "D R+1"]


@dataclasses.dataclass(frozen=True, eq=False)
class PackedMicrobatch:
    """The buffers of a microbatch: one row of M slots for each of D devices.

    Attributes:
        layout: group sizes over all devices.
        devices: which devices the rows of the token arrays belong to.
        document: the document in each slot, as its index in the schedule's lengths; -1 for
            padding.
        position: index of the token in its document; 0 for padding.
        start: first global index that the query in this slot sees.
        end: one past the last index that it sees, which is its own global index + 1. Padding has
            start = end = 0.
        runs: the key runs of *all* devices of the grouping, a row for each.
    """

    layout: groupings.Layout
    devices: range
    document: Int32[np.ndarray, "D M"]
    position: Int32[np.ndarray, "D M"]
    start: Int32[np.ndarray, "D M"]
    end: Int32[np.ndarray, "D M"]
    runs: Runs


def max_documents_per_ring(max_tokens_per_device: int) -> int:
    """Return how many documents a group of several devices may hold.

    Each document adds two key runs to every device, and the number of runs is part of the
    compiled program. With one document per 32 tokens, searching the runs costs little compared to
    attention.
    """
    return max(64, max_tokens_per_device // 32)


def max_runs(max_tokens_per_device: int) -> int:
    """Return the largest number of key runs on a device in any microbatch of `schedule`.

    Two for every document of a group of several devices; a group of one device has a single run.
    """
    return 2 * max_documents_per_ring(max_tokens_per_device)


def pack(
    microbatch: Microbatch,
    lengths: Sequence[int] | np.ndarray,
    max_tokens_per_device: int,
    *,
    devices: range | None = None,
    num_runs: int | None = None,
) -> PackedMicrobatch:
    """Cut a microbatch's documents over the devices of their groups.

    Args:
        microbatch: grouping and documents.
        lengths: tokens of every document of the schedule.
        max_tokens_per_device: M, slots of each device's buffer.
        devices: the devices to build buffers for (a host's own); all if None.
        num_runs: R. Rows with fewer runs are filled up with empty runs; if None, R is the largest
            number that a device needs. With `max_runs`, shapes are the same for any schedule.

    Raises:
        ValueError: if a group's documents do not fit, or have more than `num_runs` runs.
    """
    max_tokens_per_device = checks.integer("max_tokens_per_device", max_tokens_per_device, least=1)
    if num_runs is not None:
        num_runs = checks.integer("num_runs", num_runs, least=1)
    num_devices = sum(microbatch.layout)
    devices = range(num_devices) if devices is None else devices
    if devices.step != 1 or not 0 <= devices.start <= devices.stop <= num_devices:
        raise ValueError(f"devices must be a range within 0 … {num_devices}, got {devices}.")
    shape = len(devices), max_tokens_per_device
    document = np.full(shape, -1, np.int32)
    position, start, end = (np.zeros(shape, np.int32) for _ in range(3))
    runs: list[tuple[np.ndarray, np.ndarray]] = []
    first = 0
    for size, held in zip(microbatch.layout, microbatch.documents, strict=True):
        group_lengths = np.array([lengths[d] for d in held], np.int64)
        total = int(group_lengths.sum())
        if total > size * max_tokens_per_device:
            raise ValueError(
                f"the group of devices {first} … {first + size - 1} has documents of {total} "
                f"tokens, more than {size} * {max_tokens_per_device}."
            )
        begin = np.cumsum(group_lengths) - group_lengths
        index, chunk = _cut(group_lengths, begin, size)
        for device in range(first, first + size):
            mine = _chunk_numbers(device - first, size)
            begins, sizes = index[:, mine].reshape(-1), chunk[:, mine].reshape(-1)
            runs.append(_join(begins, sizes))
            if device in devices:
                row, used = device - devices.start, int(sizes.sum())
                which = np.repeat(np.arange(len(held)), sizes.reshape(-1, len(mine)).sum(axis=1))
                own = np.repeat(begins - (np.cumsum(sizes) - sizes), sizes) + np.arange(used)
                document[row, :used] = np.asarray(held, np.int32)[which] if used else 0
                position[row, :used] = own - begin[which]
                start[row, :used], end[row, :used] = begin[which], own + 1
        first += size
    stacked = _stack(runs, num_runs)
    return PackedMicrobatch(microbatch.layout, devices, document, position, start, end, stacked)


def _cut(lengths: np.ndarray, begin: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (global index, tokens) of the chunks of each document, both `[documents, 2·size]`.

    The remainder of a length divided by 2·size is dealt out one token at a time, in turns: a
    device whose turn comes twice gets two of these tokens.
    """
    each, over = np.divmod(lengths, 2 * size)
    first_turn = (np.cumsum(over) - over) % size
    turn = (np.arange(size) - first_turn[:, None]) % size
    early = each[:, None] + (turn < over[:, None])
    late = each[:, None] + (turn + size < over[:, None])
    chunk = np.concatenate([early, late[:, ::-1]], axis=1)
    return begin[:, None] + np.cumsum(chunk, axis=1) - chunk, chunk


def _chunk_numbers(rank: int, size: int) -> list[int]:
    return [rank, 2 * size - 1 - rank]


def _join(begins: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (starts, lengths) of the runs; adjacent chunks of the stream are merged."""
    begins, sizes = begins[sizes > 0], sizes[sizes > 0]
    if not sizes.size:
        return begins, sizes
    new = np.concatenate([[True], begins[1:] != begins[:-1] + sizes[:-1]])
    return begins[new], np.add.reduceat(sizes, np.flatnonzero(new))


def _stack(runs: list[tuple[np.ndarray, np.ndarray]], num_runs: int | None) -> Runs:
    most = max(starts.size for starts, _ in runs)
    num_runs = max(most, 1) if num_runs is None else num_runs
    if most > num_runs:
        raise ValueError(
            f"a device holds {most} runs of keys, more than num_runs={num_runs}; raise it "
            "(max_runs is enough for any schedule)."
        )
    starts = np.zeros((len(runs), num_runs), np.int32)
    offsets = np.zeros((len(runs), num_runs + 1), np.int32)
    for row, (begins, sizes) in enumerate(runs):
        starts[row, : begins.size] = begins
        offsets[row, 1 : begins.size + 1] = np.cumsum(sizes)
        offsets[row, begins.size + 1 :] = sizes.sum()
    return Runs(starts, offsets)
