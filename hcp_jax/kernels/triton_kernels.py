"""The arithmetic of the Triton kernels: what one program does.

All three walk over blocks (`_walk`), and all compute a block's logits the same way: as they come
out of the matrix product, with `scale · log2(e)` entering where they meet `exp2`, one multiply-add
each. A head is a tuple of parts (`Call.parts`) throughout.

It stands apart because it is the part that is read beside FlashAttention's paper.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from hcp_jax.kernels.triton_call import Call, Masks

LOG2_E = math.log2(math.e)


def attention_forward(q_ref, k_ref, v_ref, masks: Masks, out_ref, lse_ref, *, c: Call) -> None:
    """The partial of one block of queries: online softmax over the key blocks that it sees."""
    block = _last_block_first(c)
    rows = _rows(block, c.tile.block_q)
    q = _load(c, q_ref, rows, c.h, c.t)
    start, end = masks.start[rows], masks.end[rows]

    def visit(key_block, _, carry, masked: bool):
        out, top, total = carry
        keys = _rows(key_block, c.tile.block_k)
        limit = c.s if masked else None
        logits, to_log2, _ = _logits(c, q, _load(c, k_ref, keys, c.h, limit))
        if masked:
            logits = _hide(logits, start[:, None], end[:, None], masks.key_index[keys][None, :])
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

    top = jnp.full((c.tile.block_q,), -jnp.inf, jnp.float32)
    carry = _zeros(c, c.tile.block_q, c.hv), top, jnp.zeros_like(top)
    out, top, total = _walk(masks, block, visit, carry, in_order=c.one_run)
    # Queries that see nothing rode along unmasked.
    empty = (total == 0) | (end <= start)
    total = jnp.where(empty, 1.0, total)
    _store(c, out_ref, rows, out, jnp.where(empty, 0.0, 1.0 / total), c.t)
    top = top * (_to_log2(c) / LOG2_E)
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
    plgpu.store(lse_ref.at[rows], lse, mask=_within(rows, c.t))


def attention_dq(
    q_ref, k_ref, v_ref, dout_ref, less_lse_ref, delta_ref, masks: Masks, dq_ref, *, c: Call
) -> None:
    """The dq of one block of queries, over the key blocks that it sees."""
    block = _last_block_first(c)
    rows = _rows(block, c.tile.block_q)
    q, dout = _load(c, q_ref, rows, c.h, c.t), _load(c, dout_ref, rows, c.hv, c.t)
    start, end = masks.start[rows], masks.end[rows]
    less_lse, delta = less_lse_ref[rows], delta_ref[rows]

    def visit(key_block, _, dq, masked: bool):
        keys = _rows(key_block, c.tile.block_k)
        limit = c.s if masked else None
        k = _load(c, k_ref, keys, c.h, limit)
        logits, to_log2, slope = _logits(c, q, k)
        if masked:
            logits = _hide(logits, start[:, None], end[:, None], masks.key_index[keys][None, :])
        weights = _exp2(c, logits, to_log2, less_lse[:, None]) * slope
        dweights = _dot_nt(dout, _load(c, v_ref, keys, c.hv, limit))
        dlogits = (weights * (dweights - delta[:, None])).astype(k_ref.dtype)
        return tuple(d + _dot(dlogits, x) for d, x in zip(dq, k, strict=True))

    dq = _walk(masks, block, visit, _zeros(c, c.tile.block_q, c.h), in_order=c.one_run)
    _store(c, dq_ref, rows, dq, c.spec.scale, c.t)


def attention_dkv(
    q_ref, k_ref, v_ref, dout_ref, less_lse_ref, delta_ref, masks: Masks, dk_ref, dv_ref, *, c: Call
) -> None:
    """The dk and dv of one block of keys, over the query blocks that see it, in all their heads.

    Blocks are transposed: keys are rows, queries columns.
    """
    block = pl.program_id(0)
    keys = _rows(block, c.tile.block_k)
    k, v = _load(c, k_ref, keys, c.h, c.s), _load(c, v_ref, keys, c.hv, c.s)
    index = masks.key_index[keys]

    def visit(query_block, head, carry, masked: bool):
        dk, dv = carry
        rows = _rows(query_block, c.tile.block_q)
        q = _load(c, q_ref, rows, c.h, c.t, head)
        dout = _load(c, dout_ref, rows, c.hv, c.t, head)
        logits, to_log2, slope = _logits(c, k, q)
        if masked:
            start, end = masks.start[rows], masks.end[rows]
            logits = _hide(logits, start[None, :], end[None, :], index[:, None])
        weights = _exp2(c, logits, to_log2, less_lse_ref[head, rows][None, :])
        cast = weights.astype(dout_ref.dtype)
        dv = tuple(d + _dot(cast, x) for d, x in zip(dv, dout, strict=True))
        dlogits = weights * slope * (_dot_nt(v, dout) - delta_ref[head, rows][None, :])
        dlogits = dlogits.astype(q_ref.dtype)
        dk = tuple(d + _dot(dlogits, x) for d, x in zip(dk, q, strict=True))
        return dk, dv

    carry = _zeros(c, c.tile.block_k, c.h), _zeros(c, c.tile.block_k, c.hv)
    dk, dv = _walk(masks, block, visit, carry, heads=c.group)
    _store(c, dk_ref, keys, dk, c.spec.scale, c.s)
    _store(c, dv_ref, keys, dv, 1.0, c.s)


def _walk(masks: Masks, block, visit: Callable, carry, heads: int = 1, in_order: bool = False):
    """Visit the blocks of `block`'s span for every head: both ends masked, then the rest without.

    The two ends share a loop, so that the compiler has two loops to pipeline and not three.
    """
    first, full_first, full_last, last = (masks.spans[block, i] for i in range(4))

    def at(i):
        return i if in_order else masks.order[i]

    def end_visit(step, carry):
        i, head = _split(step, heads)
        i = first + i
        i = jnp.where(i < full_first, i, i + (full_last - full_first))
        return visit(at(i), head, carry, masked=True)

    def inner_visit(step, carry):
        i, head = _split(step, heads)
        return visit(at(i), head, carry, masked=False)

    ends = (full_first - first) + (last - full_last)
    carry = lax.fori_loop(jnp.int32(0), ends * heads, end_visit, carry)
    return lax.fori_loop(full_first * heads, full_last * heads, inner_visit, carry)


def _split(step, heads: int):
    """(block, head) of a step; the heads of a block follow each other."""
    return lax.div(step, jnp.int32(heads)), lax.rem(step, jnp.int32(heads))


def _last_block_first(c: Call):
    """The query block of this program. Under causal masks the last one has most to do."""
    return c.blocks_q - 1 - pl.program_id(0)


def _to_log2(c: Call) -> float:
    """What `_logits`' logits are multiplied by to be exponents of 2; positive."""
    plain = c.spec.logits_soft_cap is None and c.spec.scale > 0
    return c.spec.scale * LOG2_E if plain else LOG2_E


def _logits(c: Call, left, right):
    """(logits without the factor `to_log2`, that factor, the slope of the soft cap) of a block."""
    logits, to_log2 = _dot_nt(left, right), _to_log2(c)
    cap = c.spec.logits_soft_cap
    if cap is None:
        return (logits if c.spec.scale > 0 else logits * c.spec.scale), to_log2, 1.0
    capped = jnp.tanh(logits * (c.spec.scale / cap))
    return capped * cap, to_log2, 1.0 - capped * capped


def _exp2(c: Call, x, factor: float, plus):
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


def _within(rows, limit: int | None):
    """Which of `rows` come before `limit`; None if all must."""
    if limit is None or limit % rows.size == 0:
        return None
    return rows.start + lax.iota(jnp.int32, rows.size) < limit


def _load(c: Call, ref, rows, width: int, limit: int | None, head=None):
    """Rows of a head, one array per part of it; zeros for rows at or past `limit`."""
    heads, mask = () if head is None else (head,), _within(rows, limit)
    masking = {} if mask is None else {"mask": mask[:, None], "other": 0.0}
    return tuple(
        plgpu.load(ref.at[(rows, *heads, pl.ds(offset, part))], **masking)
        for offset, part in c.parts(width)
    )


def _store(c: Call, ref, rows, parts, weight, limit: int) -> None:
    """Write `weight · parts`, without the rows at or past `limit`."""
    mask = _within(rows, limit)
    mask = None if mask is None else mask[:, None]
    weight = weight if isinstance(weight, float) else weight[:, None]
    for (offset, width), part in zip(c.parts(ref.shape[-1]), parts, strict=True):
        plgpu.store(ref.at[(rows, pl.ds(offset, width))], part * weight, mask=mask)


def _zeros(c: Call, rows: int, size: int):
    return tuple(jnp.zeros((rows, width), jnp.float32) for _, width in c.parts(size))


def _dot(a, b):
    """The product a b."""
    return _contract(a, b, 0)


def _dot_nt(a, b):
    """The product a bᵀ of two heads in parts."""
    return sum(_contract(x, y, 1) for x, y in zip(a, b, strict=True))


def _contract(a, b, dim: int):
    """Accumulated in float32. HIGHEST: no TF32 for float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a, b, (((1,), (dim,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
