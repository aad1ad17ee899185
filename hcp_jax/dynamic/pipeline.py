"""Decide which microbatch each stage of a pipeline computes at each tick; no jax.

The host drives all stages in lockstep. At one tick a stage runs the forward pass of one microbatch
and the backward pass of another (1F1B: Narayanan et al., 2019). With three microbatches on two
stages (F and B are forward and backward of microbatch 0, 1, 2):

    tick       0     1     2     3     4
    stage 0   F0    F1   F2 B0  B1    B2
    stage 1       F0 B0 F1 B1  F2 B2

With v virtual stages a device holds v chunks of consecutive layers (Narayanan et al., 2021): chunk
c of stage s is number `c * pp + s` of `v * pp`. Microbatches then pass in groups of pp, and a last
group that is not full is filled with empty ones.

A stage keeps the input of a chunk from its forward to its backward pass, where it computes the
chunk again. In lockstep stage 0 keeps up to 2 pp - 1 inputs (v = 1); 1F1B without lockstep would
keep pp of them.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from hcp_jax.base import checks


class Work(NamedTuple):
    """One pass of one stage at one tick.

    Attributes:
        microbatch: number of the microbatch.
        chunk: which of the stage's chunks computes it.
        slot: where the stage keeps the chunk's input from its forward to its backward pass.
    """

    microbatch: int
    chunk: int
    slot: int


Row = tuple[Work | None, ...]
"""Work of each stage; None for a stage that waits."""


class Tick(NamedTuple):
    """Work of all stages at one tick: first the forward passes, then the backward passes."""

    forward: Row
    backward: Row


class Schedule(NamedTuple):
    """All ticks of one optimizer step.

    Attributes:
        ticks: in the order in which they run; each has some work.
        num_stages: pp.
        virtual_stages: v, the chunks of a stage.
        num_slots: largest number of inputs that a stage keeps at one time.
    """

    ticks: tuple[Tick, ...]
    num_stages: int
    virtual_stages: int
    num_slots: int


def make_schedule(num_microbatches: int, num_stages: int, virtual_stages: int = 1) -> Schedule:
    """Return the ticks that run some microbatches forward and backward through all stages.

    Args:
        num_microbatches: m; they run in the order of their numbers.
        num_stages: pp.
        virtual_stages: v, the chunks of consecutive layers on each stage.

    Raises:
        ValueError: if a number is not a positive integer.

    >>> for tick in make_schedule(2, 2).ticks:
    ...     print(*(row and tuple(w and w.microbatch for w in row) for row in tick))
    (0, None) (None, None)
    (1, 0) (None, 0)
    (None, 1) (0, 1)
    (None, None) (1, None)
    """
    m = checks.integer("num_microbatches", num_microbatches, least=1)
    pp = checks.integer("num_stages", num_stages, least=1)
    v = checks.integer("virtual_stages", virtual_stages, least=1)
    begun = _tick_numbers(m, pp, v)
    # The last chunk turns from forward to backward within a tick; the others mirror the way there.
    ended = {(s, i, c): _mirrored(t, s, c, pp, v) for (s, i, c), t in begun.items()}
    slots, num_slots = _assign_slots(begun, ended, pp)
    length = max(ended.values()) + 1
    rows: list[list[list[Work | None]]] = [
        [[None] * pp for _ in range(length)] for _ in ("forward", "backward")
    ]
    for passes, numbers in zip(rows, (begun, ended), strict=True):
        for (stage, microbatch, chunk), tick in numbers.items():
            passes[tick][stage] = Work(microbatch, chunk, slots[stage, microbatch, chunk])
    ticks = [Tick(tuple(f), tuple(b)) for f, b in zip(*rows, strict=True)]
    return Schedule(tuple(t for t in ticks if any(t.forward + t.backward)), pp, v, num_slots)


def _tick_numbers(m: int, pp: int, v: int) -> dict[tuple[int, int, int], int]:
    """Return the tick of each forward pass, by (stage, microbatch, chunk)."""
    found = {}
    for stage, i, chunk in itertools.product(range(pp), range(m), range(v)):
        group, member = divmod(i, pp)
        found[stage, i, chunk] = (group * v + chunk) * pp + member + stage
    return found


def _mirrored(forward: int, stage: int, chunk: int, pp: int, v: int) -> int:
    """Return the tick of the backward pass that belongs to a forward pass."""
    behind = v * pp - 1 - (chunk * pp + stage)  # number of chunks behind this one
    last_forward = forward + behind
    return last_forward + behind


def _assign_slots(
    begun: dict[tuple[int, int, int], int], ended: dict[tuple[int, int, int], int], pp: int
) -> tuple[dict[tuple[int, int, int], int], int]:
    """Give every kept input a slot of its stage that no other input has at the time."""
    slots, most = {}, 0
    for stage in range(pp):
        free_from: list[int] = []  # of each slot, the first tick at which it is free
        for key in sorted((k for k in begun if k[0] == stage), key=begun.__getitem__):
            free = (n for n, tick in enumerate(free_from) if tick <= begun[key])
            slot = next(free, len(free_from))
            free_from[slot : slot + 1] = [ended[key] + 1]
            slots[key] = slot
        most = max(most, len(free_from))
    return slots, most


def seconds(
    schedule: Schedule,
    forward: Sequence[float] | Float[np.ndarray, "m"],
    backward: Sequence[float] | Float[np.ndarray, "m"],
) -> float:
    """Return the time of all ticks; each lasts as long as the stage that needs longest.

    Args:
        schedule: from `make_schedule`, for m microbatches.
        forward: seconds of the forward pass of each microbatch through one stage, all its chunks.
        backward: seconds of its backward pass through one stage.

    >>> seconds(make_schedule(6, 4), [1] * 6, [2] * 6)  # m + pp - 1 times 3
    27.0
    """
    v = schedule.virtual_stages

    def needed(work: Work | None, times: Sequence[float] | Float[np.ndarray, "m"]) -> float:
        return 0.0 if work is None else float(times[work.microbatch]) / v

    return sum(
        max(
            needed(f, forward) + needed(b, backward)
            for f, b in zip(tick.forward, tick.backward, strict=True)
        )
        for tick in schedule.ticks
    )


def step_bound(times: Sequence[float] | Float[np.ndarray, "m"], num_stages: int) -> float:
    """Return Σ t + (pp - 1) · max t, to compare ways of forming microbatches without ticks.

    Ticks in order of length take at most as long, and not much less: every tick lasts at most as
    long as the longest microbatch in it, and the longest of all passes pp stages.

    Args:
        times: seconds of each microbatch on one stage, forward and backward.
        num_stages: pp.

    >>> step_bound([1, 1, 3], 4)
    14.0
    """
    return float(np.sum(times) + (num_stages - 1) * np.max(times))


def order(
    times: Sequence[float] | Float[np.ndarray, "m"], num_stages: int, virtual_stages: int = 1
) -> Int[np.ndarray, "m"]:
    """Return the order of microbatches, shortest or longest first, whose ticks take less time.

    Neighbours in this order take about the same time, so stages wait little for each other.

    Args:
        times: seconds of each microbatch on one stage, forward and backward; a third of it is the
            forward pass.
        num_stages: pp.
        virtual_stages: v.

    >>> order([2.0, 9.0, 1.0], 2).tolist() in ([2, 0, 1], [1, 0, 2])
    True
    """
    total = np.asarray(times, float)
    ticks = make_schedule(total.size, num_stages, virtual_stages)
    ascending = np.argsort(total, kind="stable")

    def duration(candidate: Int[np.ndarray, "m"]) -> float:
        return seconds(ticks, total[candidate] / 3, total[candidate] * (2 / 3))

    return min(ascending, ascending[::-1], key=duration)


def ratio_to_ideal(
    times: Sequence[float] | Float[np.ndarray, "m"], num_stages: int, virtual_stages: int = 1
) -> float:
    """Return the time of the ticks, in their best order, over that of stages that never wait.

    >>> [round(ratio_to_ideal([1.0] * 12, 4, v), 6) for v in (1, 2)]
    [1.25, 1.125]
    """
    chosen = np.asarray(times, float)[order(times, num_stages, virtual_stages)]
    ticks = make_schedule(chosen.size, num_stages, virtual_stages)
    return seconds(ticks, chosen / 3, chosen * (2 / 3)) / float(chosen.sum())
