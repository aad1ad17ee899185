"""The gradients on Mosaic GPU."""

import dataclasses
import functools
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hcp_jax import compat
from hcp_jax.kernels.core import CoreSpec
from hcp_jax.kernels.mosaic_blocks import ROWS, Facts, Masks, Span, hide, shape_like, work_item
from hcp_jax.layout import KeyRuns
from hcp_jax.mask import Intervals

LOG2_E = math.log2(math.e)
WGMMA = plgpu.Layout.WGMMA


def backward(spec: CoreSpec, q, k, v, intervals: Intervals, runs: KeyRuns, dout, lse, delta):
    """See `hcp_jax.kernels.core.attend_grads`."""
    arrays = (q, k, v, dout.astype(q.dtype), lse, delta)
    [dq] = _gradients(spec, intervals, runs, ("dq",), *arrays)
    if q.shape[-1] > 128:
        [dk] = _gradients(spec, intervals, runs, ("dk",), *arrays)
        [dv] = _gradients(spec, intervals, runs, ("dv",), *arrays)
    else:
        dk, dv = _gradients(spec, intervals, runs, ("dk", "dv"), *arrays)
    return dq, dk, dv


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The static facts of one kernel.

    A block is *held* by a program, and the blocks of the other side pass by. Each has two matrices
    and the sums are those of the products of weights with the passing ones.
    """

    c: Facts
    sums: tuple[str, ...]

    @property
    def over_keys(self):
        return self.sums == ("dq",)

    @property
    def groups(self):
        return self.c.tile.warps // 4

    @property
    def heads(self):
        """Query heads that pass by."""
        return 1 if self.over_keys else self.c.group

    @property
    def held_heads(self):
        return self.c.n if self.over_keys else self.c.k

    @property
    def held(self):
        """(rows of a block, number of blocks) of the held side."""
        return (
            (self.c.tile.block_q, self.c.blocks_q)
            if self.over_keys
            else (self.c.tile.block_k, self.c.blocks_k)
        )

    @property
    def passing(self):
        return self.c.tile.block_k if self.over_keys else self.c.tile.block_q

    @property
    def query_axis(self):
        return 0 if self.over_keys else 1

    @property
    def stages(self):
        a = self.c.tile.stages
        return a, a if "dv" in self.sums else max(1, a - 1)


def _gradients(spec, intervals, runs, sums, q, k, v, dout, lse, delta):
    c = Facts.of(spec, q, k, intervals, runs, "dq" if sums == ("dq",) else "dkv")
    p = _Plan(c, sums)
    masks = (c.masks_over_keys if p.over_keys else c.masks_over_queries)(intervals, runs)
    less_lse, less_delta = _stats(c, intervals, lse, delta)
    of_q = [c.pad_queries(q), c.pad_queries(dout)]
    of_k = [c.pad_keys(k), c.pad_keys(v)]
    inputs = [*of_q, *of_k] if p.over_keys else [*of_k, *of_q]
    length = c.padded_t if p.over_keys else c.padded_s
    kernel = plgpu.kernel(
        functools.partial(attention_gradients, p=p),
        out_type=[shape_like((c.b, length, p.held_heads, c.h), jnp.float32) for _ in sums],
        scratch_types=_scratch(p),
        grid=(p.held[1] * p.held_heads * c.b,),
        grid_names=("item",),
        num_threads=p.groups + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=compat.interpret_mosaic() if spec.interpret else None,
    )
    out = kernel(*inputs, less_lse, less_delta, *masks)
    return [x[:, : c.t if p.over_keys else c.s] for x in out]


def _stats(c, intervals, lse, delta):
    """(-lse in log2, -delta), `[B, N, Tp]`; -inf where a query sees nothing: its weights are 0."""
    empty = (intervals.end <= intervals.start)[..., None] | (lse == -jnp.inf)
    less_lse = jnp.where(empty, -jnp.inf, lse * -LOG2_E).swapaxes(1, 2)
    return (
        c.pad_queries(less_lse.astype(jnp.float32), -jnp.inf, dim=2),
        c.pad_queries(-delta.astype(jnp.float32).swapaxes(1, 2), dim=2),
    )


def _scratch(p: _Plan):
    c = p.c

    def matrix(*shape):
        transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        return plgpu.SMEM(shape, c.dtype, transforms=transforms)

    stages_a, stages_b = p.stages
    vectors = [jnp.int32] if p.over_keys else [jnp.float32, jnp.float32, jnp.int32, jnp.int32]
    spare = {}
    if c.spec.interpret:
        spare = {"spare": matrix(p.groups, ROWS, p.passing)}
    return dict(
        held_a=matrix(p.held[0], c.h),
        held_b=matrix(p.held[0], c.h),
        a=matrix(stages_a, p.passing, c.h),
        b=matrix(stages_b, p.passing, c.h),
        vectors=[plgpu.SMEM((stages_a, p.passing), dtype) for dtype in vectors],
        held_here=plgpu.Barrier(num_arrivals=2),
        a_here=plgpu.Barrier(num_arrivals=1 + len(vectors), num_barriers=stages_a),
        b_here=plgpu.Barrier(num_barriers=stages_b),
        a_free=plgpu.Barrier(num_arrivals=p.groups, num_barriers=stages_a),
        b_free=plgpu.Barrier(num_arrivals=p.groups, num_barriers=stages_b),
        **spare,
    )


def attention_gradients(
    held_a_ref,
    held_b_ref,
    a_ref,
    b_ref,
    less_lse_ref,
    less_delta_ref,
    start_ref,
    end_ref,
    index_ref,
    order_ref,
    spans_ref,
    longest_ref,
    *outs_and_scratch,
    p: _Plan,
    held_a,
    held_b,
    a,
    b,
    vectors,
    held_here,
    a_here,
    b_here,
    a_free,
    b_free,
    spare=None,
):
    c, outs = p.c, outs_and_scratch
    group = lax.axis_index("group")
    held_rows, held_blocks = p.held
    block, head, row = work_item(
        c, lax.axis_index("item"), held_blocks, p.held_heads, longest_ref
    )
    mask_row = c.mask_row(row)
    span = Span.of(spans_ref, mask_row, block)
    heads = jnp.int32(p.heads)
    steps = span.steps * heads
    stages_a, stages_b = (jnp.int32(x) for x in p.stages)
    held = pl.ds(block * held_rows, held_rows)

    @pl.when(group == p.groups)
    def _load():
        plgpu.set_max_registers(24, action="decrease")
        plgpu.copy_gmem_to_smem(held_a_ref.at[row, held, head], held_a, held_here)
        plgpu.copy_gmem_to_smem(held_b_ref.at[row, held, head], held_b, held_here)

        def load(step, _):
            place = span.place(lax.div(step, heads))
            if p.over_keys:
                at = place if c.one_run else order_ref[0, place]
                its_head = lax.div(head, jnp.int32(c.group))
            else:
                at = order_ref[0 if c.masks == 1 else row, place]
                its_head = head * heads + lax.rem(step, heads)
            rows = pl.ds(at * p.passing, p.passing)
            slot_a, slot_b = lax.rem(step, stages_a), lax.rem(step, stages_b)

            @pl.when(step >= stages_a)
            def _():
                plgpu.barrier_wait(a_free.at[slot_a])

            plgpu.copy_gmem_to_smem(a_ref.at[row, rows, its_head], a.at[slot_a], a_here.at[slot_a])
            sources = (
                [index_ref.at[rows]]
                if p.over_keys
                else [
                    less_lse_ref.at[row, its_head, rows],
                    less_delta_ref.at[row, its_head, rows],
                    start_ref.at[mask_row, rows],
                    end_ref.at[mask_row, rows],
                ]
            )
            for source, target in zip(sources, vectors, strict=True):
                plgpu.copy_gmem_to_smem(source, target.at[slot_a], a_here.at[slot_a])

            @pl.when(step >= stages_b)
            def _():
                plgpu.barrier_wait(b_free.at[slot_b])

            plgpu.copy_gmem_to_smem(b_ref.at[row, rows, its_head], b.at[slot_b], b_here.at[slot_b])
            return ()

        lax.fori_loop(jnp.int32(0), steps, load, ())

    @pl.when(group < p.groups)
    def _compute():
        plgpu.set_max_registers(240, action="increase")
        mine = pl.ds(group * ROWS, ROWS)
        own = pl.ds(block * held_rows + group * ROWS, ROWS)
        shape = (ROWS, p.passing)
        to_log2 = c.spec.scale * LOG2_E

        def of_held(ref, *index):
            x = compat.mosaic_load(ref.at[(*index, own)], WGMMA.reduce(1), optimized=False)
            return lambda slot: lax.broadcast_in_dim(x, shape, (0,))

        def of_passing(i):
            def read(slot):
                x = compat.mosaic_load(vectors[i].at[slot], WGMMA.reduce(0))
                return lax.broadcast_in_dim(x, shape, (1,))

            return read

        if p.over_keys:
            less_lse, less_delta = of_held(less_lse_ref, row, head), of_held(less_delta_ref, row, head)
            start, end = of_held(start_ref, mask_row), of_held(end_ref, mask_row)
            index = of_passing(0)
        else:
            less_lse, less_delta, start, end = map(of_passing, range(4))
            index = of_held(index_ref)

        plgpu.barrier_wait(held_here)

        def let_go(free, step, stages):
            @pl.when(jnp.logical_and(step >= 0, step + stages < steps))
            def _():
                plgpu.barrier_arrive(free.at[lax.rem(step, stages)])

        def left(x):
            x = x.astype(c.dtype)
            if not c.spec.interpret:
                return x
            spare[group] = x
            plgpu.commit_smem()
            return spare.at[group]

        def accumulate(*sums):
            sums = dict(zip(p.sums, sums, strict=True))
            sum_a = sums.get("dq", sums.get("dk"))
            sum_b = sums.get("dv")

            def visit(step, _, masked):
                slot_a, slot_b = lax.rem(step, stages_a), lax.rem(step, stages_b)

                def blocks(logits_acc, dweights_acc):
                    plgpu.barrier_wait(a_here.at[slot_a])
                    plgpu.wgmma(logits_acc, held_a.at[mine], compat.transpose_ref(a.at[slot_a]))
                    plgpu.wgmma_wait(1)
                    let_go(a_free, step - 1, stages_a)
                    if sum_b is not None:
                        let_go(b_free, step - 1, stages_b)
                    plgpu.barrier_wait(b_here.at[slot_b])
                    if sum_a is not None:
                        if not c.spec.interpret:
                            dweights_acc[...] = less_delta(slot_a)
                        plgpu.wgmma(
                            dweights_acc, held_b.at[mine], compat.transpose_ref(b.at[slot_b])
                        )
                    logits = _settled(logits_acc, 1 if sum_a is not None else 0)

                    exponents = logits * to_log2 + less_lse(slot_a)
                    if masked:
                        exponents = hide(exponents, start(slot_a), end(slot_a), index(slot_a))
                    weights = jnp.exp2(exponents)
                    if sum_b is not None:
                        plgpu.wgmma(sum_b, left(weights), b.at[slot_b])
                    if sum_a is not None:
                        dweights = _settled(dweights_acc, 1 if sum_b is not None else 0)
                        if sum_b is None:
                            let_go(b_free, step, stages_b)
                        if c.spec.interpret:
                            dweights = dweights + less_delta(slot_a)
                        dlogits = weights * dweights
                        plgpu.wgmma(sum_a, left(dlogits), a.at[slot_a])

                acc = plgpu.ACC(shape, jnp.float32)
                pl.run_scoped(blocks, acc, acc)
                return ()

            masked = span.masked * heads
            lax.fori_loop(jnp.int32(0), masked, functools.partial(visit, masked=True), ())
            lax.fori_loop(masked, steps, functools.partial(visit, masked=False), ())
            for out, (name, acc) in zip(outs, sums.items(), strict=True):
                weight = 1.0 if name == "dv" else c.spec.scale
                out[row, own, head] = acc[...] * weight

        pl.run_scoped(accumulate, *[plgpu.ACC((ROWS, c.h), jnp.float32) for _ in p.sums])


def _settled(acc, wait: int):
    """The value of an accumulator once all products but the latest `wait` are done."""
    return lax.optimization_barrier(plgpu.wgmma_accumulator_load(acc, wait_n=wait))
