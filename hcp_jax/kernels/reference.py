"""Implement the dense core: all logits at once, in float32 (float64 for float64 inputs).

All other implementations are tested against this one, so it is written to be easy to read: masks
follow their definition, and the softmax is computed in one piece. Memory grows with T·S.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hcp_jax.kernels.core import CoreSpec, Problem
from hcp_jax.kernels.key_index import key_index
from hcp_jax.kernels.merge import Partial, softmax_weight
from hcp_jax.sequence.layout import KeyRuns
from hcp_jax.sequence.mask import Intervals


def unsupported(problem: Problem) -> str | None:
    """Return None: the reference supports every call."""
    return None


def forward(spec: CoreSpec, q: Any, k: Any, v: Any, intervals: Intervals, runs: KeyRuns) -> Partial:
    """See `hcp_jax.kernels.core.attend`."""
    q, k, v = _grouped(q, k, v)
    logits, _ = _logits(spec, q, k, intervals, runs)
    top = jnp.max(logits, axis=-1, keepdims=True, initial=-jnp.inf)
    weights = softmax_weight(logits, top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    lse = jnp.log(total) + jnp.where(total > 0, top, 0)
    out = _einsum("bkgts,bskh->btkgh", weights / jnp.where(total > 0, total, 1), v)
    return Partial(
        out.reshape(*out.shape[:2], -1, out.shape[-1]),
        jnp.moveaxis(lse[..., 0], 3, 1).reshape(*out.shape[:2], -1),
    )


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
    q_shape, (q, k, v) = q.shape, _grouped(q, k, v)
    batch, length, kv_heads, queries_per_kv, _ = q.shape
    dout = dout.astype(q.dtype).reshape(batch, length, kv_heads, queries_per_kv, -1)
    by_row = (batch, length, kv_heads, queries_per_kv)
    lse, delta = (jnp.moveaxis(x.reshape(by_row), 1, 3)[..., None] for x in (lse, delta))

    logits, cap_slope = _logits(spec, q, k, intervals, runs)
    weights = softmax_weight(logits, lse)
    dlogits = weights * (_einsum("btkgh,bskh->bkgts", dout, v) - delta) * cap_slope * spec.scale
    dq = _einsum("bkgts,bskh->btkgh", dlogits, k).reshape(q_shape)
    dk = _einsum("bkgts,btkgh->bskh", dlogits, q)
    dv = _einsum("bkgts,btkgh->bskh", weights, dout)
    return dq, dk, dv


def _logits(spec: CoreSpec, q: Any, k: Any, intervals: Intervals, runs: KeyRuns) -> Any:
    """Return the masked logits, `[B, K, G, T, S]`, and the slope of the soft cap at each."""
    logits = spec.scale * _einsum("btkgh,bskh->bkgts", q, k)
    slope: Float[Array, ...] | float = 1.0
    if spec.logits_soft_cap is not None:
        capped = jnp.tanh(logits / spec.logits_soft_cap)
        logits, slope = spec.logits_soft_cap * capped, 1 - capped**2
    index = key_index(runs, k.shape[1])[(None,) * (logits.ndim - 1)]
    start, end = (jnp.asarray(x)[:, None, None, :, None] for x in intervals)
    visible = (index >= start) & (index < end) & (index >= 0)
    return jnp.where(visible, logits, -jnp.inf), slope


def _grouped(q: Any, k: Any, v: Any) -> Any:
    """Reshape queries to `[B, T, K, G, H]`, and cast all arrays to the computation's dtype."""
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    return q.astype(dtype), k.astype(dtype), v.astype(dtype)


def _einsum(subscripts: Any, a: Any, b: Any) -> Any:
    return jnp.einsum(subscripts, a, b, precision=jax.lax.Precision.HIGHEST)
