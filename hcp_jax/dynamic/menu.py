"""From many batches: the menu that serves them all, and steps that share their documents.

`scheduler.schedule` looks at one batch. Training compiles its menu once, before the first step, so
the menu has to serve batches that are not there yet; and a batch's tokens are rarely a multiple of
what the devices hold, so its last microbatch is part empty unless several batches are filled
together. Both look across batches, which is why they stand apart.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from hcp_jax.base import checks
from hcp_jax.dynamic.cost import Cost
from hcp_jax.dynamic.plan import Schedule
from hcp_jax.dynamic.scheduler import MAX_MENU, check_lengths, schedule
from hcp_jax.sequence import groupings
from hcp_jax.sequence.groupings import Layout
from hcp_jax.sequence.packing import Microbatch


class Step(NamedTuple):
    """One optimizer step of several that were scheduled together.

    Attributes:
        plan: its microbatches; `plan.lengths` are the lengths of this step's documents alone.
        sources: for each of them, (batch, index in that batch).
    """

    plan: Schedule
    sources: tuple[tuple[int, int], ...]


def choose_menu(
    batches: Iterable[Sequence[int] | np.ndarray],
    num_devices: int = 64,
    max_tokens_per_device: int = 2048,
    min_cp_size: int = 1,
    max_cp_size: int | None = None,
    cost: Cost | None = None,
    max_layouts: int = MAX_MENU,
) -> tuple[Layout, ...]:
    """Choose the layouts that training should compile, for batches like these.

    Tried are the layouts that the batches choose for themselves, layouts of equal groups, and
    layouts of two neighbouring sizes on halves, quarters and eighths of the devices, which fit
    whatever the next batch brings. Kept are those that most of the modelled time goes to.

    Args:
        batches: lengths of the documents of each sample batch; a few dozen are plenty.
        num_devices: as in `schedule`.
        max_tokens_per_device: as in `schedule`.
        min_cp_size: as in `schedule`.
        max_cp_size: as in `schedule`.
        cost: as in `schedule`.
        max_layouts: programs to compile at most.

    Returns:
        The menu, widest groups first. A layout with as wide groups as there can be is always in it,
        so that any document that fits at all can be trained on.

    Raises:
        ValueError: as `schedule`; and if there are no batches, or max_layouts is less than 1.
    """
    samples = [check_lengths(batch) for batch in batches]
    max_layouts = checks.integer("max_layouts", max_layouts, least=1)
    if not samples:
        raise ValueError("choose_menu needs at least one batch.")
    cost = Cost() if cost is None else cost
    limits = num_devices, max_tokens_per_device, min_cp_size, max_cp_size

    def plans(menu: Sequence[Layout] | None) -> list[Schedule]:
        return [schedule(sample, *limits, menu=menu, cost=cost) for sample in samples]

    sizes = groupings.group_sizes(num_devices, min_cp_size, max_cp_size)
    free = plans(None)
    # Not all of a mix's sizes can be of use: none wider than any batch chose, but for the fallback.
    widest = max((max(mb.layout) for plan in free for mb in plan.microbatches), default=sizes[0])
    fallback = groupings.canonical(
        groupings.uniform(sizes[-1], num_devices, sizes), cost.devices_per_host
    )
    tried = _mixes(num_devices, [s for s in sizes if s <= widest], sizes, cost.devices_per_host)
    own = {mb.layout: None for plan in free for mb in plan.microbatches}
    menu = tuple(dict.fromkeys([fallback, *own, *tried]))
    while True:
        used = _seconds_by_layout(plans(menu))
        ranked = sorted(used, key=lambda layout: (-used[layout], layout))
        # By halves: what the layouts that go leave behind shows which of the others are needed.
        keep = max(max_layouts, len(menu) // 2)
        kept = [layout for layout in ranked if layout != fallback][: keep - 1]
        if len(menu) <= max_layouts:
            return tuple(sorted([*kept, fallback], reverse=True))
        menu = (fallback, *kept)


def schedule_batches(
    batches: Sequence[Sequence[int] | np.ndarray],
    num_devices: int = 64,
    max_tokens_per_device: int = 2048,
    min_cp_size: int = 1,
    max_cp_size: int | None = None,
    menu: Iterable[Sequence[int]] | None = None,
    cost: Cost | None = None,
    seed: int = 0,
) -> tuple[Step, ...]:
    """Schedule several batches together (a look-ahead), as many optimizer steps as batches.

    Filled together, only the last microbatch of all is part empty. Microbatches come out by length;
    every run of `len(batches)` of them is dealt one to each step in an order that the seed decides,
    so that each step sees long and short documents as each batch did.

    Args:
        batches: lengths of the documents of each batch.
        num_devices: as in `schedule`; so are the others.
        max_tokens_per_device: tokens of a device's buffer.
        min_cp_size: the least size of a group.
        max_cp_size: the largest size of a group.
        menu: layouts that may be used.
        cost: the cost model.
        seed: decides the order; the same seed gives the same steps.

    Returns:
        A step for each batch, each with every microbatch it runs and where its documents are from.
        Together they hold every document once. A step has no microbatch only where there are fewer
        microbatches than batches.

    Raises:
        ValueError: as `schedule`; and if there are no batches.
    """
    if not batches:
        raise ValueError("schedule_batches needs at least one batch.")
    samples = [check_lengths(batch) for batch in batches]
    sources = [(b, i) for b, sample in enumerate(samples) for i in range(sample.size)]
    together = schedule(
        np.concatenate(samples),
        num_devices,
        max_tokens_per_device,
        min_cp_size,
        max_cp_size,
        menu,
        cost,
        seed,
    )
    rng = np.random.default_rng(seed)
    dealt: list[list[Microbatch]] = [[] for _ in batches]
    for first in range(0, len(together.microbatches), len(batches)):
        run = together.microbatches[first : first + len(batches)]
        for step, microbatch in zip(rng.permutation(len(batches)), run, strict=False):
            dealt[step].append(microbatch)
    return tuple(_step(together, microbatches, sources) for microbatches in dealt)


def _step(
    together: Schedule, microbatches: Sequence[Microbatch], sources: Sequence[tuple[int, int]]
) -> Step:
    held = sorted(d for mb in microbatches for group in mb.documents for d in group)
    renamed = {d: i for i, d in enumerate(held)}
    plan = Schedule(
        lengths=tuple(together.lengths[d] for d in held),
        num_devices=together.num_devices,
        max_tokens_per_device=together.max_tokens_per_device,
        menu=together.menu,
        microbatches=tuple(
            Microbatch(mb.layout, tuple(tuple(renamed[d] for d in g) for g in mb.documents))
            for mb in microbatches
        ),
        cost=together.cost,
        sizes=together.sizes,
    )
    return Step(plan, tuple(sources[d] for d in held))


def _mixes(
    num_devices: int, wanted: Sequence[int], sizes: tuple[int, ...], devices_per_host: int
) -> list[Layout]:
    """Return layouts of equal groups, and of two neighbouring sizes on eighths of the devices."""
    mixes = [groupings.uniform(size, num_devices, sizes) for size in wanted]
    can = groupings.composable(num_devices, sizes)
    for narrow, wide in itertools.pairwise(wanted):
        for eighths in range(1, 8):
            wides = [wide] * (num_devices * eighths // (8 * wide))
            narrows = [narrow] * ((num_devices - sum(wides)) // narrow)
            if wides and can[num_devices - sum(wides) - sum(narrows)]:
                mixes.append(groupings.complete([*wides, *narrows], num_devices, sizes))
    return list(dict.fromkeys(groupings.canonical(mix, devices_per_host) for mix in mixes))


def _seconds_by_layout(plans: Iterable[Schedule]) -> dict[Layout, float]:
    used: dict[Layout, float] = {}
    for plan in plans:
        for mb, seconds in zip(plan.microbatches, plan.microbatch_seconds, strict=True):
            used[mb.layout] = used.get(mb.layout, 0.0) + seconds
    return used
