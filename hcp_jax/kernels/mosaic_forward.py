"""The forward kernel on Mosaic GPU."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hcp_jax import compat
from hcp_jax.kernels.core import CoreSpec
from hcp_jax.kernels.merge import Partial
from hcp_jax.kernels.mosaic_blocks import ROWS, Facts, Masks, Span, hide, shape_like, work_item, multiply, zeros
from hcp_jax.layout import KeyRuns
from hcp_jax.mask import Intervals

LOG2_E = math.log2(math.e)
WG = plgpu.Layout.WGMMA
ROW, COL = WG.reduce(1), WG.reduce(0)


def forward(spec: CoreSpec, q, k, v, intervals: Intervals, runs: KeyRuns) -> Partial:
    """See `hcp_jax.kernels.core.attend`."""
    c = Facts.of(spec, q, k, intervals, runs, "forward")
    masks = c.masks_over_keys(intervals, runs)
    tile = c.tile
    groups = tile.warps // 4
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

    def smem(*shape):
        return plgpu.SMEM(shape, c.dtype, transforms=transforms)

    kernel = plgpu.kernel(
        functools.partial(attention_forward, c=c),
        out_type=(
            shape_like((c.b, c.padded_t, c.n, c.h), jnp.float32),
            shape_like((c.b, c.n, c.padded_t), jnp.float32),
        ),
        scratch_types=dict(
            q_smem=smem(groups, ROWS, c.h),
            k_smem=smem(tile.stages, tile.block_k, c.h),
            v_smem=smem(tile.stages, tile.block_k, c.h),
            index_smem=plgpu.SMEM((tile.stages, tile.block_k), jnp.int32),
            lse_smem=plgpu.SMEM((groups, ROWS), jnp.float32),
            q_here=plgpu.Barrier(num_barriers=groups),
            k_here=plgpu.Barrier(num_arrivals=2, num_barriers=tile.stages),
            v_here=plgpu.Barrier(num_barriers=tile.stages),
            k_free=plgpu.Barrier(num_arrivals=groups, num_barriers=tile.stages),
            v_free=plgpu.Barrier(num_arrivals=groups, num_barriers=tile.stages),
            turn=plgpu.Barrier(num_arrivals=groups),
            **(dict(spare_smem=smem(groups, ROWS, tile.block_k)) if spec.interpret else {}),
        ),
        # the interpreter
        grid=(c.blocks_q * c.n * c.b,),
        grid_names=("item",),
        num_threads=groups + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=compat.interpret_mosaic() if spec.interpret else None,
    )
    out, lse = kernel(c.pad_queries(q), c.pad_keys(k), c.pad_keys(v), *masks)
    return Partial(out[:, : c.t], lse[:, :, : c.t].swapaxes(1, 2))


def attention_forward(
    q_ref, k_ref, v_ref, start_ref, end_ref, index_ref, order_ref, spans_ref, longest_ref,
    out_ref, lse_ref, *, c: Facts,
    q_smem, k_smem, v_smem, index_smem, lse_smem, q_here, k_here, v_here, k_free, v_free, turn, spare_smem=None,
):
    tile = c.tile
    groups = tile.warps // 4
    group = lax.axis_index("group")
    block, head, row = work_item(c, lax.axis_index("item"), c.blocks_q, c.n, longest_ref)
    mask_row = c.mask_row(row)
    span = Span.of(spans_ref, mask_row, block)
    steps = span.steps

    def take_turn():
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    @pl.when(group == groups)
    def _load():
        plgpu.set_max_registers(40, action="decrease")
        kv_head = lax.div(head, jnp.int32(c.group))

        def load(step, _):
            slot = lax.rem(step, jnp.int32(tile.stages))
            place = span.place(step)
            key_block = place if c.one_run else order_ref[0, place]
            keys = pl.ds(key_block * tile.block_k, tile.block_k)

            @pl.when(step >= tile.stages)
            def _():
                plgpu.barrier_wait(k_free.at[slot])
            plgpu.copy_gmem_to_smem(k_ref.at[row, keys, kv_head], k_smem.at[slot], k_here.at[slot])
            plgpu.copy_gmem_to_smem(index_ref.at[keys], index_smem.at[slot], k_here.at[slot])
            @pl.when(step >= tile.stages)
            def _():
                plgpu.barrier_wait(v_free.at[slot])
            plgpu.copy_gmem_to_smem(v_ref.at[row, keys, kv_head], v_smem.at[slot], v_here.at[slot])
            return ()

        lax.fori_loop(jnp.int32(0), steps, load, ())

    @pl.when(group < groups)
    def _compute():
        plgpu.set_max_registers(232 if groups == 2 else 160, action="increase")
        rows = pl.ds(block * tile.block_q + group * ROWS, ROWS)
        plgpu.copy_gmem_to_smem(q_ref.at[row, rows, head], q_smem.at[group], q_here.at[group])
        start = compat.mosaic_load(start_ref.at[mask_row, rows], ROW, optimized=False)
        end = compat.mosaic_load(end_ref.at[mask_row, rows], ROW, optimized=False)
        out = plgpu.layout_cast(jnp.zeros((ROWS, c.h), jnp.float32), WG)
        top = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), ROW)
        total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW)
        to_log2 = c.spec.scale * LOG2_E
        plgpu.barrier_wait(q_here.at[group])
        pl.when(group == 1)(take_turn)

        shape = (ROWS, tile.block_k)
        def over_rows(x, shape=shape):
            return lax.broadcast_in_dim(x, shape, (0,))

        def visit(step, carry, masked):
            out, top, total = carry
            slot = lax.rem(step, jnp.int32(tile.stages))
            plgpu.barrier_wait(k_here.at[slot])
            [logits] = multiply(
                c, (None, q_smem.at[group], compat.transpose_ref(k_smem.at[slot])),
                meanwhile=take_turn,
            )
            if masked:
                index = compat.mosaic_load(index_smem.at[slot], COL)
                index = lax.broadcast_in_dim(index, shape, (1,))
                logits = hide(logits, over_rows(start), over_rows(end), index)
            plgpu.barrier_arrive(k_free.at[slot])
            new_top = jnp.maximum(top, jnp.max(logits, axis=1) * to_log2)
            anchor = jnp.where(new_top == -jnp.inf, 0.0, new_top) if masked else new_top
            weights = jnp.exp2(logits * to_log2 - over_rows(anchor))
            fade = jnp.exp2(top - anchor)
            total = total * fade + jnp.sum(weights, axis=1)
            out = out * over_rows(fade, out.shape)
            cast = weights.astype(c.dtype)
            plgpu.barrier_wait(v_here.at[slot])
            take_turn()
            [out] = multiply(c, (out, cast, v_smem.at[slot]), spare=spare_smem and spare_smem.at[group])
            plgpu.barrier_arrive(v_free.at[slot])
            return out, new_top, total

        carry = out, top, total
        carry = lax.fori_loop(jnp.int32(0), span.masked, functools.partial(visit, masked=True), carry)
        carry = lax.fori_loop(span.masked, steps, functools.partial(visit, masked=False), carry)
        pl.when(group == 0)(take_turn)
        out, top, total = carry
        empty = jnp.logical_or(total == 0, end <= start)
        total = jnp.where(empty, 1.0, total)
        weight = jnp.where(empty, 0.0, 1.0 / total)
        out_ref[row, rows, head] = out * over_rows(weight, out.shape)
        lse_smem[group] = jnp.where(empty, -jnp.inf, top / LOG2_E + jnp.log(total))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(lse_smem.at[group], lse_ref.at[row, head, rows])
        plgpu.wait_smem_to_gmem(0)
