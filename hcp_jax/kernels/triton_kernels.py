"""Implement the Triton kernels: the arithmetic of one program.

All three kernels visit blocks (`_visit_blocks`) and compute a block's logits in the same way: as
the matrix product gives them, with the factor `scale · log2(e)` applied just before `exp2`, in one
multiply-add. A head is always a tuple of parts (`Call.parts`).

This module can be read side by side with the FlashAttention paper.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from hcp_jax.kernels.triton_call import Call, Masks

LOG2_E = math.log2(math.e)


def attention_forward(
    q_ref: Any, k_ref: Any, v_ref: Any, masks: Masks, out_ref: Any, lse_ref: Any, *, c: Call
) -> None:
    """Compute the partial of one query block: online softmax over the key blocks that it sees."""
    block, part = _block_and_part(c)
    rows = _rows(block, c.tile.block_q)
    q = _load(c, q_ref, rows, c.h, c.t)
    start, end = masks.start[rows], masks.end[rows]

    def visit(key_block: Any, _: Any, carry: Any, masked: bool) -> Any:
        out, top, total = carry
        keys = _rows(key_block, c.tile.block_k)
        limit = c.s if masked else None
        logits, to_log2, _ = _logits(c, q, _load(c, k_ref, keys, c.h, limit))
        if masked:
            logits = _hide(logits, start[:, None], end[:, None], masks.key_index[keys][None, :])
        new_top = jnp.maximum(top, jnp.max(logits, axis=1))
        # A row that has seen no key yet has top = -inf; use 0 instead, to avoid inf - inf.
        anchor = jnp.where(new_top == -jnp.inf, 0.0, new_top) if masked else new_top
        anchor = anchor * to_log2
        weights = _exp2(c, logits, to_log2, -anchor[:, None])
        fade = jnp.exp2(top * to_log2 - anchor)
        total = fade * total + jnp.sum(weights, axis=1)
        v = _load(c, v_ref, keys, c.hv, limit)
        weights = weights.astype(v_ref.dtype)
        out = tuple(fade[:, None] * o + _dot(weights, x) for o, x in zip(out, v, strict=True))
        return out, new_top, total

    top = jnp.full((c.tile.block_q,), -jnp.inf, jnp.float32)
    carry = _zeros(c, c.tile.block_q, c.hv), top, jnp.zeros_like(top)
    out, top, total = _visit_blocks(masks, part, visit, carry, in_order=c.one_run)
    # Queries that see nothing were included, unmasked, in full blocks: reset them.
    empty = (total == 0) | (end <= start)
    total = jnp.where(empty, 1.0, total)
    _store(c, out_ref, rows, out, jnp.where(empty, 0.0, 1.0 / total), c.t)
    top = top * (_to_log2(c) / LOG2_E)
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
    plgpu.store(lse_ref.at[rows], lse, mask=_within(rows, c.t))


def attention_dq(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    dout_ref: Any,
    minus_lse_ref: Any,
    delta_ref: Any,
    masks: Masks,
    dq_ref: Any,
    *,
    c: Call,
) -> None:
    """Compute dq of one query block, over the key blocks that it sees."""
    block, part = _block_and_part(c)
    rows = _rows(block, c.tile.block_q)
    q, dout = _load(c, q_ref, rows, c.h, c.t), _load(c, dout_ref, rows, c.hv, c.t)
    start, end = masks.start[rows], masks.end[rows]
    minus_lse, delta = minus_lse_ref[rows], delta_ref[rows]

    def visit(key_block: Any, _: Any, dq: Any, masked: bool) -> Any:
        keys = _rows(key_block, c.tile.block_k)
        limit = c.s if masked else None
        k = _load(c, k_ref, keys, c.h, limit)
        logits, to_log2, slope = _logits(c, q, k)
        if masked:
            logits = _hide(logits, start[:, None], end[:, None], masks.key_index[keys][None, :])
        weights = _exp2(c, logits, to_log2, minus_lse[:, None]) * slope
        dweights = _dot_nt(dout, _load(c, v_ref, keys, c.hv, limit))
        dlogits = (weights * (dweights - delta[:, None])).astype(k_ref.dtype)
        return tuple(d + _dot(dlogits, x) for d, x in zip(dq, k, strict=True))

    dq = _visit_blocks(masks, part, visit, _zeros(c, c.tile.block_q, c.h), in_order=c.one_run)
    _store(c, dq_ref, rows, dq, c.spec.scale, c.t)


def attention_dkv(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    dout_ref: Any,
    minus_lse_ref: Any,
    delta_ref: Any,
    masks: Masks,
    dk_ref: Any,
    dv_ref: Any,
    *,
    c: Call,
) -> None:
    """Compute dk and dv of one key block, over the query blocks of all heads that see it.

    Blocks are transposed: keys are rows, queries columns.
    """
    block, part = _block_and_part(c)
    keys = _rows(block, c.tile.block_k)
    k, v = _load(c, k_ref, keys, c.h, c.s), _load(c, v_ref, keys, c.hv, c.s)
    index = masks.key_index[keys]

    def visit(query_block: Any, head: Any, carry: Any, masked: bool) -> Any:
        dk, dv = carry
        rows = _rows(query_block, c.tile.block_q)
        q = _load(c, q_ref, rows, c.h, c.t, head)
        dout = _load(c, dout_ref, rows, c.hv, c.t, head)
        logits, to_log2, slope = _logits(c, k, q)
        if masked:
            start, end = masks.start[rows], masks.end[rows]
            logits = _hide(logits, start[None, :], end[None, :], index[:, None])
        weights = _exp2(c, logits, to_log2, minus_lse_ref[head, rows][None, :])
        cast = weights.astype(dout_ref.dtype)
        dv = tuple(d + _dot(cast, x) for d, x in zip(dv, dout, strict=True))
        dlogits = weights * slope * (_dot_nt(v, dout) - delta_ref[head, rows][None, :])
        dlogits = dlogits.astype(q_ref.dtype)
        dk = tuple(d + _dot(dlogits, x) for d, x in zip(dk, q, strict=True))
        return dk, dv

    carry = _zeros(c, c.tile.block_k, c.h), _zeros(c, c.tile.block_k, c.hv)
    dk, dv = _visit_blocks(masks, part, visit, carry, heads=c.passing_heads)
    _store(c, dk_ref, keys, dk, c.spec.scale, c.s)
    _store(c, dv_ref, keys, dv, 1.0, c.s)


def _visit_blocks(
    masks: Masks,
    part: Any,
    visit: Callable[..., Any],
    carry: Any,
    heads: int = 1,
    in_order: bool = False,
) -> Any:
    """Visit the blocks of a part's span for every head: both ends masked, then the rest unmasked.

    The two ends share a loop, so that the compiler has two loops to pipeline, not three.
    """
    first, full_first, full_last, last = (masks.spans[part, i] for i in range(4))

    def at(i: Any) -> Any:
        return i if in_order else masks.order[i]

    def end_visit(step: Any, carry: Any) -> Any:
        i, head = _split(step, heads)
        i = first + i
        i = jnp.where(i < full_first, i, i + (full_last - full_first))
        return visit(at(i), head, carry, masked=True)

    def inner_visit(step: Any, carry: Any) -> Any:
        i, head = _split(step, heads)
        return visit(at(i), head, carry, masked=False)

    ends = (full_first - first) + (last - full_last)
    carry = lax.fori_loop(jnp.int32(0), ends * heads, end_visit, carry)
    return lax.fori_loop(full_first * heads, full_last * heads, inner_visit, carry)


def _split(step: Any, heads: int) -> Any:
    """Return (block, head) of a step; all heads of a block come before the next block."""
    return lax.div(step, jnp.int32(heads)), lax.rem(step, jnp.int32(heads))


def _block_and_part(c: Call) -> tuple[Any, Any]:
    """Return the number of this program's block, and the number of its part among all parts.

    Blocks with much work under a causal mask come first: the last queries, and the first keys.
    """
    block, part, _, _ = c.grid.item(*map(pl.program_id, range(3)))
    block = block if c.kernel == "dkv" else c.blocks_q - 1 - block
    return block, block * c.grid.parts + part


def _to_log2(c: Call) -> float:
    """Return the positive factor that makes the logits of `_logits` exponents of 2."""
    plain = c.spec.logits_soft_cap is None and c.spec.scale > 0
    return c.spec.scale * LOG2_E if plain else LOG2_E


def _logits(c: Call, left: Any, right: Any) -> Any:
    """Return (logits without the factor `to_log2`, that factor, the soft cap's slope)."""
    logits, to_log2 = _dot_nt(left, right), _to_log2(c)
    cap = c.spec.logits_soft_cap
    if cap is None:
        return (logits if c.spec.scale > 0 else logits * c.spec.scale), to_log2, 1.0
    capped = jnp.tanh(logits * (c.spec.scale / cap))
    return capped * cap, to_log2, 1.0 - capped * capped


def _exp2(c: Call, x: Any, factor: float, plus: Any) -> Any:
    """Return exp2(factor · x + plus) of a block; `plus` is broadcast.

    On a GPU this is two instructions. The compiler alone needs six: it does not fuse the multiply
    and the add, and does not know that weights below 2^-126 may be flushed to zero.
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


def _hide(logits: Any, start: Any, end: Any, index: Any) -> Any:
    """Set logits to -inf where a key is outside a query's interval; padding has index -1."""
    return jnp.where((start <= index) & (index < end), logits, -jnp.inf)


def _rows(block: Any, size: int) -> Any:
    return pl.ds(pl.multiple_of(block * size, size), size)


def _within(rows: Any, limit: int | None) -> Any:
    """Return which of `rows` are below `limit`; None if all are known to be."""
    if limit is None or limit % rows.size == 0:
        return None
    return rows.start + lax.iota(jnp.int32, rows.size) < limit


def _load(c: Call, ref: Any, rows: Any, width: int, limit: int | None, head: Any = None) -> Any:
    """Load rows of a head, one array per part; rows at or past `limit` are zero."""
    heads, mask = () if head is None else (head,), _within(rows, limit)
    masking = {} if mask is None else {"mask": mask[:, None], "other": 0.0}
    return tuple(
        plgpu.load(ref.at[(rows, *heads, pl.ds(offset, part))], **masking)
        for offset, part in c.parts(width)
    )


def _store(c: Call, ref: Any, rows: Any, parts: Any, weight: Any, limit: int) -> None:
    """Write `weight · parts`, except rows at or past `limit`."""
    mask = _within(rows, limit)
    mask = None if mask is None else mask[:, None]
    weight = weight if isinstance(weight, float) else weight[:, None]
    for (offset, width), part in zip(c.parts(ref.shape[-1]), parts, strict=True):
        plgpu.store(ref.at[(rows, pl.ds(offset, width))], part * weight, mask=mask)


def _zeros(c: Call, rows: int, size: int) -> Any:
    return tuple(jnp.zeros((rows, width), jnp.float32) for _, width in c.parts(size))


def _dot(a: Any, b: Any) -> Any:
    """Return the product a b."""
    return _contract(a, b, 0)


def _dot_nt(a: Any, b: Any) -> Any:
    """Return the product a bᵀ of two heads in parts."""
    return sum(_contract(x, y, 1) for x, y in zip(a, b, strict=True))


def _contract(a: Any, b: Any, dim: int) -> Any:
    """Contract in float32; HIGHEST precision means no TF32 for float32 operands."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a, b, (((1,), (dim,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
