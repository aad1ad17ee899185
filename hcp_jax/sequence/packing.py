"""Pack the documents of a microbatch into device buffers: documents, positions, intervals, runs.

A group holds its documents as one stream, one after the other. The global index of a token counts
along that stream, from (first device of the group) · M on. So indices are unique over all groups,
and a query sees `[begin of its document, its own index + 1)`, whatever the devices hold besides.

The members of a group are its devices, or sets of `lanes` devices that exchange heads with each
other and then hold each other's tokens. Each document is cut zigzag by itself over the w members,
into 2w chunks; member j holds chunks j and 2w-1-j of every document, in stream order:

    documents of 9 and 4 tokens on w = 2 members (M = 7)

    stream   0 1 2 | 3 4 | 5 6 | 7 8 || 9 | 10 | 11 | 12       4 chunks each
    member 0 0 1 2               7 8    9              12      runs [0,3) [7,10) [12,13): 6 tokens
    member 1         3 4   5 6            10   11              runs [3,7) [10,12): 6 tokens

The chunks of a document differ by one token at most, so no document is padded. Where 2w does not
divide a length, the remaining tokens are dealt to the members in turn, and the next document
continues with the member after the last one served. So the members of a group never differ by more
than one token, and a group of g devices that holds g·M tokens holds exactly M on each. A member's
tokens fill the buffers of its lanes one after the other: after the exchange of heads, all lanes
have all of them, so all have the same work.

All arrays are NumPy arrays with the meaning of `layout.KeyRuns` and `mask.Intervals`.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from hcp_jax.base import checks
from hcp_jax.sequence.groupings import Grouping
from hcp_jax.sequence.layout import KeyRuns


@dataclasses.dataclass(frozen=True)
class Microbatch:
    """One execution of a program: a grouping and the documents of each of its groups.

    Attributes:
        grouping: group sizes in device order; multiples of `lanes`.
        documents: for each group, the indices of its documents in the schedule's lengths.
        lanes: devices that exchange heads with each other.
    """

    grouping: Grouping
    documents: tuple[tuple[int, ...], ...]
    lanes: int = 1

    @property
    def widest(self) -> int:
        """The number of devices of its widest group."""
        return max(self.grouping)

    def lengths(self, lengths: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Return the lengths of each group's documents."""
        return tuple(tuple(lengths[d] for d in group) for group in self.documents)


@dataclasses.dataclass(frozen=True, eq=False)
class PackedMicrobatch:
    """The buffers of a microbatch: one row of M slots for each of D devices.

    Attributes:
        grouping: group sizes over all devices.
        lanes: devices that exchange heads with each other.
        devices: which devices the rows of the token arrays belong to.
        document: the document in each slot, as its index in the schedule's lengths; -1 for
            padding.
        position: index of the token in its document; 0 for padding.
        start: first global index that the query in this slot sees.
        end: one past the last index that it sees, which is its own global index + 1. Padding has
            start = end = 0.
        runs: the key runs of *all* devices of the grouping, a row for each.
    """

    grouping: Grouping
    lanes: int
    devices: range
    document: Int32[np.ndarray, "D M"]
    position: Int32[np.ndarray, "D M"]
    start: Int32[np.ndarray, "D M"]
    end: Int32[np.ndarray, "D M"]
    runs: KeyRuns


def max_documents_per_group(max_tokens_per_device: int) -> int:
    """Return how many documents a group of several members may hold.

    Each document adds two key runs to every member, and the number of runs is part of the compiled
    program. With one document per 32 tokens, searching the runs costs little compared to attention.
    """
    return max(64, max_tokens_per_device // 32)


def max_runs(max_tokens_per_device: int) -> int:
    """Return the largest number of key runs on a device in any microbatch of `schedule`.

    Two for every document of a group of several members; a group of one member has a single run on
    each device.
    """
    return 2 * max_documents_per_group(max_tokens_per_device)


def num_runs(widest: int, lanes: int, max_tokens_per_device: int) -> int:
    """Return the number of key runs per device that a program is compiled for.

    Args:
        widest: devices of the program's widest group.
        lanes: devices that exchange heads with each other in its microbatches.
        max_tokens_per_device: M.
    """
    return max_runs(max_tokens_per_device) if widest > lanes else 1


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
        microbatch: grouping, lanes and documents.
        lengths: tokens of every document of the schedule.
        max_tokens_per_device: M, slots of each device's buffer.
        devices: the devices to build buffers for (a host's own); all if None.
        num_runs: R. Rows with fewer runs are filled up with empty runs; if None, R is the largest
            number that a device needs. With `max_runs`, shapes are the same for any schedule.

    Raises:
        ValueError: if a group's documents do not fit, a group is not of whole members, or a device
            has more than `num_runs` runs.
    """
    tokens = checks.integer("max_tokens_per_device", max_tokens_per_device, least=1)
    if num_runs is not None:
        num_runs = checks.integer("num_runs", num_runs, least=1)
    num_devices = sum(microbatch.grouping)
    devices = range(num_devices) if devices is None else devices
    if devices.step != 1 or not 0 <= devices.start <= devices.stop <= num_devices:
        raise ValueError(f"devices must be a range within 0 … {num_devices}, got {devices}.")
    if num_devices * tokens > np.iinfo(np.int32).max:
        raise ValueError(
            f"{num_devices} devices of {tokens} tokens pass 2**31 - 1, the greatest index of a "
            "token; lower max_tokens_per_device."
        )
    _require_members(microbatch)
    document = np.full((len(devices), tokens), -1, np.int32)
    packed = PackedMicrobatch(
        grouping=microbatch.grouping,
        lanes=microbatch.lanes,
        devices=devices,
        document=document,
        position=np.zeros_like(document),
        start=np.zeros_like(document),
        end=np.zeros_like(document),
        runs=KeyRuns((), ()),
    )
    runs: list[tuple[np.ndarray, np.ndarray]] = []
    first = 0
    for size, held in zip(microbatch.grouping, microbatch.documents, strict=True):
        own = np.array([lengths[d] for d in held], np.int64)
        if int(own.sum()) > size * tokens:
            raise ValueError(
                f"the group of devices {first} … {first + size - 1} has documents of {own.sum()} "
                f"tokens, more than {size} * {tokens}."
            )
        runs += _pack_group(packed, first, size, np.array(held, np.int32), own, tokens)
        first += size
    return dataclasses.replace(packed, runs=_stack(runs, num_runs))


def _require_members(microbatch: Microbatch) -> None:
    lanes = checks.integer("lanes", microbatch.lanes, least=1)
    if any(size % lanes for size in microbatch.grouping):
        raise ValueError(
            f"groups of {microbatch.grouping} devices are not of whole members of {lanes} lanes."
        )


def _pack_group(
    packed: PackedMicrobatch,
    first: int,
    size: int,
    held: Int32[np.ndarray, "documents"],
    lengths: np.ndarray,
    tokens: int,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Fill the rows of a group's devices; return the runs of each device."""
    begin = first * tokens + np.cumsum(lengths) - lengths
    members, lanes = size // packed.lanes, packed.lanes
    index, chunk = _cut(lengths, begin, members)
    runs = []
    for member in range(members):
        mine = [member, 2 * members - 1 - member]
        begins, sizes = index[:, mine].reshape(-1), chunk[:, mine].reshape(-1)
        joined = _join(begins, sizes)
        here = range(first + member * lanes, first + (member + 1) * lanes)
        runs += [_clip(*joined, lane * tokens, (lane + 1) * tokens) for lane in range(lanes)]
        if here.stop <= packed.devices.start or here.start >= packed.devices.stop:
            continue
        which = np.repeat(np.arange(held.size), chunk[:, mine].sum(axis=1))
        own = np.repeat(begins - (np.cumsum(sizes) - sizes), sizes) + np.arange(which.size)
        for lane, device in enumerate(here):
            if device in packed.devices:
                part = slice(lane * tokens, (lane + 1) * tokens)
                documents, indices = which[part], own[part]
                row, used = device - packed.devices.start, documents.size
                packed.document[row, :used] = held[documents]
                packed.position[row, :used] = indices - begin[documents]
                packed.start[row, :used] = begin[documents]
                packed.end[row, :used] = indices + 1
    return runs


def _cut(lengths: np.ndarray, begin: np.ndarray, members: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (global index, tokens) of the chunks of each document, both `[documents, 2·members]`.

    The remainder of a length divided by 2·members is dealt out one token at a time, in turns: a
    member whose turn comes twice gets two of these tokens.
    """
    each, over = np.divmod(lengths, 2 * members)
    first_turn = (np.cumsum(over) - over) % members
    turn = (np.arange(members) - first_turn[:, None]) % members
    early = each[:, None] + (turn < over[:, None])
    late = each[:, None] + (turn + members < over[:, None])
    chunk = np.concatenate([early, late[:, ::-1]], axis=1)
    return begin[:, None] + np.cumsum(chunk, axis=1) - chunk, chunk


def _join(begins: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (starts, lengths) of the runs; adjacent chunks of the stream are merged."""
    begins, sizes = begins[sizes > 0], sizes[sizes > 0]
    if not sizes.size:
        return begins, sizes
    new = np.concatenate([[True], begins[1:] != begins[:-1] + sizes[:-1]])
    return begins[new], np.add.reduceat(sizes, np.flatnonzero(new))


def _clip(
    starts: np.ndarray, sizes: np.ndarray, begin: int, end: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return (starts, lengths) of the parts of runs in slots `begin … end` of a member."""
    first = np.cumsum(sizes) - sizes
    low, high = np.maximum(first, begin), np.minimum(first + sizes, end)
    inside = high > low
    return (starts + low - first)[inside], (high - low)[inside]


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
