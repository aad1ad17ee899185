"""Implement the gradients on Mosaic GPU: one kernel for dq, one for dk and dv.

They are computed from the global lse and delta.

Both kernels have the same body. A program *holds* a block of one side, 64 rows in each of two
warpgroups, while blocks of the other side *pass*, loaded by a third warpgroup. With A and B the
held matrices and a and b the passing ones,

              A, B        a, b        S = A aᵀ      dP = B bᵀ     dS = P (dP - delta)
    dq        Q, dO       K, V        logits        dO Vᵀ         dQ += dS a
    dk, dv    K, V        Q, dO       transposed    V dOᵀ         dK += dS a,  dV += P b

so logits and weights never leave the registers: the result of one product is an operand of the
next. All query heads of a kv head pass the block that a program holds, and one warpgroup computes
each sum in a fixed order. So dk and dv need no buffer per query head and no atomics, and repeated
calls give the same bits.
"""

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
    Queue,
    capped,
    hide,
    matrices,
    per_column,
    per_row,
    queue,
)
from hcp_jax.kernels.mosaic_call import KernelShape, call
from hcp_jax.kernels.mosaic_sides import Arrays, Plan
from hcp_jax.kernels.work_split import WorkSplit
from hcp_jax.sequence.layout import KeyRuns
from hcp_jax.sequence.mask import Intervals

# The largest head size for which a warpgroup's registers hold 64 rows of dk and of dv.
_BOTH_SUMS = 128

# How many 32-bit numbers per row the masks and weights need.
_NUMBERS_PER_QUERY, _NUMBERS_PER_KEY = 4, 1


class Shared(NamedTuple):
    """The shared memory and barriers of a program.

    Attributes:
        held: a queue with one slot: A and, unless only dv is summed, B.
        a: a queue of a and the passing side's numbers.
        b: a queue of b.
        spare: scratch for left factors, because the interpreter cannot multiply from registers;
            None on GPUs.
    """

    held: Queue
    a: Queue
    b: Queue
    spare: Any


def backward(
    spec: CoreSpec,
    q: Any,
    k: Any,
    v: Any,
    intervals: Intervals,
    runs: KeyRuns,
    dout: Any,
    lse: Any,
    delta: Any,
) -> Any:
    """See `hcp_jax.kernels.core.attend_grads`."""
    arrays = (q, k, v, dout.astype(q.dtype), lse, delta)
    separate = q.shape[-1] > _BOTH_SUMS
    kernels = (("dq",), ("dk",), ("dv",)) if separate else (("dq",), ("dk", "dv"))
    return tuple(x for sums in kernels for x in _gradients(spec, intervals, runs, sums, *arrays))


def _gradients(
    spec: Any,
    intervals: Any,
    runs: Any,
    sums: Any,
    q: Any,
    k: Any,
    v: Any,
    dout: Any,
    lse: Any,
    delta: Any,
) -> Any:
    c = KernelShape.from_arrays(spec, q, k, intervals, runs, "dq" if sums == ("dq",) else "dkv")
    p = Plan(c, sums)
    masks = (c.masks_over_keys if p.holds_queries else c.masks_over_queries)(intervals, runs)
    split = c.split(p.length // p.held_rows, p.held_heads, p.most_steps)
    empty = (intervals.end <= intervals.start)[..., None] | (lse == -jnp.inf)
    minus_lse = jnp.where(empty, -jnp.inf, lse * -LOG2_E).swapaxes(1, 2)
    arrays = Arrays(
        c.pad_queries(q),
        c.pad_keys(k),
        c.pad_keys(v),
        c.pad_queries(dout),
        _bits(c.pad_queries(minus_lse, -jnp.inf, dim=2)),
        _bits(c.pad_queries(-delta.swapaxes(1, 2), dim=2)),
        masks,
    )

    def attention_gradients(arrays: Any, *refs: Any) -> None:
        _program(p, split, arrays, refs[:-1], refs[-1])

    attention_gradients.__name__ = "attention_" + "_".join(sums)
    outputs = [(split.parts * c.b, p.length, p.held_heads, c.h)] * len(sums)
    results = call(c, attention_gradients, split, outputs, _shared(p))(arrays)
    if split.parts > 1:
        results = [x.reshape(split.parts, c.b, *x.shape[1:]).sum(axis=0) for x in results]
    return [x[:, : c.t if p.holds_queries else c.s] for x in results]


def _bits(x: Any) -> Any:
    return lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)


def _number(bits: Any) -> Any:
    return lax.bitcast_convert_type(bits, jnp.float32)


def _shared(p: Plan) -> Shared:
    c, groups, stages = p.c, p.c.warpgroups, p.c.tile.stages
    # If only S and dP need b, it is released in the middle of a step: one slot less is enough.
    stages_b = stages if "dv" in p.sums else max(1, stages - 1)
    numbers = _NUMBERS_PER_KEY if p.holds_queries else _NUMBERS_PER_QUERY
    return Shared(
        held=queue(
            *(1, p.held_matrices, groups),
            *[matrices(c, 1, p.held_rows, c.h)] * p.held_matrices,
        ),
        a=queue(
            *(stages, 1 + numbers, groups, matrices(c, stages, p.passing_rows, c.h)),
            plgpu.SMEM((stages, numbers, p.passing_rows), jnp.int32),
        ),
        b=queue(stages_b, 1, groups, matrices(c, stages_b, p.passing_rows, c.h)),
        spare=matrices(c, groups, ROWS, p.passing_rows) if c.spec.interpret else None,
    )


def _program(p: Plan, split: WorkSplit, arrays: Arrays, outs: Any, shared: Shared) -> None:
    c = p.c
    group, program = lax.axis_index("warpgroup"), lax.axis_index("program")
    rounds = split.rounds(program)

    @pl.when(group == c.warpgroups)
    def _() -> None:
        plgpu.set_max_registers(24, action="decrease")
        _load(p, split, arrays, shared)

    @pl.when(group < c.warpgroups)
    def _() -> None:
        plgpu.set_max_registers(240, action="increase")

        def one(turn: Any, step: Any) -> Any:
            rank, part, head, row = split.item(program, turn)
            visits = p.visits(arrays.masks, row, rank, part, split.parts)
            rows = pl.ds(visits.block * p.held_rows + group * ROWS, ROWS)
            numbers = p.held(arrays, row, head, rows).numbers
            sums = [out.at[part * c.b + row, rows, head] for out in outs]
            _sum(p, group, turn, step, visits, shared, numbers, sums)
            return step + visits.steps

        lax.fori_loop(jnp.int32(0), rounds, one, jnp.int32(0))


def _load(p: Plan, split: WorkSplit, arrays: Arrays, shared: Shared) -> None:
    """Fill the queues, item after item."""
    c, program, masks = p.c, lax.axis_index("program"), arrays.masks

    def one(turn: Any, step: Any) -> Any:
        rank, part, head, row = split.item(program, turn)
        visits = p.visits(masks, row, rank, part, split.parts)
        held = p.held(arrays, row, head, pl.ds(visits.block * p.held_rows, p.held_rows))
        shared.held.fill(turn, lambda *to: zip((held.a, held.b), to, strict=False))

        @pl.loop(jnp.int32(0), visits.steps)
        def _(i: Any) -> None:
            index, passing_head = visits.at(i)
            if p.holds_queries:
                block = index if c.one_run else masks.order[0, index]
                passing_head = lax.div(head, jnp.int32(c.queries_per_kv))
            else:
                block = masks.order[c.mask_row(row), index]
                passing_head = head * c.queries_per_kv + passing_head
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

        return step + visits.steps

    rounds = split.rounds(program)
    steps = lax.fori_loop(jnp.int32(0), rounds, one, jnp.int32(0))
    shared.held.drain(rounds)
    shared.a.drain(steps)
    shared.b.drain(steps)


def _sum(
    p: Plan,
    group: Any,
    turn: Any,
    base: Any,
    visits: Any,
    shared: Any,
    held_numbers: Any,
    outs: Any,
) -> None:
    """Compute the gradients of a warpgroup's rows of an item, whose first step is `base`."""
    c, shape = p.c, (ROWS, p.passing_rows)
    steps = visits.steps

    def held_reader(i: int) -> Any:
        def read(_: Any) -> Any:
            numbers = compat.mosaic_load(held_numbers[i], PER_ROW, optimized=False)
            return per_row(numbers, p.passing_rows)

        return read

    def passing_reader(i: int) -> Any:
        return lambda numbers: per_column(compat.mosaic_load(numbers.at[i], PER_COLUMN), ROWS)

    readers = (held_reader, passing_reader)
    query_reader, key_reader = readers if p.holds_queries else readers[::-1]
    minus_lse, minus_delta, start, end = map(query_reader, range(_NUMBERS_PER_QUERY))
    [index] = map(key_reader, range(_NUMBERS_PER_KEY))
    if p.holds_queries:
        # These are read once. The mask's numbers are read again for each masked block, because they
        # do not fit into the registers.
        kept = minus_lse(None), minus_delta(None)
        minus_lse, minus_delta = (lambda _, x=x: x for x in kept)
    held_a, *held_b = shared.held.take(turn)

    def left(matrix: Any) -> Any:
        """Return a matrix in the form that the left factor of a product needs."""
        matrix = matrix.astype(c.dtype)
        if shared.spare is None:
            return matrix
        shared.spare[group] = matrix
        plgpu.commit_smem()
        return shared.spare.at[group]

    def release(step: Any) -> None:
        shared.a.release(step)
        if "dv" in p.sums:
            shared.b.release(step)

    def accumulate(*sums: Any) -> None:
        by_name = dict(zip(p.sums, sums, strict=True))
        sum_a, sum_b = by_name.get("dq", by_name.get("dk")), by_name.get("dv")

        def visit(i: Any, _: Any, masked: bool) -> Any:
            step = base + i

            def products(logits_acc: Any, dweights_acc: Any) -> None:
                # A zero that the compiler does not know. With a constant, it would keep the
                # addresses of the held matrices in registers: 64 of them at head size 256.
                zero = lax.optimization_barrier(jnp.int32(0))
                mine, whole = pl.ds(zero + group * ROWS, ROWS), pl.ds(zero, p.passing_rows)
                a, numbers = shared.a.take(step)
                a = a.at[whole]
                plgpu.wgmma(logits_acc, held_a.at[mine], compat.transpose_ref(a))
                # The last step's products end while this one runs. Waiting here frees their
                # registers, which the next product needs, and their blocks.
                plgpu.wgmma_wait(1)
                pl.when(i > 0)(lambda: release(step - 1))
                b = shared.b.take(step)[0].at[whole]
                if sum_a is not None:
                    if not c.spec.interpret:
                        dweights_acc[...] = _number(minus_delta(numbers))
                    plgpu.wgmma(dweights_acc, held_b[0].at[mine], compat.transpose_ref(b))
                logits = _value(logits_acc, 0 if sum_a is None else 1)
                logits, factor, slope = capped(c, logits)
                exponents = logits * factor + _number(minus_lse(numbers))
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
                        dweights = dweights + _number(minus_delta(numbers))
                    plgpu.wgmma(sum_a, left(weights * dweights), a)

            pl.run_scoped(products, *[plgpu.ACC(shape, jnp.float32)] * 2)
            return ()

        full = visits.full
        lax.fori_loop(jnp.int32(0), full, functools.partial(visit, masked=False), ())
        lax.fori_loop(full, steps, functools.partial(visit, masked=True), ())
        values = [acc[...] for acc in sums]
        pl.when(steps > 0)(lambda: release(base + steps - 1))
        shared.held.release(turn)
        for out, name, value in zip(outs, p.sums, values, strict=True):
            out[...] = value if name == "dv" else value * c.spec.scale

    pl.run_scoped(accumulate, *[plgpu.ACC((ROWS, c.h), jnp.float32) for _ in p.sums])


def _value(acc: Any, under_way: int) -> Any:
    """Return an accumulator's value once at most the latest `under_way` products are unfinished.

    The barrier prevents the compiler from using the value earlier.
    """
    return lax.optimization_barrier(plgpu.wgmma_accumulator_load(acc, wait_n=under_way))
