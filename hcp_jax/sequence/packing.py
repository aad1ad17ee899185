"""Pack the documents of a microbatch into device buffers: documents, positions, intervals, runs.

A group of g devices holds its documents as one stream, one after the other. The stream of the group
that starts at device f begins at global index f·M, so indices are unique over all groups. The
global index of a token is the begin of its document plus its position in the document. So a query
sees `[begin of its document, its own index + 1)`, and nothing of another document or group.

A group has w = g / lanes members of `lanes` neighbouring devices. Each document is cut zigzag by
itself, into 2w chunks; member j of the group holds chunks j and 2w-1-j of every document, in stream
order, in the buffers of its lanes one after the other:

    documents of 9 and 4 tokens on w = 2 members of 1 lane (M = 7)

    stream   0 1 2 | 3 4 | 5 6 | 7 8 || 9 | 10 | 11 | 12       4 chunks each
    member 0 0 1 2               7 8    9              12      runs [0,3) [7,10) [12,13): 6 tokens
    member 1         3 4   5 6            10   11              runs [3,7) [10,12): 6 tokens

The chunks of a document differ by one token at most, so no document is padded. Where 2w does not
divide a length, the remaining tokens are dealt to the members in turn, and the next document
continues with the member after the last one served. So the members of a group never differ by more
than one token, and a group that holds g·M tokens holds exactly M on each device. A group of one
member holds its stream uncut: each of its devices has a single run.

All arrays are NumPy arrays with the meaning of `layout.KeyRuns` and `mask.Intervals`.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from hcp_jax.base import checks
from hcp_jax.sequence import groupings
from hcp_jax.sequence.layout import KeyRuns


@dataclasses.dataclass(frozen=True)
class Microbatch:
    """One execution of a program: a grouping and the documents of each of its groups.

    Attributes:
        grouping: group sizes in devices, in device order; each is a multiple of `lanes`.
        documents: for each group, the indices of its documents in the schedule's lengths.
        lanes: devices of a member, which exchange heads with each other.

    >>> microbatch = Microbatch((4, 2, 2), ((0,), (1, 3), (2,)))
    >>> microbatch.widest, microbatch.lengths([90, 30, 40, 10])
    (4, ((90,), (30, 10), (40,)))
    """

    grouping: groupings.Grouping
    documents: tuple[tuple[int, ...], ...]
    lanes: int = 1

    @property
    def widest(self) -> int:
        """Devices of the widest group, which is the width of the program that runs it."""
        return max(self.grouping)

    def lengths(self, lengths: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Return the lengths of each group's documents."""
        return tuple(tuple(lengths[d] for d in group) for group in self.documents)


@dataclasses.dataclass(frozen=True, eq=False)
class PackedMicrobatch:
    """The buffers of a microbatch: one row of M slots for each of D devices.

    Attributes:
        grouping: group sizes over all devices.
        devices: which devices the rows of the token arrays belong to.
        document: the document in each slot, as its index in the schedule's lengths; -1 for
            padding.
        position: index of the token in its document; 0 for padding.
        start: first global index that the query in this slot sees.
        end: one past the last index that it sees, which is its own global index + 1. Padding has
            start = end = 0.
        runs: the key runs of *all* devices of the grouping, a row for each.
        lanes: devices of a member.

    >>> packed = pack(Microbatch((2, 1), ((0,), (1,))), [6, 3], 4)
    >>> packed.document.tolist()
    [[0, 0, 0, -1], [0, 0, 0, -1], [1, 1, 1, -1]]
    """

    grouping: groupings.Grouping
    devices: range
    document: Int32[np.ndarray, "D M"]
    position: Int32[np.ndarray, "D M"]
    start: Int32[np.ndarray, "D M"]
    end: Int32[np.ndarray, "D M"]
    runs: KeyRuns
    lanes: int = 1

    @property
    def widest(self) -> int:
        """Devices of the widest group, which is the width of the program that runs it."""
        return max(self.grouping)


def max_documents(max_tokens_per_device: int) -> int:
    """Return how many documents a group of several members may hold.

    Each of them adds two key runs to every member, and all runs of a member can lie on one of its
    devices. The number of runs is part of the compiled program. With one document per 32 tokens of
    a device, searching the runs costs little compared to attention. A group of one member has no
    such limit.
    """
    return max(64, max_tokens_per_device // 32)


def max_runs(max_tokens_per_device: int) -> int:
    """Return the largest number of key runs on a device in any microbatch of `schedule`.

    It is two for every document of a group of several members, since cutting a member's runs at the
    ends of its devices' buffers gives no device more runs than the member has.

    >>> max_runs(2048), max_runs(8192)
    (128, 512)
    """
    return 2 * max_documents(max_tokens_per_device)


def num_runs(widest: int, lanes: int, max_tokens_per_device: int) -> int:
    """Return how many key runs a device has in the program of width `widest`.

    Args:
        widest: devices of the program's widest group.
        lanes: devices of a member in that program.
        max_tokens_per_device: M.

    >>> num_runs(8, 8, 2048), num_runs(16, 8, 2048)
    (1, 128)
    """
    return 1 if widest <= lanes else max_runs(max_tokens_per_device)


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
            number that a device needs. With the function `num_runs`, shapes are those of the
            compiled program.

    Raises:
        ValueError: if a group is not a multiple of the lanes, if its documents do not fit, or if
            they have more than `num_runs` runs.

    >>> packed = pack(Microbatch((2,), ((0, 1),)), [9, 4], 7)
    >>> packed.position[0].tolist(), packed.end[0].tolist()
    ([0, 1, 2, 7, 8, 0, 3], [1, 2, 3, 8, 9, 10, 13])
    """
    max_tokens_per_device = checks.integer("max_tokens_per_device", max_tokens_per_device, least=1)
    if num_runs is not None:
        num_runs = checks.integer("num_runs", num_runs, least=1)
    lanes, grouping = microbatch.lanes, microbatch.grouping
    num_devices = sum(grouping)
    _check(microbatch, max_tokens_per_device)
    devices = range(num_devices) if devices is None else devices
    if devices.step != 1 or not 0 <= devices.start <= devices.stop <= num_devices:
        raise ValueError(f"devices must be a range within 0 … {num_devices}, got {devices}.")
    rows = range(devices.start // lanes, -(-devices.stop // lanes))  # members to build buffers for
    shape = len(rows), lanes * max_tokens_per_device
    document = np.full(shape, -1, np.int32)
    position, start, end = (np.zeros(shape, np.int32) for _ in range(3))
    runs: list[tuple[np.ndarray, np.ndarray]] = []
    first = 0
    for size, held in zip(grouping, microbatch.documents, strict=True):
        group_lengths = np.array([lengths[d] for d in held], np.int64)
        total, members = int(group_lengths.sum()), size // lanes
        if total > size * max_tokens_per_device:
            raise ValueError(
                f"the group of devices {first} … {first + size - 1} has documents of {total} "
                f"tokens, more than {size} * {max_tokens_per_device}."
            )
        begin = first * max_tokens_per_device + np.cumsum(group_lengths) - group_lengths
        index, chunk = _cut(group_lengths, begin, members)
        for rank in range(members):
            member, mine = first // lanes + rank, _chunk_numbers(rank, members)
            begins, sizes = index[:, mine].reshape(-1), chunk[:, mine].reshape(-1)
            runs += _cut_runs(*_join(begins, sizes), lanes, max_tokens_per_device)
            if member in rows:
                row, used = member - rows.start, int(sizes.sum())
                which = np.repeat(np.arange(len(held)), sizes.reshape(-1, len(mine)).sum(axis=1))
                own = np.repeat(begins - (np.cumsum(sizes) - sizes), sizes) + np.arange(used)
                document[row, :used] = np.asarray(held, np.int32)[which] if used else 0
                position[row, :used] = own - begin[which]
                start[row, :used], end[row, :used] = begin[which], own + 1
        first += size
    skipped = devices.start - rows.start * lanes
    own_rows = slice(skipped, skipped + len(devices))

    def by_device(array: np.ndarray) -> np.ndarray:
        return array.reshape(-1, max_tokens_per_device)[own_rows]

    return PackedMicrobatch(
        grouping=grouping,
        devices=devices,
        document=by_device(document),
        position=by_device(position),
        start=by_device(start),
        end=by_device(end),
        runs=_stack(runs, num_runs),
        lanes=lanes,
    )


def _check(microbatch: Microbatch, max_tokens_per_device: int) -> None:
    lanes = checks.integer("lanes", microbatch.lanes, least=1)
    num_devices = sum(microbatch.grouping)
    groupings.check_grouping(microbatch.grouping, num_devices)
    if any(size % lanes for size in microbatch.grouping):
        raise ValueError(
            f"every group of {groupings.describe(microbatch.grouping)} must be a multiple of "
            f"lanes={lanes}, the devices that exchange heads with each other."
        )
    if len(microbatch.documents) != len(microbatch.grouping):
        raise ValueError(
            f"{len(microbatch.grouping)} groups need as many tuples of documents, got "
            f"{len(microbatch.documents)}."
        )
    if num_devices * max_tokens_per_device > np.iinfo(np.int32).max:
        raise ValueError(
            f"{num_devices} devices times {max_tokens_per_device} tokens pass 2**31 - 1, the "
            "greatest index of a token; lower one of them."
        )


def _cut(lengths: np.ndarray, begin: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (global index, tokens) of the chunks of each document, both `[documents, 2·size]`.

    The remainder of a length divided by 2·size is dealt out one token at a time, in turns: a
    member whose turn comes twice gets two of these tokens.
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


def _cut_runs(
    begins: np.ndarray, sizes: np.ndarray, lanes: int, slots: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the runs of each lane: those of its member, cut every `slots` tokens."""
    ends = np.cumsum(sizes)
    cut = []
    for lane in range(lanes):
        low = np.maximum(ends - sizes, lane * slots)
        kept = np.minimum(ends, (lane + 1) * slots) - low
        held = kept > 0
        cut.append(((begins + low - (ends - sizes))[held], kept[held]))
    return cut


def _stack(runs: list[tuple[np.ndarray, np.ndarray]], num_runs: int | None) -> KeyRuns:
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
    return KeyRuns(starts, offsets)
