"""Divide a kernel's work among the multiprocessors of a GPU.

Work is a list of items. An item is a block of queries (or of keys) of one head of one batch row,
with the blocks that it visits, one per *step*. A device with few heads and a short sequence has
fewer items than multiprocessors, or only a few more, and under a causal mask the longest item has
twice the mean work: most multiprocessors would wait for one. So items are cut into *parts*: each
visits some of the item's steps and writes a partial result, and the partial results are added up
(or merged) afterwards, in a fixed order. The same call gives the same bits.

The number of parts is static: `parts_for` counts what the usual masks would give. This module knows
no kernel; `mosaic_call` and `triton_call` use it.
"""

import dataclasses
import functools
import heapq
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, Int32

EVEN = 1.1
"""Most work of the busiest multiprocessor, in units of the mean, that needs no parts."""

_MOST_PARTS = 32
_MANY = 24  # items per multiprocessor from which on the work is even whatever the mask


@dataclasses.dataclass(frozen=True)
class WorkSplit:
    """The work of each program of a persistent grid.

    Items are sorted by the length of their spans, longest first, over all heads and rows. They are
    dealt out in rounds of alternating direction, so that the program with the longest item of one
    round gets the shortest of the next. The programs work on all heads at the same time. Finishing
    some heads before others would use the cache better if there are many kv heads, but then each
    section of heads ends with short items for the same programs, and some programs do up to 1.7
    times the mean work (causal, 16k tokens).

    Attributes:
        blocks: number of blocks of each head of each batch row.
        heads: number of heads of each batch row.
        rows: number of batch rows.
        programs: number of programs of the grid.
        parts: number of parts that each item is cut into.
    """

    blocks: int
    heads: int
    rows: int
    programs: int
    parts: int = 1

    @classmethod
    def over_processors(
        cls, blocks: int, heads: int, rows: int, steps: int, processors: int
    ) -> "WorkSplit":
        """Return the split of items with at most `steps` steps over `processors`."""
        parts = parts_for(blocks, heads * rows, steps, processors)
        items = blocks * heads * rows * parts
        return cls(blocks, heads, rows, min(items, processors), parts)

    def rounds(self, program: Any) -> Any:
        """Return how many parts a program processes."""
        whole, left = divmod(self.blocks * self.heads * self.rows * self.parts, self.programs)
        rank = program if whole % 2 == 0 else self.programs - 1 - program
        return whole + (rank < left).astype(jnp.int32)

    def item(self, program: Any, turn: Any) -> Any:
        """Return (rank of the block, part, head, batch row) of a program's work in round `turn`."""
        forth = lax.rem(turn, jnp.int32(2)) == 0
        position = jnp.where(forth, program, self.programs - 1 - program)
        rest, head = divide(turn * self.programs + position, self.heads)
        rest, row = divide(rest, self.rows)
        rank, part = divide(rest, self.parts)
        return rank, part, head, row


def part_of(steps: Any, part: Any, parts: int) -> tuple[Any, Any]:
    """Return the first step of a part, and the first step after it; the first parts are larger.

    Args:
        steps: number of steps of the item; an integer, or an array of int32.
        part: number of the part, likewise.
        parts: number of parts.

    >>> [tuple(map(int, part_of(10, part, 4))) for part in range(4)]
    [(0, 3), (3, 6), (6, 8), (8, 10)]
    """
    if parts == 1:
        return 0, steps
    traced = isinstance(steps, jax.Array)
    each, left = divide(steps, parts) if traced else np.divmod(steps, parts)
    begin = part * each + (jnp if traced else np).minimum(part, left)
    return begin, begin + each + (part < left)


def are_few(items: int, processors: int) -> bool:
    """Return whether items may have to be cut, and their order matters, for the work to be even."""
    return items < _MANY * processors


@functools.lru_cache(maxsize=1024)
def parts_for(blocks: int, copies: int, steps: int, processors: int) -> int:
    """Return the number of parts to cut every item into.

    It is the smallest number for which no multiprocessor has more than `EVEN` times the mean work,
    whether the mask is causal, or shows each block everything, or shows half of the blocks
    everything and the others nothing (the hops of a ring); or the best one, if none is that even.

    Args:
        blocks: number of blocks of each head of each batch row.
        copies: number of heads times number of batch rows.
        steps: most steps that an item can have.
        processors: number of multiprocessors.
    """
    if not are_few(blocks * copies, processors):
        return 1
    least = (float("inf"), 1)
    for parts in range(1, min(_MOST_PARTS, steps) + 1):
        busiest = max(
            busiest_over_mean(item_steps, copies, parts, processors)
            for item_steps in usual_steps(blocks, steps).values()
        )
        if busiest < EVEN:
            return parts
        least = min(least, (busiest, parts))
    return least[1]


@functools.lru_cache(maxsize=1024)
def cuts_for(blocks: int, copies: int, heads: int, steps: int, processors: int) -> tuple[int, int]:
    """Return (head parts, span parts) to cut every item into, for a grid that hardware schedules.

    As `parts_for`, but a part has some of the heads that pass a block, for some of its span, and
    each multiprocessor takes the next part when it is free.
    Spans are cut only if every head is a part already: a head in each part leaves the finest cuts.

    Args:
        blocks: number of blocks of each head.
        copies: number of heads times number of batch rows.
        heads: number of heads that pass each block.
        steps: most steps that an item can have for each of these heads.
        processors: number of multiprocessors.
    """
    if not are_few(blocks * copies, processors):
        return 1, 1
    divisors = [(n, 1) for n in range(1, heads) if heads % n == 0]
    cuts = [*divisors, *((heads, n) for n in range(1, min(_MOST_PARTS // heads, steps) + 1))]
    least = (float("inf"), (1, 1))
    for cut in cuts:
        busiest = max(
            queued_over_mean(item_steps, copies * cut[0], cut[1], processors)
            for item_steps in usual_steps(blocks, steps).values()
        )
        if busiest < EVEN:
            return cut
        least = min(least, (busiest, cut))
    return least[1]


def cut_spans(spans: Int32[Array, "B1 X 4"], parts: int) -> Int32[Array, "B1 Y 4"]:
    """Return the spans of the parts of each block, all parts of a block one after the other.

    `spans` are those of a `BlockMap`; a part of a span is a span, too.
    """
    first, full_first, full_last, last = (spans[..., i, None] for i in range(4))
    begin, stop = part_of(last - first, jnp.arange(parts, dtype=jnp.int32)[None, None], parts)
    begin, stop = first + begin, first + stop
    full = (jnp.clip(x, begin, stop) for x in (full_first, full_last))
    cut = jnp.stack(jnp.broadcast_arrays(begin, *full, stop), axis=3)
    return cut.reshape(spans.shape[0], -1, 4)


def usual_steps(blocks: int, steps: int) -> dict[str, Int[np.ndarray, "blocks"]]:
    """Return the steps of each block under the usual masks, longest first.

    >>> {name: x.tolist() for name, x in usual_steps(4, 8).items()}
    {'causal': [8, 6, 4, 2], 'full': [8, 8, 8, 8], 'half': [8, 8, 0, 0]}
    """
    left = np.arange(blocks, 0, -1)
    return {
        "causal": -(-left * steps // blocks),
        "full": np.full(blocks, steps),
        "half": np.where(left > blocks // 2, steps, 0),
    }


def busiest_over_mean(
    item_steps: Int[np.ndarray, "blocks"], copies: int, parts: int, processors: int
) -> float:
    """Return the steps of the busiest multiprocessor over the mean, as `WorkSplit` deals them."""
    work = np.repeat(_part_steps(item_steps, parts).reshape(-1), copies)
    programs = min(len(work), processors)
    rounds = np.pad(work, (0, -len(work) % programs)).reshape(-1, programs)
    rounds[1::2] = rounds[1::2, ::-1]
    return float(rounds.sum(axis=0).max() * processors / work.sum())


def queued_over_mean(
    item_steps: Int[np.ndarray, "blocks"], copies: int, parts: int, processors: int
) -> float:
    """As `busiest_over_mean`, if each multiprocessor takes the next part when it is free."""
    work = np.tile(_part_steps(item_steps, parts)[:, None], (1, copies, 1)).reshape(-1)
    busy = [0] * processors
    for steps in work.tolist():
        heapq.heapreplace(busy, busy[0] + steps)
    return float(max(busy) * processors / work.sum())


def _part_steps(item_steps: Int[np.ndarray, "blocks"], parts: int) -> Int[np.ndarray, "blocks p"]:
    begin, stop = part_of(item_steps[:, None], np.arange(parts)[None], parts)
    return np.broadcast_to(stop - begin, (len(item_steps), parts))


def divide(x: Any, by: int) -> tuple[Any, Any]:
    """Return (quotient, remainder) of non-negative int32 numbers, by the simplest instructions."""
    return (x, 0) if by == 1 else (lax.div(x, jnp.int32(by)), lax.rem(x, jnp.int32(by)))
