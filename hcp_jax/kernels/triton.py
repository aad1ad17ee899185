"""The blockwise core as Pallas kernels on the Triton backend: NVIDIA GPUs from Ampere on.

FlashAttention-2 (Dao, 2023) in three kernels. The forward keeps a block of queries and walks over
key blocks with an online softmax; dq walks the same way; dk and dv keep a block of keys and walk
over query blocks and over all the query heads of their kv head, so that GQA's sum needs no buffer
and nothing is added atomically: the same call gives the same bits. `triton_blocks` says which
blocks a walk visits and which of them need a mask.

Logits are used as they come out of the matrix product, and `scale · log2(e)` enters where they meet
`exp2` (one multiply-add each). A head size that is no power of two is cut into powers of two (192
is 128 and 64), because Triton's tiles have such sizes: padding 192 to 256 would cost a third more
arithmetic.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from hcp_jax import compat
from hcp_jax.kernels.core import CoreSpec, Problem
from hcp_jax.kernels.merge import Partial
from hcp_jax.kernels.tiles import Tile, tiles_for
from hcp_jax.kernels.triton_blocks import (
    KeyBlocks,
    QueryBlocks,
    Walk,
    key_blocks,
    query_blocks,
    walk_over_keys,
    walk_over_queries,
)
from hcp_jax.layout import KeyRuns
from hcp_jax.mask import Intervals

_DTYPES = ("bfloat16", "float16", "float32")
_LEAST_PART = 16  # the least inner dim of a matrix product in Triton
_GREATEST_HEAD = 256
_LOG2_E = math.log2(math.e)


def unsupported(problem: Problem) -> str | None:
    """Why these kernels cannot do `problem`, or None."""
    if problem.platform not in ("gpu", "cuda", "cpu"):
        return f"it runs on NVIDIA GPUs and, interpreted, on CPUs, not on {problem.platform}"
    if problem.dtype not in _DTYPES:
        return f"it takes {', '.join(_DTYPES)}, not {problem.dtype}"
    for name, size in (("head", problem.head_size), ("v head", problem.v_head_size)):
        if size % _LEAST_PART or not 0 < size <= _GREATEST_HEAD:
            return (
                f"it takes {name} sizes that are multiples of {_LEAST_PART} up to "
                f"{_GREATEST_HEAD}, not {size}"
            )
    return None


def forward(spec: CoreSpec, q, k, v, intervals: Intervals, runs: KeyRuns) -> Partial:
    """See `hcp_jax.kernels.core.attend`."""
    c = _Call.of(spec, q, k, v, intervals, runs, "forward")
    queries, keys = query_blocks(intervals, c.tile.block_q), key_blocks(runs, c.s, c.tile.block_k)
    walk = walk_over_keys(queries, keys, c.one_run)
    out, lse = c.run(
        _forward_kernel,
        grid=(c.blocks_q, c.n, c.b),
        inputs=[(q, c.of_head(c.h)), (k, c.of_kv_head(c.h)), (v, c.of_kv_head(c.hv))],
        masks=(queries, keys, walk),
        outputs=[(c.shape_of_q(c.hv), c.of_head(c.hv)), (c.shape_of_stats, c.stats_of_head)],
    )
    return Partial(out, lse[..., : c.t].swapaxes(1, 2))


def backward(spec: CoreSpec, q, k, v, intervals: Intervals, runs: KeyRuns, dout, lse, delta):
    """See `hcp_jax.kernels.core.attend_grads`."""
    arrays = (q, k, v, dout.astype(v.dtype), lse, delta)
    return _dq(spec, intervals, runs, *arrays), *_dkv(spec, intervals, runs, *arrays)


def _dq(spec: CoreSpec, intervals: Intervals, runs: KeyRuns, q, k, v, dout, lse, delta):
    c = _Call.of(spec, q, k, v, intervals, runs, "dq")
    queries, keys = query_blocks(intervals, c.tile.block_q), key_blocks(runs, c.s, c.tile.block_k)
    walk = walk_over_keys(queries, keys, c.one_run)
    [dq] = c.run(
        _dq_kernel,
        grid=(c.blocks_q, c.n, c.b),
        inputs=[
            (q, c.of_head(c.h)),
            (k, c.of_kv_head(c.h)),
            (v, c.of_kv_head(c.hv)),
            (dout, c.of_head(c.hv)),
            *((x, c.stats_of_head) for x in _stats(c, intervals, lse, delta)),
        ],
        masks=(queries, keys, walk),
        outputs=[(c.shape_of_q(c.h), c.of_head(c.h))],
    )
    return dq


def _dkv(spec: CoreSpec, intervals: Intervals, runs: KeyRuns, q, k, v, dout, lse, delta):
    c = _Call.of(spec, q, k, v, intervals, runs, "dkv")
    queries, keys = query_blocks(intervals, c.tile.block_q), key_blocks(runs, c.s, c.tile.block_k)
    walk = walk_over_queries(queries, keys)
    return c.run(
        _dkv_kernel,
        grid=(c.blocks_k, c.k, c.b),
        inputs=[
            (q, c.of_group(c.h)),
            (k, c.of_key_head(c.h)),
            (v, c.of_key_head(c.hv)),
            (dout, c.of_group(c.hv)),
            *((x, c.stats_of_group) for x in _stats(c, intervals, lse, delta)),
        ],
        masks=(queries, keys, walk),
        outputs=[(c.shape_of_k(c.h), c.of_key_head(c.h)), (c.shape_of_k(c.hv), c.of_key_head(c.hv))],
    )


def _stats(c: "_Call", intervals: Intervals, lse, delta):
    """-lse in log2 and delta, `[B, N, Tp]`; -inf where a query sees nothing: all its weights are 0."""
    empty = (intervals.end <= intervals.start)[..., None] | (lse == -jnp.inf)
    less_lse = jnp.where(empty, -jnp.inf, lse * -_LOG2_E)
    tail = ((0, 0), (0, 0), (0, c.padded_t - c.t))
    less_lse, delta = less_lse.swapaxes(1, 2), delta.swapaxes(1, 2)
    return jnp.pad(less_lse, tail, constant_values=-jnp.inf), jnp.pad(delta, tail)


@dataclasses.dataclass(frozen=True)
class _Call:
    """The static facts of one kernel call, and the blocks of arrays that its programs see.

    Every program sees all rows of the heads it works on, and takes its own by `pl.ds`; lengths are
    rounded up to whole blocks, and the rows past the end are never read without a mask.
    """

    b: int
    t: int
    s: int
    n: int
    k: int
    h: int
    hv: int
    mask_rows: int
    one_run: bool
    dtype: str
    tile: Tile
    spec: CoreSpec

    @classmethod
    def of(cls, spec: CoreSpec, q, k, v, intervals: Intervals, runs: KeyRuns, kernel: str):
        b, t, n, h = q.shape
        tiles = tiles_for(spec.device_kind, str(q.dtype), max(h, v.shape[3]))
        return cls(
            *(b, t, k.shape[1], n, k.shape[2], h, v.shape[3]),
            mask_rows=intervals.start.shape[0],
            one_run=runs.starts.shape[0] == 1,
            dtype=str(q.dtype),
            tile=getattr(tiles, kernel),
            spec=spec,
        )

    @property
    def group(self) -> int:
        return self.n // self.k

    @property
    def blocks_q(self) -> int:
        return pl.cdiv(self.t, self.tile.block_q)

    @property
    def blocks_k(self) -> int:
        return pl.cdiv(self.s, self.tile.block_k)

    @property
    def padded_t(self) -> int:
        return self.blocks_q * self.tile.block_q

    @property
    def padded_s(self) -> int:
        return self.blocks_k * self.tile.block_k

    def shape_of_q(self, width: int) -> tuple[int, ...]:
        return self.b, self.t, self.n, width

    def shape_of_k(self, width: int) -> tuple[int, ...]:
        return self.b, self.s, self.k, width

    @property
    def shape_of_stats(self) -> tuple[int, ...]:
        return self.b, self.n, self.padded_t

    def parts(self, size: int) -> list[tuple[int, int]]:
        """A head size as powers of two, as (offset, width).

        Products of float32 are unrolled into single multiply-adds, and what is loaded for a wide
        part at once does not fit into the registers: narrow parts there.
        """
        widest = 32 if self.dtype == "float32" else _GREATEST_HEAD
        parts, offset = [], 0
        while offset < size:
            width = min(1 << (size - offset).bit_length() - 1, widest)
            parts.append((offset, width))
            offset += width
        return parts

    # Blocks for a grid of (query block, query head, batch row).

    def of_head(self, width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, self.padded_t, None, width), lambda _, n, b: (b, 0, n, 0))

    def of_kv_head(self, width: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, self.padded_s, None, width), lambda _, n, b: (b, 0, lax.div(n, self.group), 0)
        )

    @property
    def stats_of_head(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, self.padded_t), lambda _, n, b: (b, n, 0))

    # Blocks for a grid of (key block, kv head, batch row).

    def of_group(self, width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, self.padded_t, self.group, width), lambda _, k, b: (b, 0, k, 0))

    def of_key_head(self, width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, self.padded_s, None, width), lambda _, k, b: (b, 0, k, 0))

    @property
    def stats_of_group(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, self.group, self.padded_t), lambda _, k, b: (b, k, 0))

    def run(self, kernel: Callable, grid, inputs, masks, outputs) -> Any:
        """Call `kernel` with the inputs, the masks' arrays and the outputs (shapes, in float32)."""
        compat.expect_pallas_triton()
        inputs = [*inputs, *self._mask_inputs(*masks)]
        call = pl.pallas_call(
            functools.partial(kernel, c=self),
            grid=grid,
            in_specs=[spec for _, spec in inputs],
            out_specs=[spec for _, spec in outputs],
            out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape, _ in outputs],
            compiler_params=plgpu.CompilerParams(
                num_warps=self.tile.warps, num_stages=self.tile.stages
            ),
            interpret=self.spec.interpret,
        )
        return call(*(array for array, _ in inputs))

    def _mask_inputs(self, queries: QueryBlocks, keys: KeyBlocks, walk: Walk):
        def per_row(array):
            zeros, own_row = (0,) * (array.ndim - 1), array.shape[0] > 1
            return array, pl.BlockSpec(
                (None, *array.shape[1:]), lambda _, __, b: (b if own_row else 0, *zeros)
            )

        return [
            per_row(queries.start),
            per_row(queries.end),
            per_row(keys.index[None]),
            per_row(walk.order),
            per_row(walk.spans),
        ]


def _forward_kernel(
    q_ref,
    k_ref,
    v_ref,
    start_ref,
    end_ref,
    index_ref,
    order_ref,
    spans_ref,
    out_ref,
    lse_ref,
    *,
    c: _Call,
):
    block = _last_block_first(c)
    rows = _rows(block, c.tile.block_q)
    q = _load(c, q_ref, rows, c.h, c.t)
    start, end = start_ref[rows], end_ref[rows]

    def visit(key_block, _, carry, masked: bool):
        out, top, total = carry
        keys = _rows(key_block, c.tile.block_k)
        limit = c.s if masked else None
        logits, to_log2, _ = _logits(c, q, _load(c, k_ref, keys, c.h, limit))
        if masked:
            logits = _hide(logits, start[:, None], end[:, None], index_ref[keys][None, :])
        new_top = jnp.maximum(top, jnp.max(logits, axis=1))
        # A row that has seen nothing yet has no finite top to measure from; 0 will do.
        anchor = jnp.where(new_top == -jnp.inf, 0.0, new_top) if masked else new_top
        anchor = anchor * to_log2
        weights = _exp2(c, logits, to_log2, -anchor[:, None])
        fade = jnp.exp2(top * to_log2 - anchor)
        total = fade * total + jnp.sum(weights, axis=1)
        v = _load(c, v_ref, keys, c.hv, limit)
        weights = weights.astype(v_ref.dtype)
        out = tuple(fade[:, None] * o + _dot(weights, x) for o, x in zip(out, v, strict=True))
        return out, new_top, total

    out = tuple(jnp.zeros((c.tile.block_q, width), jnp.float32) for _, width in c.parts(c.hv))
    top = jnp.full((c.tile.block_q,), -jnp.inf, jnp.float32)
    out, top, total = _walk(
        spans_ref, order_ref, block, 1, visit, (out, top, jnp.zeros_like(top)), c.one_run
    )
    # Rows without a key rode along unmasked.
    empty = (total == 0) | (end <= start)
    total = jnp.where(empty, 1.0, total)
    weight = jnp.where(empty, 0.0, 1.0 / total)
    _store(c, out_ref, rows, out, weight, c.t)
    to_nat = _to_log2(c) / _LOG2_E
    lse_ref[rows] = jnp.where(empty, -jnp.inf, top * to_nat + jnp.log(total))


def _dq_kernel(
    q_ref,
    k_ref,
    v_ref,
    dout_ref,
    less_lse_ref,
    delta_ref,
    start_ref,
    end_ref,
    index_ref,
    order_ref,
    spans_ref,
    dq_ref,
    *,
    c: _Call,
):
    block = _last_block_first(c)
    rows = _rows(block, c.tile.block_q)
    q, dout = _load(c, q_ref, rows, c.h, c.t), _load(c, dout_ref, rows, c.hv, c.t)
    start, end, less_lse, delta = start_ref[rows], end_ref[rows], less_lse_ref[rows], delta_ref[rows]

    def visit(key_block, _, dq, masked: bool):
        keys = _rows(key_block, c.tile.block_k)
        limit = c.s if masked else None
        k = _load(c, k_ref, keys, c.h, limit)
        logits, to_log2, slope = _logits(c, q, k)
        if masked:
            logits = _hide(logits, start[:, None], end[:, None], index_ref[keys][None, :])
        weights = _exp2(c, logits, to_log2, less_lse[:, None])
        weights = weights * slope
        dweights = _dot_nt(dout, _load(c, v_ref, keys, c.hv, limit))
        dlogits = (weights * (dweights - delta[:, None])).astype(k_ref.dtype)
        return tuple(d + _dot(dlogits, x) for d, x in zip(dq, k, strict=True))

    dq = tuple(jnp.zeros((c.tile.block_q, width), jnp.float32) for _, width in c.parts(c.h))
    dq = _walk(spans_ref, order_ref, block, 1, visit, dq, c.one_run)
    _store(c, dq_ref, rows, dq, c.spec.scale, c.t)


def _dkv_kernel(
    q_ref,
    k_ref,
    v_ref,
    dout_ref,
    less_lse_ref,
    delta_ref,
    start_ref,
    end_ref,
    index_ref,
    order_ref,
    spans_ref,
    dk_ref,
    dv_ref,
    *,
    c: _Call,
):
    block = pl.program_id(0)
    keys = _rows(block, c.tile.block_k)
    k, v = _load(c, k_ref, keys, c.h, c.s), _load(c, v_ref, keys, c.hv, c.s)
    index = index_ref[keys]

    def visit(query_block, member, carry, masked: bool):
        dk, dv = carry
        rows = _rows(query_block, c.tile.block_q)
        q = _load(c, q_ref, rows, c.h, c.t, member)
        dout = _load(c, dout_ref, rows, c.hv, c.t, member)
        logits, to_log2, slope = _logits(c, k, q)
        if masked:
            logits = _hide(logits, start_ref[rows][None, :], end_ref[rows][None, :], index[:, None])
        weights = _exp2(c, logits, to_log2, less_lse_ref[member, rows][None, :])
        cast = weights.astype(dout_ref.dtype)
        dv = tuple(d + _dot(cast, x) for d, x in zip(dv, dout, strict=True))
        weights = weights * slope
        dweights = _dot_nt(v, dout)
        dlogits = weights * (dweights - delta_ref[member, rows][None, :])
        dlogits = dlogits.astype(q_ref.dtype)
        dk = tuple(d + _dot(dlogits, x) for d, x in zip(dk, q, strict=True))
        return dk, dv

    dk, dv = (
        tuple(jnp.zeros((c.tile.block_k, width), jnp.float32) for _, width in c.parts(size))
        for size in (c.h, c.hv)
    )
    dk, dv = _walk(spans_ref, order_ref, block, c.group, visit, (dk, dv), False)
    _store(c, dk_ref, keys, dk, c.spec.scale, c.s)
    _store(c, dv_ref, keys, dv, 1.0, c.s)


def _walk(spans_ref, order_ref, block, members: int, visit: Callable, carry, in_order: bool):
    """Visit the blocks of `block`'s span, once per member: those at its ends masked, then the rest.

    Both ends share one loop, so that the compiler has two loops to pipeline and not three.
    """
    first, full_first, full_last, last = (spans_ref[block, i] for i in range(4))

    def at(place):
        return place if in_order else order_ref[place]

    def end_visit(i, carry):
        place = first + lax.div(i, jnp.int32(members))
        place = jnp.where(place < full_first, place, place + (full_last - full_first))
        return visit(at(place), lax.rem(i, jnp.int32(members)), carry, masked=True)

    def inner_visit(i, carry):
        place, member = lax.div(i, jnp.int32(members)), lax.rem(i, jnp.int32(members))
        return visit(at(place), member, carry, masked=False)

    ends = (full_first - first) + (last - full_last)
    carry = lax.fori_loop(jnp.int32(0), ends * members, end_visit, carry)
    return lax.fori_loop(full_first * members, full_last * members, inner_visit, carry)


def _last_block_first(c: _Call):
    """The query block of this program. Under causal masks the last one has most to do."""
    return c.blocks_q - 1 - pl.program_id(0)


def _to_log2(c: _Call) -> float:
    """What `_logits`' logits are multiplied by to be exponents of 2; positive."""
    plain = c.spec.logits_soft_cap is None and c.spec.scale > 0
    return c.spec.scale * _LOG2_E if plain else _LOG2_E


def _logits(c: _Call, left, right):
    """(logits without the factor `to_log2`, that factor, the slope of the soft cap) of a block."""
    logits, to_log2 = _dot_nt(left, right), _to_log2(c)
    cap = c.spec.logits_soft_cap
    if cap is None:
        return (logits if c.spec.scale > 0 else logits * c.spec.scale), to_log2, 1.0
    capped = jnp.tanh(logits * (c.spec.scale / cap))
    return capped * cap, to_log2, 1.0 - capped * capped


def _exp2(c: _Call, x, factor: float, plus):
    """exp2(factor · x + plus) of a block, where `plus` broadcasts.

    On a GPU as two instructions. Left to itself the compiler neither contracts the multiplication
    with the addition nor believes that a weight below 2^-126 may be zero, and takes six.
    """
    if c.spec.interpret:
        return jnp.exp2(factor * x + plus)
    bits = np.float32(factor).view(np.uint32)
    asm = f"{{ .reg .f32 t; fma.rn.f32 t, $1, 0f{bits:08X}, $2; ex2.approx.ftz.f32 $0, t; }}"
    [out] = plgpu.elementwise_inline_asm(
        asm,
        args=[x, jnp.broadcast_to(plus, x.shape)],
        constraints="=f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )
    return out


def _hide(logits, start, end, index):
    """-inf where a key's global index lies outside a query's interval; padding has index -1."""
    return jnp.where((start <= index) & (index < end), logits, -jnp.inf)


def _rows(block, size: int):
    return pl.ds(pl.multiple_of(block * size, size), size)


def _load(c: _Call, ref, rows, width: int, limit: int | None, member=None):
    """Rows of a head, one array per part of it; zeros for rows at or past `limit`."""
    heads = () if member is None else (member,)
    mask = None
    if limit is not None and limit % rows.size:
        mask = (rows.start + lax.iota(jnp.int32, rows.size) < limit)[:, None]
    return tuple(
        plgpu.load(
            ref.at[(rows, *heads, pl.ds(offset, part))],
            mask=mask,
            other=None if mask is None else 0.0,
        )
        for offset, part in c.parts(width)
    )


def _store(c: _Call, ref, rows, parts, weight, limit: int):
    """Write `weight · parts`, without the rows at or past `limit`."""
    mask = None
    if limit % rows.size:
        mask = (rows.start + lax.iota(jnp.int32, rows.size) < limit)[:, None]
    weight = weight if isinstance(weight, float) else weight[:, None]
    for (offset, width), part in zip(c.parts(ref.shape[-1]), parts, strict=True):
        plgpu.store(ref.at[(rows, pl.ds(offset, width))], part * weight, mask=mask)


def _dot(a, b):
    """a b, accumulated in float32; exact products for float32 (no TF32)."""
    return _contract(a, b, 0)


def _dot_nt(a, b):
    """Σ over the parts of a head of a bᵀ."""
    return sum(_contract(x, y, 1) for x, y in zip(a, b, strict=True))


def _contract(a, b, dim: int):
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a, b, (((1,), (dim,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
