"""Implement the forward kernel on Mosaic GPU: FlashAttention-3 (Shah et al., 2024) for intervals.

A program works on 128 queries of a head at a time, 64 in each of two warpgroups; a third one loads.
With S_j = Q K_jᵀ the logits of the j-th block of keys and P_j their weights, a warpgroup computes

    matrix products   | S_0 |                | O += P_0 V_0, S_1 |                | O += P_1 V_1, …
    softmax           |     | P_0, rescale O |                   | P_1, rescale O |

The two warpgroups take turns, so that the softmax of one is hidden behind the products of the
other. A product and the next block's logits are issued together, so tensor cores wait for a
warpgroup only once per block.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hcp_jax import compat
from hcp_jax.kernels.core import CoreSpec
from hcp_jax.kernels.merge import Partial, merge_all
from hcp_jax.kernels.mosaic_blocks import (
    LOG2_E,
    PER_COLUMN,
    PER_ROW,
    ROWS,
    Queue,
    capped,
    hide,
    matrices,
    multiply,
    per_column,
    per_row,
    queue,
    zeros,
)
from hcp_jax.kernels.mosaic_call import KernelShape, Masks, Visits, call
from hcp_jax.kernels.work_split import WorkSplit
from hcp_jax.sequence.layout import KeyRuns
from hcp_jax.sequence.mask import Intervals


class Shared(NamedTuple):
    """The shared memory and barriers of a program.

    Attributes:
        queries: a queue of q, start and end of an item, for each warpgroup.
        keys: a queue of k.
        values: a queue of v and the keys' global indices, which are needed as long as v is.
        turn: for each warpgroup, a barrier that completes when it may issue its products.
        spare: scratch for `multiply`, for each warpgroup; or None.
    """

    queries: Queue
    keys: Queue
    values: Queue
    turn: Any
    spare: Any


def forward(spec: CoreSpec, q: Any, k: Any, v: Any, intervals: Intervals, runs: KeyRuns) -> Partial:
    """See `hcp_jax.kernels.core.attend`."""
    c = KernelShape.from_arrays(spec, q, k, intervals, runs, "forward")
    split = c.split(c.blocks_q, c.n, c.blocks_k)

    def attention_forward(*refs: Any) -> None:
        _program(*refs, c=c, split=split)

    kernel = call(
        c,
        attention_forward,
        split,
        [(split.parts * c.b, c.padded_t, c.n, c.h), (split.parts * c.b, c.n, c.padded_t)],
        _shared(c),
    )
    masks = c.masks_over_keys(intervals, runs)
    out, lse = kernel(c.pad_queries(q), c.pad_keys(k), c.pad_keys(v), masks)
    partial = Partial(out[:, : c.t], lse[:, :, : c.t].swapaxes(1, 2))
    if split.parts == 1:
        return partial
    return merge_all(Partial(*(x.reshape(split.parts, c.b, *x.shape[1:]) for x in partial)))


def _shared(c: KernelShape) -> Shared:
    groups, stages, block_k = c.warpgroups, c.tile.stages, c.tile.block_k
    items = 2 if c.h <= 128 else 1  # the next item's queries, where there is room for them
    bounds = plgpu.SMEM((items, groups, ROWS), jnp.int32)
    return Shared(
        queries=queue(
            *(items, 3 * groups, groups, matrices(c, items, groups, ROWS, c.h), bounds, bounds)
        ),
        keys=queue(stages, 1, groups, matrices(c, stages, block_k, c.h)),
        values=queue(
            *(stages, 2, groups, matrices(c, stages, block_k, c.h)),
            plgpu.SMEM((stages, block_k), jnp.int32),
        ),
        turn=plgpu.Barrier(num_barriers=groups),
        spare=matrices(c, groups, ROWS, block_k) if c.spec.interpret else None,
    )


def _program(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    masks: Masks,
    out_ref: Any,
    lse_ref: Any,
    shared: Any,
    *,
    c: Any,
    split: Any,
) -> None:
    group, program = lax.axis_index("warpgroup"), lax.axis_index("program")
    rounds = split.rounds(program)

    @pl.when(group == c.warpgroups)
    def _() -> None:
        plgpu.set_max_registers(40, action="decrease")
        _load(c, split, q_ref, k_ref, v_ref, masks, shared)

    @pl.when(group < c.warpgroups)
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")
        pl.when(group == 1)(lambda: plgpu.barrier_arrive(shared.turn.at[0]))

        def one(turn: Any, step: Any) -> Any:
            rank, part, head, row = split.item(program, turn)
            visits = Visits.load(masks, c.mask_row(row), rank, 1, part, split.parts)
            rows = pl.ds(visits.block * c.tile.block_q + group * ROWS, ROWS)
            to = part * c.b + row
            out, lse = out_ref.at[to, rows, head], lse_ref.at[to, head, rows]
            _attend(c, group, turn, step, visits, shared, out, lse)
            return step + visits.steps

        lax.fori_loop(jnp.int32(0), rounds, one, jnp.int32(0))
        pl.when(group == 0)(lambda: plgpu.barrier_wait(shared.turn.at[0]))


def _load(
    c: KernelShape,
    split: WorkSplit,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    masks: Masks,
    shared: Shared,
) -> None:
    """Fill the queues, item after item."""
    program = lax.axis_index("program")

    def one(turn: Any, step: Any) -> Any:
        rank, part, head, row = split.item(program, turn)
        mask_row = c.mask_row(row)
        visits = Visits.load(masks, mask_row, rank, 1, part, split.parts)
        kv_head = lax.div(head, jnp.int32(c.queries_per_kv))

        def queries(q: Any, start: Any, end: Any) -> Iterator[Any]:
            for group in range(c.warpgroups):
                rows = pl.ds(visits.block * c.tile.block_q + group * ROWS, ROWS)
                yield q_ref.at[row, rows, head], q.at[group]
                yield masks.start.at[mask_row, rows], start.at[group]
                yield masks.end.at[mask_row, rows], end.at[group]

        shared.queries.fill(turn, queries)

        @pl.loop(jnp.int32(0), visits.steps)
        def _(i: Any) -> None:
            index, _ = visits.at(i)
            block = index if c.one_run else masks.order[0, index]
            keys = pl.ds(block * c.tile.block_k, c.tile.block_k)
            shared.keys.fill(step + i, lambda k: [(k_ref.at[row, keys, kv_head], k)])
            shared.values.fill(
                step + i,
                lambda v, index: [
                    (v_ref.at[row, keys, kv_head], v),
                    (masks.key_index.at[keys], index),
                ],
            )

        return step + visits.steps

    rounds = split.rounds(program)
    steps = lax.fori_loop(jnp.int32(0), rounds, one, jnp.int32(0))
    shared.queries.drain(rounds)
    shared.keys.drain(steps)
    shared.values.drain(steps)


def _attend(
    c: KernelShape,
    group: Any,
    turn: Any,
    base: Any,
    visits: Visits,
    shared: Shared,
    out_ref: Any,
    lse_ref: Any,
) -> None:
    """Compute the partial of a warpgroup's queries of an item, whose first step is `base`."""
    q, start, end = (ref.at[group] for ref in shared.queries.take(turn))
    start, end = (compat.mosaic_load(x, PER_ROW) for x in (start, end))
    spare = None if shared.spare is None else shared.spare.at[group]

    def issue(*terms: Any) -> Any:
        # Take turns: the other warpgroup may issue its products once these are issued.
        plgpu.barrier_wait(shared.turn.at[group])
        other = shared.turn.at[1 - group]
        return multiply(c, *terms, spare=spare, meanwhile=lambda: plgpu.barrier_arrive(other))

    def logits_term(step: Any) -> Any:
        [k] = shared.keys.take(step)
        return None, q, compat.transpose_ref(k)

    def weigh(step: Any, logits: Any, top: Any, total: Any, masked: bool) -> Any:
        """Return (V, weights, fade, top, total) of a step; `fade` rescales the earlier sums."""
        logits, factor, _ = capped(c, logits)
        if masked:
            v, index = shared.values.take(step)
            index = per_column(compat.mosaic_load(index, PER_COLUMN), ROWS)
            width = c.tile.block_k
            logits = hide(logits, per_row(start, width), per_row(end, width), index)
        new_top = jnp.maximum(top, jnp.max(logits, axis=1) * factor)
        # A row that has seen no key yet has top = -inf; use 0 instead, to avoid inf - inf.
        anchor = jnp.where(new_top == -jnp.inf, 0.0, new_top) if masked else new_top
        weights = jnp.exp2(logits * factor - per_row(anchor, c.tile.block_k))
        fade = jnp.exp2(top - anchor)
        total = total * fade + jnp.sum(weights, axis=1)
        if not masked:
            v, _ = shared.values.take(step)
        return v, weights.astype(c.dtype), fade, new_top, total

    def visit(i: Any, carry: Any, masked: bool) -> Any:
        logits, out, top, total = carry
        step = base + i
        v, weights, fade, top, total = weigh(step, logits, top, total, masked)
        out = out * per_row(fade, c.h)
        out, logits = issue((out, weights, v), logits_term(step + 1))
        shared.values.release(step)
        shared.keys.release(step + 1)
        return logits, out, top, total

    @pl.when(visits.steps > 0)
    def _() -> None:
        [logits] = issue(logits_term(base))
        shared.keys.release(base)
        last = visits.steps - 1
        top = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), PER_ROW)
        carry = logits, zeros(ROWS, c.h), top, zeros(ROWS)
        full = jnp.minimum(visits.full, last)
        carry = lax.fori_loop(jnp.int32(0), full, functools.partial(visit, masked=False), carry)
        carry = lax.fori_loop(full, last, functools.partial(visit, masked=True), carry)
        shared.queries.release(turn)
        logits, out, top, total = carry
        v, weights, fade, top, total = weigh(base + last, logits, top, total, masked=True)
        [out] = issue((out * per_row(fade, c.h), weights, v))
        shared.values.release(base + last)
        # Queries that see nothing were included, unmasked, in full blocks: reset them.
        empty = jnp.logical_or(total == 0, end <= start)
        total = jnp.where(empty, 1.0, total)
        out_ref[...] = out * per_row(jnp.where(empty, 0.0, 1.0 / total), c.h)
        lse_ref[...] = jnp.where(empty, -jnp.inf, top / LOG2_E + jnp.log(total))

    @pl.when(visits.steps == 0)
    def _() -> None:
        shared.queries.release(turn)
        out_ref[...] = zeros(ROWS, c.h)
        lse_ref[...] = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), PER_ROW)
