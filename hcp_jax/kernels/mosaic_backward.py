"""The gradients on Mosaic GPU: dq in one kernel, dk and dv in another, from global lse and delta.

Both are one body. A program *holds* a block of one side, 64 rows in each of two warpgroups, while
blocks of the other side *pass*, brought by a third warpgroup. With A and B what it holds and a and
b what passes,

              A, B        a, b        S = A aᵀ      dP = B bᵀ     dS = P (dP - delta)
    dq        Q, dO       K, V        logits        dO Vᵀ         dQ += dS a
    dk, dv    K, V        Q, dO       transposed    V dOᵀ         dK += dS a,  dV += P b

so neither logits nor weights ever move: what leaves one product's registers enters the next one's.
All query heads of a kv head pass the block that its program holds, and one warpgroup makes each sum
in a fixed order: dk and dv need no buffer per query head and no atomics, and every run gives the
same bits.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hcp_jax import compat
from hcp_jax.kernels.core import CoreSpec
from hcp_jax.kernels.mosaic_blocks import (
    LOG2_E,
    PER_COLUMN,
    PER_ROW,
    ROWS,
    Ring,
    capped,
    hide,
    matrices,
    per_column,
    per_row,
    ring,
)
from hcp_jax.kernels.mosaic_call import KernelShape, Masks, Walked, WorkSplit, call
from hcp_jax.sequence.layout import KeyRuns
from hcp_jax.sequence.mask import Intervals

# The largest head size for which a warpgroup's registers hold 64 rows of dk and of dv.
_BOTH_SUMS = 128

# How many numbers, of 32 bits, the masks and weights need of each row.
_OF_QUERIES, _OF_KEYS = 4, 1


class Arrays(NamedTuple):
    """What the kernels read.

    Attributes:
        q: `[B, Tp, N, H]`.
        k: `[B, Sp, K, H]`.
        v: as k.
        dout: as q.
        less_lse: the bits of -lse in log2, `[B, N, Tp]`; -inf where a query sees nothing: its
            weights are 0.
        less_delta: the bits of -delta, `[B, N, Tp]`.
        masks: of the walk.
    """

    q: Any
    k: Any
    v: Any
    dout: Any
    less_lse: Any
    less_delta: Any
    masks: Masks


class Side(NamedTuple):
    """Some rows of one side: Q and dO or K and V, and their numbers for masks and weights."""

    a: Any
    b: Any
    numbers: list

    @classmethod
    def queries(cls, c: KernelShape, arrays: Arrays, row, head, rows) -> "Side":
        """With less_lse, less_delta, start and end, in 32 bits each."""
        numbers = [x.at[row, head, rows] for x in (arrays.less_lse, arrays.less_delta)]
        numbers += [x.at[c.mask_row(row), rows] for x in (arrays.masks.start, arrays.masks.end)]
        return cls(arrays.q.at[row, rows, head], arrays.dout.at[row, rows, head], numbers)

    @classmethod
    def keys(cls, c: KernelShape, arrays: Arrays, row, head, rows) -> "Side":
        """With the global index."""
        k, v = arrays.k.at[row, rows, head], arrays.v.at[row, rows, head]
        return cls(k, v, [arrays.masks.key_index.at[rows]])


class Shared(NamedTuple):
    """What the warpgroups of a program share.

    Attributes:
        held: a ring of one: A and, unless only dv is summed, B.
        a: a ring of a and the passing side's numbers.
        b: a ring of b.
        spare: for products whose left factor is in registers, which the interpreter has not; or
            None.
    """

    held: Ring
    a: Ring
    b: Ring
    spare: Any


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static facts of one of the kernels: `sums` are the gradients that it computes."""

    c: KernelShape
    sums: tuple[str, ...]

    @property
    def holds_queries(self) -> bool:
        """Else it holds keys."""
        return self.sums == ("dq",)

    def __post_init__(self) -> None:
        tile = self.c.tile
        block = tile.block_q if self.holds_queries else tile.block_k
        if block != self.held_rows:
            raise ValueError(
                f"{tile.warps} warps hold {self.held_rows} rows, the tile's block {block}: for "
                f"{' and '.join(self.sums)} give the block of "
                f"{'queries' if self.holds_queries else 'keys'} 16 rows per warp."
            )

    def held(self, *args) -> Side:
        """The held side's, of `Side.queries` and `Side.keys`."""
        return (Side.queries if self.holds_queries else Side.keys)(self.c, *args)

    def passing(self, *args) -> Side:
        """The passing side's, of `Side.queries` and `Side.keys`."""
        return (Side.keys if self.holds_queries else Side.queries)(self.c, *args)

    @property
    def passing_rows(self) -> int:
        """Rows of a block that passes."""
        return self.c.tile.block_k if self.holds_queries else self.c.tile.block_q

    @property
    def passing_heads(self) -> int:
        """Heads of the other side that pass a block."""
        return 1 if self.holds_queries else self.c.group

    @property
    def held_rows(self) -> int:
        """Rows of the block that a program holds."""
        return self.c.warpgroups * ROWS

    @property
    def held_matrices(self) -> int:
        """A alone, or A and B: dv needs no dP."""
        return 1 if self.sums == ("dv",) else 2

    @property
    def length(self) -> int:
        """Rows of the held side, in whole blocks."""
        return self.c.padded_t if self.holds_queries else self.c.padded_s

    @property
    def held_heads(self) -> int:
        """Heads of the held side."""
        return self.c.n if self.holds_queries else self.c.k


def backward(spec: CoreSpec, q, k, v, intervals: Intervals, runs: KeyRuns, dout, lse, delta):
    """See `hcp_jax.kernels.core.attend_grads`."""
    arrays = (q, k, v, dout.astype(q.dtype), lse, delta)
    apart = q.shape[-1] > _BOTH_SUMS
    kernels = (("dq",), ("dk",), ("dv",)) if apart else (("dq",), ("dk", "dv"))
    return tuple(x for sums in kernels for x in _gradients(spec, intervals, runs, sums, *arrays))


def _gradients(spec, intervals, runs, sums, q, k, v, dout, lse, delta):
    c = KernelShape.from_arrays(spec, q, k, intervals, runs, "dq" if sums == ("dq",) else "dkv")
    p = Plan(c, sums)
    masks = (c.masks_over_keys if p.holds_queries else c.masks_over_queries)(intervals, runs)
    share = WorkSplit.over_processors(c, p.length // p.held_rows, p.held_heads)
    empty = (intervals.end <= intervals.start)[..., None] | (lse == -jnp.inf)
    less_lse = jnp.where(empty, -jnp.inf, lse * -LOG2_E).swapaxes(1, 2)
    arrays = Arrays(
        c.pad_queries(q),
        c.pad_keys(k),
        c.pad_keys(v),
        c.pad_queries(dout),
        _bits(c.pad_queries(less_lse, -jnp.inf, dim=2)),
        _bits(c.pad_queries(-delta.swapaxes(1, 2), dim=2)),
        masks,
    )

    def attention_gradients(arrays, *refs):
        _program(p, share, arrays, refs[:-1], refs[-1])

    attention_gradients.__name__ = "attention_" + "_".join(sums)
    outputs = [(c.b, p.length, p.held_heads, c.h)] * len(sums)
    results = call(c, attention_gradients, share, outputs, _shared(p))(arrays)
    return [x[:, : c.t if p.holds_queries else c.s] for x in results]


def _bits(x):
    return lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)


def _number(bits):
    return lax.bitcast_convert_type(bits, jnp.float32)


def _shared(p: Plan) -> Shared:
    c, groups, stages = p.c, p.c.warpgroups, p.c.tile.stages
    # b is let go of in mid-step where only S and dP need it: one slot less will do.
    stages_b = stages if "dv" in p.sums else max(1, stages - 1)
    numbers = _OF_KEYS if p.holds_queries else _OF_QUERIES
    return Shared(
        held=ring(
            *(1, p.held_matrices, groups),
            *[matrices(c, 1, p.held_rows, c.h)] * p.held_matrices,
        ),
        a=ring(
            *(stages, 1 + numbers, groups, matrices(c, stages, p.passing_rows, c.h)),
            plgpu.SMEM((stages, numbers, p.passing_rows), jnp.int32),
        ),
        b=ring(stages_b, 1, groups, matrices(c, stages_b, p.passing_rows, c.h)),
        spare=matrices(c, groups, ROWS, p.passing_rows) if c.spec.interpret else None,
    )


def _program(p: Plan, share: WorkSplit, arrays: Arrays, outs, shared: Shared) -> None:
    c = p.c
    group, program = lax.axis_index("warpgroup"), lax.axis_index("program")
    rounds = share.rounds(program)

    @pl.when(group == c.warpgroups)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        _load(p, share, arrays, shared)

    @pl.when(group < c.warpgroups)
    def _():
        plgpu.set_max_registers(240, action="increase")

        def one(turn, step):
            rank, head, row = share.item(program, turn)
            walked = Walked.of(arrays.masks, c.mask_row(row), rank)
            rows = pl.ds(walked.block * p.held_rows + group * ROWS, ROWS)
            numbers = p.held(arrays, row, head, rows).numbers
            sums = [out.at[row, rows, head] for out in outs]
            _sum(p, group, turn, step, walked, shared, numbers, sums)
            return step + walked.steps * p.passing_heads

        lax.fori_loop(jnp.int32(0), rounds, one, jnp.int32(0))


def _load(p: Plan, share: WorkSplit, arrays: Arrays, shared: Shared) -> None:
    """Fill the rings, item after item."""
    c, program, masks = p.c, lax.axis_index("program"), arrays.masks

    def one(turn, step):
        rank, head, row = share.item(program, turn)
        walked = Walked.of(masks, c.mask_row(row), rank)
        held = p.held(arrays, row, head, pl.ds(walked.block * p.held_rows, p.held_rows))
        shared.held.fill(turn, lambda *to: zip((held.a, held.b), to, strict=False))
        steps = walked.steps * p.passing_heads

        @pl.loop(jnp.int32(0), steps)
        def _(i):
            place = walked.place(lax.div(i, jnp.int32(p.passing_heads)))
            if p.holds_queries:
                block = place if c.one_run else masks.order[0, place]
                passing_head = lax.div(head, jnp.int32(c.group))
            else:
                block = masks.order[c.mask_row(row), place]
                passing_head = head * c.group + lax.rem(i, jnp.int32(c.group))
            rows = pl.ds(block * p.passing_rows, p.passing_rows)
            passing = p.passing(arrays, row, passing_head, rows)
            shared.a.fill(
                step + i,
                lambda a, numbers: [
                    (passing.a, a),
                    *((x, numbers.at[i]) for i, x in enumerate(passing.numbers)),
                ],
            )
            shared.b.fill(step + i, lambda to: [(passing.b, to)])

        return step + steps

    rounds = share.rounds(program)
    steps = lax.fori_loop(jnp.int32(0), rounds, one, jnp.int32(0))
    shared.held.drain(rounds)
    shared.a.drain(steps)
    shared.b.drain(steps)


def _sum(p: Plan, group, turn, base, walked, shared, held_numbers, outs) -> None:
    """The gradients of a warpgroup's rows of an item, whose first step is `base`."""
    c, shape = p.c, (ROWS, p.passing_rows)
    steps = walked.steps * p.passing_heads

    def of_held(i: int):
        def read(_):
            numbers = compat.mosaic_load(held_numbers[i], PER_ROW, optimized=False)
            return per_row(numbers, p.passing_rows)

        return read

    def of_passing(i: int):
        return lambda numbers: per_column(compat.mosaic_load(numbers.at[i], PER_COLUMN), ROWS)

    of_query, of_key = (of_held, of_passing) if p.holds_queries else (of_passing, of_held)
    less_lse, less_delta, start, end = map(of_query, range(_OF_QUERIES))
    [index] = map(of_key, range(_OF_KEYS))
    if p.holds_queries:
        # Read once; what the mask needs is read again at each edge, for want of registers.
        kept = less_lse(None), less_delta(None)
        less_lse, less_delta = (lambda _, x=x: x for x in kept)
    held_a, *held_b = shared.held.take(turn)

    def left(matrix):
        """A matrix as the left factor of a product."""
        matrix = matrix.astype(c.dtype)
        if shared.spare is None:
            return matrix
        shared.spare[group] = matrix
        plgpu.commit_smem()
        return shared.spare.at[group]

    def release(step):
        shared.a.release(step)
        if "dv" in p.sums:
            shared.b.release(step)

    def accumulate(*sums):
        by_name = dict(zip(p.sums, sums, strict=True))
        sum_a, sum_b = by_name.get("dq", by_name.get("dk")), by_name.get("dv")

        def visit(i, _, masked: bool):
            step = base + i

            def products(logits_acc, dweights_acc):
                # Not a constant to the compiler, or it would keep the addresses of what lies still
                # in registers: 64 of them with a head size of 256.
                zero = lax.optimization_barrier(jnp.int32(0))
                mine, whole = pl.ds(zero + group * ROWS, ROWS), pl.ds(zero, p.passing_rows)
                a, numbers = shared.a.take(step)
                a = a.at[whole]
                plgpu.wgmma(logits_acc, held_a.at[mine], compat.transpose_ref(a))
                # The last step's products end while this one runs. Here they give back their
                # registers, without which the next product would not fit, and their blocks.
                plgpu.wgmma_wait(1)
                pl.when(i > 0)(lambda: release(step - 1))
                b = shared.b.take(step)[0].at[whole]
                if sum_a is not None:
                    if not c.spec.interpret:
                        dweights_acc[...] = _number(less_delta(numbers))
                    plgpu.wgmma(dweights_acc, held_b[0].at[mine], compat.transpose_ref(b))
                logits = _value(logits_acc, 0 if sum_a is None else 1)
                logits, factor, slope = capped(c, logits)
                exponents = logits * factor + _number(less_lse(numbers))
                if masked:
                    exponents = hide(exponents, start(numbers), end(numbers), index(numbers))
                weights = jnp.exp2(exponents)
                if sum_b is not None:
                    plgpu.wgmma(sum_b, left(weights), b)
                if slope is not None:
                    weights = weights * slope
                if sum_a is not None:
                    dweights = _value(dweights_acc, 0 if sum_b is None else 1)
                    if sum_b is None:
                        shared.b.release(step)
                    if c.spec.interpret:
                        dweights = dweights + _number(less_delta(numbers))
                    plgpu.wgmma(sum_a, left(weights * dweights), a)

            pl.run_scoped(products, *[plgpu.ACC(shape, jnp.float32)] * 2)
            return ()

        full = walked.full * p.passing_heads
        lax.fori_loop(jnp.int32(0), full, functools.partial(visit, masked=False), ())
        lax.fori_loop(full, steps, functools.partial(visit, masked=True), ())
        values = [acc[...] for acc in sums]
        pl.when(steps > 0)(lambda: release(base + steps - 1))
        shared.held.release(turn)
        for out, name, value in zip(outs, p.sums, values, strict=True):
            out[...] = value if name == "dv" else value * c.spec.scale

    pl.run_scoped(accumulate, *[plgpu.ACC((ROWS, c.h), jnp.float32) for _ in p.sums])


def _value(acc, under_way: int):
    """The value of an accumulator, when no more than the latest `under_way` products are not done.

    The barrier keeps the compiler from using the value before.
    """
    return lax.optimization_barrier(plgpu.wgmma_accumulator_load(acc, wait_n=under_way))
