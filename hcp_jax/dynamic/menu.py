"""Choose a menu of groupings for many batches, and schedule several batches together.

`scheduler.schedule` looks at one batch. This module looks across batches. Training compiles its
menu once, before the first step, so the menu must also serve later batches. And the tokens of a
batch are rarely a multiple of what the devices hold, so its last microbatch is partly empty unless
several batches are scheduled together.
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
    """One optimizer step out of several that were scheduled together.

    Attributes:
        plan: its microbatches; `plan.lengths` are the lengths of the documents of this step only.
        sources: (batch, index in that batch) of each of these documents.
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
    """Choose the groupings that training should compile, for batches like these.

    Candidates are the groupings that the batches choose for themselves, groupings of equal sizes,
    and groupings of two neighbouring sizes on halves, quarters and eighths of the devices, which
    suit other batches too. The groupings that take most of the modelled time are kept.

    Args:
        batches: lengths of the documents of each sample batch; a few dozen batches are enough.
        num_devices: as in `schedule`.
        max_tokens_per_device: as in `schedule`.
        min_cp_size: as in `schedule`.
        max_cp_size: as in `schedule`.
        cost: as in `schedule`.
        max_layouts: most groupings in the menu, which is the number of programs to compile.

    Returns:
        The menu, widest groups first. It always contains a grouping with the widest possible group,
        so that every document that fits at all can be trained on.

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
    # Skip mixes with groups wider than any batch chose; only the fallback may be wider.
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
        # Remove in halves: how the rest is then used shows which of the others are needed.
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

    When batches are scheduled together, only the very last microbatch is partly empty. Microbatches
    come out ordered by length. Each run of `len(batches)` microbatches is dealt to the steps, one
    each, in an order given by the seed, so that every step has long and short documents.

    Args:
        batches: lengths of the documents of each batch.
        num_devices: as in `schedule`.
        max_tokens_per_device: as in `schedule`.
        min_cp_size: as in `schedule`.
        max_cp_size: as in `schedule`.
        menu: as in `schedule`.
        cost: as in `schedule`.
        seed: seed of the order; the same seed gives the same steps.

    Returns:
        A step for each batch, with its microbatches and the sources of its documents. Together the
        steps contain every document once. A step has no microbatch only if there are fewer
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
    """Return groupings of equal sizes, and of two neighbouring sizes on eighths of the devices."""
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
