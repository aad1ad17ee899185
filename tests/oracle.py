"""Dense attention in float64, written from its definition and sharing no code with the library.

Masks are boolean matrices from their definitions, gradients are JAX's own through a plain softmax.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import hcp_jax as hcp


class Case(NamedTuple):
    """A mask as the library writes it and as a boolean matrix [B1, T, T] says it."""

    mask: hcp.Mask
    dense: np.ndarray


def masks(length: int) -> dict[str, Case]:
    """One case of every kind of mask, and mixtures, for two rows of `length` tokens."""
    i, j = np.arange(length)[:, None], np.arange(length)[None]
    causal = (j <= i)[None]
    window, chunk, prefix = length // 5, length // 4 + 1, length // 3
    ids = np.repeat(
        [7, 2, 9, 4], [length // 7, 1, length // 2, length - length // 7 - 1 - length // 2]
    )
    two_rows = np.stack([ids, np.repeat([1, 0], [length - length // 4, length // 4])])
    same = two_rows[:, :, None] == two_rows[:, None]
    real = (two_rows != 0)[:, :, None]
    per_row = np.array([length // 3, 1])
    # Intervals that nothing but `intervals` can say: unsorted, some empty.
    rng = np.random.default_rng(0)
    start = rng.integers(0, length, (1, length)).astype(np.int32)
    end = (start + rng.integers(-3, length // 2, (1, length))).astype(np.int32)
    return {
        "bidirectional": Case(hcp.bidirectional(), np.ones((1, length, length), bool)),
        "causal": Case(hcp.causal(), causal),
        "documents": Case(hcp.documents(ids), same[:1]),
        "causal documents with padding": Case(
            hcp.causal() & hcp.documents(two_rows, padding_id=0), causal & same & real
        ),
        "sliding window": Case(hcp.sliding_window(window), causal & (j > i - window)[None]),
        "causal window documents": Case(
            hcp.causal() & hcp.documents(ids) & hcp.sliding_window(window),
            causal & same[:1] & (j > i - window)[None],
        ),
        "prefix-LM": Case(
            hcp.prefix_lm(per_row),
            causal | (np.maximum(i, j)[None] < per_row[:, None, None]),
        ),
        "chunked local": Case(
            hcp.chunked_local(chunk) & hcp.causal(), causal & (i // chunk == j // chunk)[None]
        ),
        "lengths": Case(hcp.lengths(prefix), ((i < prefix) & (j < prefix))[None]),
        "any intervals": Case(
            hcp.intervals(start, end),
            (start[:, :, None] <= j[None]) & (j[None] < end[:, :, None]),
        ),
    }


class Answer(NamedTuple):
    """What attention gives, and its gradients under the cotangents of `Inputs`."""

    out: np.ndarray
    lse: np.ndarray
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray
    dsinks: np.ndarray


class Inputs(NamedTuple):
    """Random q, k, v and sinks, and cotangents of out and lse (where a query sees anything)."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    sinks: np.ndarray
    dout: np.ndarray
    dlse: np.ndarray


def inputs(length: int, heads: int, kv_heads: int, size: int, v_size: int, seed: int = 0) -> Inputs:
    rng = np.random.default_rng(seed)
    shapes = [
        (2, length, heads, size),
        (2, length, kv_heads, size),
        (2, length, kv_heads, v_size),
        (heads,),
        (2, length, heads, v_size),
        (2, length, heads),
    ]
    return Inputs(*(rng.normal(size=shape).astype(np.float32) for shape in shapes))


def attention(
    x: Inputs, dense: np.ndarray, *, soft_cap=None, sinks=False, dtype=np.float64
) -> Answer:
    """Dense attention and gradients, in float64, or as a bfloat16 model would compute it."""
    with jax.enable_x64(dtype == np.float64):
        run = jax.jit(jax.value_and_grad(functools.partial(_loss, soft_cap), (0, 1, 2, 3), True))
        q, k, v, s, dout, dlse = (jnp.asarray(a, dtype) for a in x)
        s = s if sinks else jnp.full_like(s, -jnp.inf)
        (_, (out, lse)), grads = run(q, k, v, s, dout, dlse, dense)
        return Answer(*(np.asarray(a, np.float64) for a in (out, lse, *grads)))


def _loss(soft_cap, q, k, v, sinks, dout, dlse, dense):
    """Σ out·dout + Σ lse·dlse, softmax in float32 at least."""
    group = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(a, group, axis=2) for a in (k, v))
    wide = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("btnh,bsnh->bnts", q, k, precision="highest").astype(wide)
    logits /= np.sqrt(q.shape[3])
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    shown = dense[:, None]
    logits = jnp.where(shown, logits, -jnp.inf)
    top = jnp.maximum(jnp.max(logits, -1), sinks.astype(wide)[None, :, None])
    top = jax.lax.stop_gradient(jnp.where(top == -jnp.inf, 0, top))
    weights = jnp.exp(logits - top[..., None])
    total = weights.sum(-1) + jnp.exp(sinks.astype(wide)[None, :, None] - top)
    some = total > 0
    lse = jnp.where(some, jnp.log(jnp.where(some, total, 1)) + top, -jnp.inf)
    weights = (weights / jnp.where(some, total, 1)[..., None]).astype(q.dtype)
    out = jnp.einsum("bnts,bsnh->btnh", weights, v, precision="highest")
    lse = lse.transpose(0, 2, 1)
    loss = jnp.sum(out * dout) + jnp.sum(jnp.where(lse == -jnp.inf, 0, lse) * dlse)
    return loss, (out, lse)


def relative(got, expected) -> float:
    """Largest error over the largest value, over what is finite; inf if -inf stand elsewhere."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    finite = np.isfinite(expected)
    if not np.array_equal(finite, np.isfinite(got)):
        return np.inf
    scale = np.abs(expected[finite]).max(initial=0)
    error = np.abs(got[finite] - expected[finite]).max(initial=0)
    return float(error / scale) if scale else float(error)
