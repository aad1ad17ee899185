"""Schedule documents as other systems do, for comparison with this library's scheduler.

These baselines share no code with the scheduler. Each returns a `Schedule`, so that one cost model
and one set of measures judge all. Where a detail is open, they get the better choice: packing is
best fit, fixed CP pays for no padding inside documents, and groups exchange heads inside hosts.
"""

import dataclasses
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from hcp_jax.dynamic.cost import Cost
from hcp_jax.dynamic.group import Group
from hcp_jax.dynamic.plan import Schedule
from hcp_jax.sequence.packing import Microbatch

# The reference's second scheduler limits a group to this multiple of the longest document's work.
HEADROOM = 1.05


class SeparateGroups(Cost):
    """Cost of groups that each make only their own transfers, as process groups do.

    In this library all groups of a microbatch share one program, and make the hops of its width.
    """

    def groups(self, grouping: Sequence[int], tokens: int) -> list[Group]:
        """Return the cost of each group in a program of its own width."""
        num_devices = sum(grouping)
        known = {size: self.group(size, size, num_devices, tokens) for size in set(grouping)}
        return [known[size] for size in grouping]


def separate(cost: Cost) -> SeparateGroups:
    """Return the same cost for groups that run separately."""
    return SeparateGroups(**{f.name: getattr(cost, f.name) for f in dataclasses.fields(cost)})


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Figures of one strategy on one batch, under the cost model.

    Attributes:
        seconds: modelled seconds of all microbatches; whole buffers are computed and sent.
        seconds_unpadded: the same if shapes followed the data: each device computes and sends only
            as many tokens as the fullest device of the microbatch has.
        num_microbatches: number of microbatches.
        num_programs: number of different widest groups among them.
        token_fill: share of slots that hold a token.
        balance: attention pairs of the mean device over those of the busiest, each summed over
            microbatches.
        idle_share: share of device-seconds spent waiting for a slower group.
        padding: tokens added inside documents, as a share of all real tokens.
    """

    seconds: float
    seconds_unpadded: float
    num_microbatches: float
    num_programs: float
    token_fill: float
    balance: float
    idle_share: float
    padding: float


def outcome(
    plan: Schedule,
    multiple: int | None = 1,
    step_seconds: Callable[[Sequence[float]], float] = sum,
) -> Outcome:
    """Measure a schedule.

    Args:
        plan: schedule of any scheduler.
        multiple: documents are padded to multiples of this number; it changes only
            `Outcome.padding`, neither time nor room. None means twice the size of the group.
        step_seconds: returns the seconds of a step from those of its microbatches.
    """
    unpadded: list[float] = []
    padding, cost = 0, plan.cost
    for mb in plan.microbatches:
        of_groups = mb.lengths(plan.lengths)
        fullest = max(
            -(-sum(of_group) // size) for size, of_group in zip(mb.grouping, of_groups, strict=True)
        )
        unpadded.append(cost.microbatch_seconds(mb.grouping, of_groups, fullest))
        for size, of_group in zip(mb.grouping, of_groups, strict=True):
            pad_to = 2 * size if multiple is None else multiple
            padding += sum(-length % pad_to for length in of_group)
    return Outcome(
        seconds=step_seconds(plan.microbatch_seconds),
        seconds_unpadded=step_seconds(unpadded),
        num_microbatches=len(plan.microbatches),
        num_programs=len({mb.widest for mb in plan.microbatches}),
        token_fill=plan.token_fill,
        balance=plan.balance,
        idle_share=plan.idle_share,
        padding=padding / sum(plan.lengths),
    )


def fixed_size(lengths: Sequence[int], num_devices: int, max_tokens_per_device: int) -> int:
    """Return the smallest group size that divides the devices and holds the longest document."""
    longest = max(lengths)
    return next(
        size
        for size in range(1, num_devices + 1)
        if num_devices % size == 0 and size * max_tokens_per_device >= longest
    )


def fixed_packed(
    lengths: Sequence[int], num_devices: int, max_tokens_per_device: int, cost: Cost
) -> Schedule:
    """Schedule with one CP size: pack documents by best fit and run the packs as they come."""
    size = fixed_size(lengths, num_devices, max_tokens_per_device)
    packs = _best_fit(range(len(lengths)), lengths, size * max_tokens_per_device)
    dealt = _deal(packs, size, num_devices)
    return _schedule(lengths, max_tokens_per_device, dealt, cost)


def fixed_balanced(
    lengths: Sequence[int], num_devices: int, max_tokens_per_device: int, cost: Cost
) -> Schedule:
    """Schedule with one CP size: packs of similar work share a microbatch, which balances it."""
    size = fixed_size(lengths, num_devices, max_tokens_per_device)
    longest_first = sorted(range(len(lengths)), key=lambda d: (-lengths[d], d))
    packs = _best_fit(longest_first, lengths, size * max_tokens_per_device)
    packs.sort(key=lambda pack: -sum(lengths[d] ** 2 for d in pack))
    dealt = _deal(packs, size, num_devices)
    return _schedule(lengths, max_tokens_per_device, dealt, cost)


def seeded_greedy(
    lengths: Sequence[int],
    num_devices: int,
    max_tokens_per_device: int,
    cost: Cost,
    multiple: int = 1,
) -> Schedule:
    """Schedule as the reference's second scheduler does, written from its description in words.

    Work is L² / size. In every microbatch the longest document left opens a group of the least size
    that holds it. Each next one tries that size and every larger one, on a group there is or on a
    new one, and goes where the greatest work of any group stays least, if that is under `HEADROOM`
    times L·M, with L the longest document of the microbatch. (That never binds: the squares of
    documents of L tokens or less that fit g·M tokens add up to at most L·g·M.) Devices that are
    left over double the smallest groups. Sizes are powers of two. (And the number of devices
    itself, so that other device counts, which the original does not survive, have an answer; what
    cannot double is left as empty groups of one.)

    Args:
        lengths: tokens of each document.
        num_devices: N.
        max_tokens_per_device: M.
        cost: cost model.
        multiple: documents are padded to multiples of this; the reference pads to 2·N. The
            schedule's lengths are the padded ones.
    """
    lengths = [-(-length // multiple) * multiple for length in lengths]
    sizes = [2**k for k in range(num_devices.bit_length())]
    sizes = sorted({*sizes, num_devices})
    left = sorted(range(len(lengths)), key=lambda d: (-lengths[d], d))
    if left and lengths[left[0]] > num_devices * max_tokens_per_device:
        raise ValueError(
            f"a document of {lengths[left[0]]} tokens, padded to a multiple of {multiple}, does "
            f"not fit {num_devices} * {max_tokens_per_device} tokens."
        )
    microbatches = []
    while left:
        limit = HEADROOM * lengths[left[0]] * max_tokens_per_device
        opened = _Opened(num_devices, max_tokens_per_device, limit)
        left = [d for d in left if not opened.place(d, lengths[d], sizes)]
        microbatches.append(opened.close())
    return _schedule(lengths, max_tokens_per_device, microbatches, cost)


def _schedule(
    lengths: Sequence[int], max_tokens_per_device: int, microbatches: list[Microbatch], cost: Cost
) -> Schedule:
    num_devices = sum(microbatches[0].grouping)
    return Schedule(
        lengths=tuple(lengths),
        num_devices=num_devices,
        max_tokens_per_device=max_tokens_per_device,
        menu=tuple(sorted({mb.widest for mb in microbatches})),
        microbatches=tuple(microbatches),
        cost=separate(cost),
        sizes=cost.widths(num_devices),
    )


class _Opened:
    """Hold the groups of one microbatch while `seeded_greedy` fills it."""

    def __init__(self, num_devices: int, max_tokens_per_device: int, limit: float):
        self.free = num_devices
        self.tokens = max_tokens_per_device
        self.limit = limit
        self.most = 0.0
        self.sizes = np.zeros(num_devices, np.int64)
        self.room = np.zeros(num_devices, np.int64)
        self.work = np.zeros(num_devices)
        self.documents: list[list[int]] = []

    def place(self, document: int, length: int, sizes: Sequence[int]) -> bool:
        best: tuple[float, int, int] | None = None
        count = len(self.documents)
        for size in sizes:
            if size * self.tokens < length:
                continue
            work = length * length / size
            able = (self.sizes[:count] == size) & (self.room[:count] >= length)
            load, group = 0.0, count
            if size > self.free:
                if not able.any():
                    continue
                group = int(np.argmin(np.where(able, self.work[:count], np.inf)))
                load = float(self.work[group])
            option = (max(self.most, load + work), size, group)
            if load + work <= self.limit and (best is None or option < best):
                best = option
            if count == 0 and best is not None:
                break  # the first document seeds the least size
        if best is None:
            return False
        projected, size, group = best
        if group == count:
            self.documents.append([])
            self.sizes[group], self.room[group] = size, size * self.tokens
            self.free -= size
        self.most = projected
        self.room[group] -= length
        self.work[group] += length * length / size
        self.documents[group].append(document)
        return True

    def close(self) -> Microbatch:
        count = len(self.documents)
        found = sorted(zip(self.sizes[:count].tolist(), self.documents, strict=True))
        while self.free:
            size, documents = found[0]
            if size > self.free:
                break
            self.free -= size
            found = found[1:]
            insort(found, (2 * size, documents))
        found += [(1, [])] * self.free
        found.sort(key=lambda group: -group[0])
        return Microbatch(
            grouping=tuple(size for size, _ in found),
            documents=tuple(tuple(documents) for _, documents in found),
        )


def _best_fit(order: Iterable[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack documents into at most `capacity` tokens, each where it leaves the least room."""
    packs: list[list[int]] = []
    open_packs: list[tuple[int, int]] = []  # (room, pack), ascending
    for document in order:
        length = lengths[document]
        place = bisect_left(open_packs, (length, -1))
        if place == len(open_packs):
            room, pack = capacity, len(packs)
            packs.append([])
        else:
            room, pack = open_packs.pop(place)
        packs[pack].append(document)
        insort(open_packs, (room - length, pack))
    return packs


def _deal(packs: list[list[int]], size: int, num_devices: int) -> list[Microbatch]:
    per_microbatch = num_devices // size
    dealt = []
    for first in range(0, len(packs), per_microbatch):
        part = packs[first : first + per_microbatch]
        part += [[]] * (per_microbatch - len(part))
        dealt.append(Microbatch((size,) * per_microbatch, tuple(map(tuple, part))))
    return dealt
