"""Choose the programs to compile for many batches, and schedule several batches together.

`scheduler.schedule` looks at one batch. This module looks across batches. Training compiles its
programs before the first step, so they must also serve later batches. And the tokens of a batch are
rarely a multiple of what the devices hold, so its last microbatch is partly empty unless several
batches are scheduled together.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from hcp_jax.base import checks
from hcp_jax.dynamic.cost import Cost
from hcp_jax.dynamic.pipeline import order
from hcp_jax.dynamic.plan import Schedule
from hcp_jax.dynamic.scheduler import check_lengths, program_widths, schedule
from hcp_jax.sequence.packing import Microbatch

_WORTH = 2e-3
"""Share of the modelled time that a program must save to be worth compiling."""


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
    max_programs: int | None = None,
) -> tuple[int, ...]:
    """Choose the programs that training should compile, for batches like these.

    Programs are removed one after another, the one that saves least first, until each of those that
    are left saves 0.2 % of the modelled time and there are at most `max_programs`.

    Args:
        batches: lengths of the documents of each sample batch; a few dozen batches are enough.
        num_devices: as in `schedule`.
        max_tokens_per_device: as in `schedule`.
        min_cp_size: as in `schedule`.
        max_cp_size: as in `schedule`.
        cost: as in `schedule`.
        max_programs: most programs to compile; any number if None (there are never many: one for
            each width of `Cost.widths`).

    Returns:
        Widths in devices, ascending. The widest possible one is always among them, so that every
        document that fits at all can be trained on.

    Raises:
        ValueError: as `schedule`; and if there are no batches, or max_programs is less than 1.

    >>> choose_menu([[2000, 150, 900, 700]], num_devices=8, max_tokens_per_device=512)
    (8,)
    """
    samples = [check_lengths(batch) for batch in batches]
    if not samples:
        raise ValueError("choose_menu needs at least one batch.")
    cost = Cost() if cost is None else cost
    menu = program_widths(cost, num_devices, min_cp_size, max_cp_size)
    most = len(menu)
    if max_programs is not None:
        most = checks.integer("max_programs", max_programs, least=1)

    def seconds(menu: Sequence[int]) -> float:
        limits = num_devices, max_tokens_per_device, min_cp_size, max_cp_size
        plans = (schedule(sample, *limits, menu=menu, cost=cost) for sample in samples)
        return sum(plan.modelled_seconds for plan in plans)

    now = seconds(menu)
    while len(menu) > 1:
        shorter = [tuple(w for w in menu if w != width) for width in menu[:-1]]
        took, best = min((seconds(menu), menu) for menu in shorter)
        if len(menu) <= most and took > now * (1 + _WORTH):
            break
        menu, now = best, took
    return menu


def schedule_batches(
    batches: Sequence[Sequence[int] | np.ndarray],
    num_devices: int = 64,
    max_tokens_per_device: int = 2048,
    min_cp_size: int = 1,
    max_cp_size: int | None = None,
    menu: Iterable[int] | None = None,
    cost: Cost | None = None,
    seed: int = 0,
    num_stages: int = 1,
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
        num_stages: stages of a pipeline, as in `schedule`; each step passes them by itself, its
            microbatches in the order in which stages wait least.

    Returns:
        A step for each batch, with its microbatches and the sources of its documents. Together the
        steps contain every document once. A step has no microbatch only if there are fewer
        microbatches than batches.

    Raises:
        ValueError: as `schedule`; and if there are no batches.

    >>> steps = schedule_batches([[900, 300], [500, 100]], num_devices=8, max_tokens_per_device=256)
    >>> len(steps)
    2
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
        num_stages=num_stages,
        num_steps=len(batches),
    )
    rng = np.random.default_rng(seed)
    dealt: list[list[Microbatch]] = [[] for _ in batches]
    for first in range(0, len(together.microbatches), len(batches)):
        run = together.microbatches[first : first + len(batches)]
        for step, microbatch in zip(rng.permutation(len(batches)), run, strict=False):
            dealt[step].append(microbatch)
    steps = tuple(_step(together, microbatches, sources) for microbatches in dealt)
    return steps if num_stages == 1 else tuple(_in_order(step, num_stages) for step in steps)


def _in_order(step: Step, num_stages: int) -> Step:
    """Return the step with its microbatches in the order in which stages wait least."""
    plan = step.plan
    if not plan.microbatches:
        return step
    chosen = order(plan.microbatch_seconds, num_stages)
    microbatches = tuple(plan.microbatches[i] for i in chosen)
    return step._replace(plan=dataclasses.replace(plan, microbatches=microbatches))


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
            dataclasses.replace(mb, documents=_renamed(mb.documents, renamed))
            for mb in microbatches
        ),
        cost=together.cost,
        sizes=together.sizes,
    )
    return Step(plan, tuple(sources[d] for d in held))


def _renamed(
    documents: Iterable[Sequence[int]], names: Mapping[int, int]
) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(names[d] for d in group) for group in documents)
