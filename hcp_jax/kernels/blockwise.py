"""Implement the blockwise core in plain jnp: FlashAttention's recurrence, for any platform.

Memory is linear in T and S: one block of logits exists at a time. A block of queries visits only
the blocks of keys that some of its intervals reach. These are known before any product is computed,
from the least start and the greatest end of the block's intervals and the least and greatest global
index of each block of keys.

The gradient visits the same pairs of blocks once and computes five products for each (logits, dp,
dv, dk, dq). (Dao, FlashAttention-2, 2023.)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from hcp_jax.kernels.core import CoreSpec, Problem
from hcp_jax.kernels.key_index import key_index
from hcp_jax.kernels.merge import Partial, softmax_weight
from hcp_jax.sequence.layout import KeyRuns
from hcp_jax.sequence.mask import Intervals

BLOCK = 256  # queries per block, and keys per block: 1 MiB of float32 logits for four heads


class _Blocks(NamedTuple):
    """Queries and keys cut into blocks along a new first dim, and the extremes of each block."""

    q: Float[Array, "Q B K G q H"]
    start: Int32[Array, "Q B1 1 1 q 1"]
    end: Int32[Array, "Q B1 1 1 q 1"]
    k: Float[Array, "S B K s H"]
    v: Float[Array, "S B K s Hv"]
    key_index: Int32[Array, "S s"]  # global index of each key; -1 for padding
    reach: tuple[Int32[Array, "Q"], Int32[Array, "Q"]]  # least start, greatest end of its queries
    spans: tuple[Int32[Array, "S"], Int32[Array, "S"]]  # least, greatest index of its keys


def unsupported(problem: Problem) -> str | None:
    """Return None: plain jnp supports every call."""
    return None


def forward(spec: CoreSpec, q: Any, k: Any, v: Any, intervals: Intervals, runs: KeyRuns) -> Partial:
    """See `hcp_jax.kernels.core.attend`."""
    blocks = _cut(q, k, v, intervals, runs)
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    _, _, kv_heads, queries_per_kv, queries, _ = blocks.q.shape

    def attend_block(i: Any) -> Any:
        visits, num_visits = _visits(blocks, i)
        rows = (q.shape[0], kv_heads, queries_per_kv, queries, 1)

        def visit(j: Any, carry: Any) -> Any:
            out, top, total = carry
            s = visits[j]
            logits, _ = _logits(spec, blocks, i, s)
            new_top = jnp.maximum(top, jnp.max(logits, axis=-1, keepdims=True))
            weights, decay = softmax_weight(logits, new_top), softmax_weight(top, new_top)
            total = decay * total + jnp.sum(weights, axis=-1, keepdims=True)
            out = decay * out + _dot("bkgqs,bksh->bkgqh", weights.astype(v.dtype), blocks.v[s])
            return out, new_top, total

        out, top, total = jax.lax.fori_loop(
            0,
            num_visits,
            visit,
            (
                jnp.zeros((*rows[:-1], v.shape[3]), dtype),
                jnp.full(rows, -jnp.inf, dtype),
                jnp.zeros(rows, dtype),
            ),
        )
        seen = total > 0
        lse = jnp.log(total) + jnp.where(seen, top, 0)
        return out / jnp.where(seen, total, 1), lse

    out, lse = jax.lax.map(attend_block, jnp.arange(blocks.q.shape[0]))
    length = q.shape[1]
    return Partial(_join_queries(out, length), _join_queries(lse, length)[..., 0])


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
    blocks = _cut(q, k, v, intervals, runs)
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    kv_heads = k.shape[2]
    dout_blocks = _cut_queries(dout.astype(q.dtype), kv_heads)
    lse_blocks = _cut_queries(lse[..., None], kv_heads)
    delta_blocks = _cut_queries(delta[..., None], kv_heads)

    def add_block(dkv: Any, i: Any) -> Any:
        visits, num_visits = _visits(blocks, i)

        def visit(j: Any, carry: Any) -> Any:
            dq, dk, dv = carry
            s = visits[j]
            logits, slope = _logits(spec, blocks, i, s)
            weights = softmax_weight(logits, lse_blocks[i])
            dweights = _dot("bkgqh,bksh->bkgqs", dout_blocks[i], blocks.v[s])
            dlogits = weights * (dweights - delta_blocks[i]) * slope * spec.scale
            weights, dlogits = weights.astype(q.dtype), dlogits.astype(q.dtype)
            dq += _dot("bkgqs,bksh->bkgqh", dlogits, blocks.k[s])
            dk = dk.at[s].add(_dot("bkgqs,bkgqh->bksh", dlogits, blocks.q[i]))
            dv = dv.at[s].add(_dot("bkgqs,bkgqh->bksh", weights, dout_blocks[i]))
            return dq, dk, dv

        dq = jnp.zeros(blocks.q.shape[1:], dtype)
        dq, *dkv = jax.lax.fori_loop(0, num_visits, visit, (dq, *dkv))
        return tuple(dkv), dq

    zeros = tuple(jnp.zeros(x.shape, dtype) for x in (blocks.k, blocks.v))
    (dk, dv), dq = jax.lax.scan(add_block, zeros, jnp.arange(blocks.q.shape[0]))
    return _join_queries(dq, q.shape[1]), _join_keys(dk, k.shape[1]), _join_keys(dv, k.shape[1])


def _logits(spec: CoreSpec, blocks: _Blocks, i: Any, s: Any) -> Any:
    """Return the masked logits of query block i against key block s, and the soft cap's slope."""
    logits = spec.scale * _dot("bkgqh,bksh->bkgqs", blocks.q[i], blocks.k[s])
    slope: Float[Array, ...] | float = 1.0
    if spec.logits_soft_cap is not None:
        capped = jnp.tanh(logits / spec.logits_soft_cap)
        logits, slope = spec.logits_soft_cap * capped, 1 - capped**2
    index = blocks.key_index[s][(None,) * (logits.ndim - 1)]
    visible = (index >= blocks.start[i]) & (index < blocks.end[i]) & (index >= 0)
    return jnp.where(visible, logits, -jnp.inf), slope


def _cut(q: Any, k: Any, v: Any, intervals: Intervals, runs: KeyRuns) -> _Blocks:
    keys = min(BLOCK, k.shape[1])
    index = key_index(runs, k.shape[1])
    index = _cut_dim(index, keys, dim=0, fill=-1)
    start, end = (
        _cut_dim(jnp.asarray(x), min(BLOCK, q.shape[1]), dim=1)[:, :, None, None, :, None]
        for x in intervals
    )
    limit, others = jnp.iinfo(jnp.int32).max, tuple(range(1, start.ndim))
    empty = end <= start
    return _Blocks(
        q=_cut_queries(q, k.shape[2]),
        start=start,
        end=end,
        k=_cut_dim(k, keys, dim=1).swapaxes(2, 3),
        v=_cut_dim(v, keys, dim=1).swapaxes(2, 3),
        key_index=index,
        reach=(
            jnp.min(jnp.where(empty, limit, start), axis=others),
            jnp.max(jnp.where(empty, -1, end), axis=others),
        ),
        spans=(
            jnp.min(jnp.where(index < 0, limit, index), axis=1),
            jnp.max(index, axis=1),
        ),
    )


def _visits(blocks: _Blocks, i: Any) -> tuple[Int32[Array, "S"], Int32[Array, ""]]:
    """Return the key blocks, those that query block i may see first, and how many it may see."""
    (first, stop), (least, greatest) = blocks.reach, blocks.spans
    visible = (first[i] <= greatest) & (stop[i] > least)
    order = jnp.argsort(~visible, stable=True).astype(jnp.int32)
    return order, jnp.sum(visible, dtype=jnp.int32)


def _cut_queries(x: Any, kv_heads: int) -> Any:
    """Cut `[B, T, N, H]` into blocks `[Q, B, K, G, q, H]`, with G query heads per kv head."""
    x = _cut_dim(x, min(BLOCK, x.shape[1]), dim=1)
    x = x.reshape(*x.shape[:3], kv_heads, -1, x.shape[-1])
    return x.transpose(0, 1, 3, 4, 2, 5)


def _join_queries(x: Any, length: int) -> Any:
    blocks, batch, kv_heads, queries_per_kv, queries, size = x.shape
    x = x.transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(batch, blocks * queries, kv_heads * queries_per_kv, size)[:, :length]


def _join_keys(x: Any, length: int) -> Any:
    blocks, batch, kv_heads, keys, size = x.shape
    return x.transpose(1, 0, 3, 2, 4).reshape(batch, blocks * keys, kv_heads, size)[:, :length]


def _cut_dim(x: Any, block: int, dim: int, fill: int = 0) -> Any:
    """Pad `dim` and cut it into blocks along a new first dim."""
    tail = -x.shape[dim] % block
    widths = [(0, tail if d == dim else 0) for d in range(x.ndim)]
    x = jnp.pad(x, widths, constant_values=fill) if tail else x
    x = x.reshape(*x.shape[:dim], -1, block, *x.shape[dim + 1 :])
    return jnp.moveaxis(x, dim, 0)


def _dot(subscripts: str, a: Any, b: Any) -> Any:
    """Multiply, accumulating in at least float32; float32 operands are not rounded to tf32."""
    dtype = jnp.promote_types(a.dtype, jnp.float32)
    exact = a.dtype not in (jnp.bfloat16, jnp.float16)
    return jnp.einsum(
        subscripts,
        a,
        b,
        precision=jax.lax.Precision.HIGHEST if exact else None,
        preferred_element_type=dtype,
    )
