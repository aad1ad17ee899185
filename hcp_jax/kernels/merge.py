"""Merge partials: attention of some queries against different parts of their keys.

If `lse_j = log Σ_k exp(s_k)` over the keys of part j, and `out_j` is the softmax-weighted mean of
their values, then the attention over both parts is

    lse = log(exp(lse_1) + exp(lse_2)),    out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2.

A part without a visible key has `lse = -inf` and `out = 0`. It has weight 0, and two such parts
merge to another one. (Milakov & Gimelshein 2018; Liu et al., Ring Attention, 2023.)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Partial(NamedTuple):
    """Attention of some queries against some of their keys, in float32 (float64 for float64)."""

    out: Float[Array, "B T N Hv"]
    lse: Float[Array, "B T N"]


def merge(a: Partial, b: Partial) -> Partial:
    """Return the partial over the keys of both; exact, associative, and correct for lse = -inf."""
    lse = jnp.logaddexp(a.lse, b.lse)
    weight_a, weight_b = softmax_weight(a.lse, lse), softmax_weight(b.lse, lse)
    return Partial(weight_a[..., None] * a.out + weight_b[..., None] * b.out, lse)


def merge_all(parts: Partial) -> Partial:
    """Return the partial over the keys of all parts, which are stacked along a leading dim."""
    lse = jax.nn.logsumexp(parts.lse, axis=0, keepdims=True)
    out = jnp.sum(softmax_weight(parts.lse, lse)[..., None] * parts.out, axis=0)
    return Partial(out, lse[0])


def softmax_weight(lse: Float[Array, "..."], total: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return exp(lse - total), the weight of a part in the whole; 0, not NaN, if it is empty."""
    return jnp.where(lse == -jnp.inf, 0.0, jnp.exp(lse - jnp.where(total == -jnp.inf, 0.0, total)))
