"""The forward kernel on Mosaic GPU: FlashAttention-3 (Shah et al., 2024) for interval masks.

A program works on 128 queries of a head at a time, 64 in each of two warpgroups; a third one loads.
With S_j = Q K_jᵀ the logits of the j-th block of keys and P_j their weights, a warpgroup's life is

    matrix products   | S_0 |                | O += P_0 V_0, S_1 |                | O += P_1 V_1, …
    softmax           |     | P_0, rescale O |                   | P_1, rescale O |

and the two take turns, so that one's softmax hides behind the other's products. A product and the
next block's logits are issued together: tensor cores wait for a warpgroup once per block.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hcp_jax import compat
from hcp_jax.kernels.core import CoreSpec
from hcp_jax.kernels.merge import Partial
from hcp_jax.kernels.mosaic_blocks import (
    LOG2_E,
    PER_COLUMN,
    PER_ROW,
    ROWS,
    Ring,
    capped,
    hide,
    matrices,
    multiply,
    per_column,
    per_row,
    ring,
    zeros,
)
from hcp_jax.kernels.mosaic_call import KernelShape, Masks, Walked, WorkSplit, call
from hcp_jax.sequence.layout import KeyRuns
from hcp_jax.sequence.mask import Intervals


class Shared(NamedTuple):
    """What the warpgroups of a program share.

    Attributes:
        queries: a ring of q, start and end of an item, by warpgroup.
        keys: a ring of k.
        values: a ring of v and the keys' global indices, which are needed as long as v is.
        turn: per warpgroup, a barrier that completes when it may issue its products.
        spare: for `multiply`, per warpgroup; or None.
    """

    queries: Ring
    keys: Ring
    values: Ring
    turn: Any
    spare: Any


def forward(spec: CoreSpec, q, k, v, intervals: Intervals, runs: KeyRuns) -> Partial:
    """See `hcp_jax.kernels.core.attend`."""
    c = KernelShape.from_arrays(spec, q, k, intervals, runs, "forward")
    share = WorkSplit.over_processors(c, c.blocks_q, c.n)

    def attention_forward(*refs):
        _program(*refs, c=c, share=share)

    kernel = call(
        c,
        attention_forward,
        share,
        [(c.b, c.padded_t, c.n, c.h), (c.b, c.n, c.padded_t)],
        _shared(c),
    )
    masks = c.masks_over_keys(intervals, runs)
    out, lse = kernel(c.pad_queries(q), c.pad_keys(k), c.pad_keys(v), masks)
    return Partial(out[:, : c.t], lse[:, :, : c.t].swapaxes(1, 2))


def _shared(c: KernelShape) -> Shared:
    groups, stages, block_k = c.warpgroups, c.tile.stages, c.tile.block_k
    items = 2 if c.h <= 128 else 1  # the next item's queries, where there is room for them
    bounds = plgpu.SMEM((items, groups, ROWS), jnp.int32)
    return Shared(
        queries=ring(
            *(items, 3 * groups, groups, matrices(c, items, groups, ROWS, c.h), bounds, bounds)
        ),
        keys=ring(stages, 1, groups, matrices(c, stages, block_k, c.h)),
        values=ring(
            *(stages, 2, groups, matrices(c, stages, block_k, c.h)),
            plgpu.SMEM((stages, block_k), jnp.int32),
        ),
        turn=plgpu.Barrier(num_barriers=groups),
        spare=matrices(c, groups, ROWS, block_k) if c.spec.interpret else None,
    )


def _program(q_ref, k_ref, v_ref, masks: Masks, out_ref, lse_ref, shared, *, c, share) -> None:
    group, program = lax.axis_index("warpgroup"), lax.axis_index("program")
    rounds = share.rounds(program)

    @pl.when(group == c.warpgroups)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        _load(c, share, q_ref, k_ref, v_ref, masks, shared)

    @pl.when(group < c.warpgroups)
    def _():
        plgpu.set_max_registers(232, action="increase")
        pl.when(group == 1)(lambda: plgpu.barrier_arrive(shared.turn.at[0]))

        def one(turn, step):
            rank, head, row = share.item(program, turn)
            walked = Walked.of(masks, c.mask_row(row), rank)
            rows = pl.ds(walked.block * c.tile.block_q + group * ROWS, ROWS)
            out, lse = out_ref.at[row, rows, head], lse_ref.at[row, head, rows]
            _attend(c, group, turn, step, walked, shared, out, lse)
            return step + walked.steps

        lax.fori_loop(jnp.int32(0), rounds, one, jnp.int32(0))
        pl.when(group == 0)(lambda: plgpu.barrier_wait(shared.turn.at[0]))


def _load(
    c: KernelShape, share: WorkSplit, q_ref, k_ref, v_ref, masks: Masks, shared: Shared
) -> None:
    """Fill the rings, item after item."""
    program = lax.axis_index("program")

    def one(turn, step):
        rank, head, row = share.item(program, turn)
        mask_row = c.mask_row(row)
        walked = Walked.of(masks, mask_row, rank)
        kv_head = lax.div(head, jnp.int32(c.group))

        def queries(q, start, end):
            for group in range(c.warpgroups):
                rows = pl.ds(walked.block * c.tile.block_q + group * ROWS, ROWS)
                yield q_ref.at[row, rows, head], q.at[group]
                yield masks.start.at[mask_row, rows], start.at[group]
                yield masks.end.at[mask_row, rows], end.at[group]

        shared.queries.fill(turn, queries)

        @pl.loop(jnp.int32(0), walked.steps)
        def _(i):
            place = walked.place(i)
            block = place if c.one_run else masks.order[0, place]
            keys = pl.ds(block * c.tile.block_k, c.tile.block_k)
            shared.keys.fill(step + i, lambda k: [(k_ref.at[row, keys, kv_head], k)])
            shared.values.fill(
                step + i,
                lambda v, index: [
                    (v_ref.at[row, keys, kv_head], v),
                    (masks.key_index.at[keys], index),
                ],
            )

        return step + walked.steps

    rounds = share.rounds(program)
    steps = lax.fori_loop(jnp.int32(0), rounds, one, jnp.int32(0))
    shared.queries.drain(rounds)
    shared.keys.drain(steps)
    shared.values.drain(steps)


def _attend(
    c: KernelShape, group, turn, base, walked: Walked, shared: Shared, out_ref, lse_ref
) -> None:
    """The partial of a warpgroup's queries of an item, whose first step is `base`."""
    q, start, end = (ref.at[group] for ref in shared.queries.take(turn))
    start, end = (compat.mosaic_load(x, PER_ROW) for x in (start, end))
    spare = None if shared.spare is None else shared.spare.at[group]

    def issue(*terms):
        # In turns: the other group may issue its products as soon as these are under way.
        plgpu.barrier_wait(shared.turn.at[group])
        other = shared.turn.at[1 - group]
        return multiply(c, *terms, spare=spare, meanwhile=lambda: plgpu.barrier_arrive(other))

    def logits_of(step):
        [k] = shared.keys.take(step)
        return None, q, compat.transpose_ref(k)

    def weigh(step, logits, top, total, masked: bool):
        """(V, weights, fade of what came before, top, total) of a step."""
        logits, factor, _ = capped(c, logits)
        if masked:
            v, index = shared.values.take(step)
            index = per_column(compat.mosaic_load(index, PER_COLUMN), ROWS)
            width = c.tile.block_k
            logits = hide(logits, per_row(start, width), per_row(end, width), index)
        new_top = jnp.maximum(top, jnp.max(logits, axis=1) * factor)
        # A row that has seen nothing yet has no finite top to measure from; 0 will do.
        anchor = jnp.where(new_top == -jnp.inf, 0.0, new_top) if masked else new_top
        weights = jnp.exp2(logits * factor - per_row(anchor, c.tile.block_k))
        fade = jnp.exp2(top - anchor)
        total = total * fade + jnp.sum(weights, axis=1)
        if not masked:
            v, _ = shared.values.take(step)
        return v, weights.astype(c.dtype), fade, new_top, total

    def visit(i, carry, masked: bool):
        logits, out, top, total = carry
        step = base + i
        v, weights, fade, top, total = weigh(step, logits, top, total, masked)
        out = out * per_row(fade, c.h)
        out, logits = issue((out, weights, v), logits_of(step + 1))
        shared.values.release(step)
        shared.keys.release(step + 1)
        return logits, out, top, total

    @pl.when(walked.steps > 0)
    def _():
        [logits] = issue(logits_of(base))
        shared.keys.release(base)
        last = walked.steps - 1
        top = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), PER_ROW)
        carry = logits, zeros(ROWS, c.h), top, zeros(ROWS)
        full = jnp.minimum(walked.full, last)
        carry = lax.fori_loop(jnp.int32(0), full, functools.partial(visit, masked=False), carry)
        carry = lax.fori_loop(full, last, functools.partial(visit, masked=True), carry)
        shared.queries.release(turn)
        logits, out, top, total = carry
        v, weights, fade, top, total = weigh(base + last, logits, top, total, masked=True)
        [out] = issue((out * per_row(fade, c.h), weights, v))
        shared.values.release(base + last)
        # Queries that see nothing rode along where the others needed no mask.
        empty = jnp.logical_or(total == 0, end <= start)
        total = jnp.where(empty, 1.0, total)
        out_ref[...] = out * per_row(jnp.where(empty, 0.0, 1.0 / total), c.h)
        lse_ref[...] = jnp.where(empty, -jnp.inf, top / LOG2_E + jnp.log(total))

    @pl.when(walked.steps == 0)
    def _():
        shared.queries.release(turn)
        out_ref[...] = zeros(ROWS, c.h)
        lse_ref[...] = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), PER_ROW)
