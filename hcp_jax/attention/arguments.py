"""Check the arguments of an attention call, and combine its mask arguments into one mask."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hcp_jax.base import checks
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.sequence.mask import Mask, bidirectional, causal, lengths, sliding_window
from hcp_jax.sequence.placed_mask import PlacedMask
from hcp_jax.sequence.terms import NO_LIMIT

_DTYPES = (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64)

NO_BIAS = (
    "attention takes no bias: a bias is a matrix of T x S numbers, which is never stored here. "
    "Write the keys that it hides as a mask (hcp.causal(), hcp.documents, hcp.from_dense, ...)."
)


def require_arrays(q: Any, k: Any, v: Any, sinks: Any) -> None:
    """Check the shapes and dtypes of the arrays of a call against each other.

    Raises:
        ValueError: if they do not fit; the message says what came and what is needed.
    """
    for name, x in (("q", q), ("k", k), ("v", v), ("sinks", sinks)):
        if not ((hasattr(x, "shape") and hasattr(x, "dtype")) or (name == "sinks" and x is None)):
            raise ValueError(f"{name} must be an array, got {type(x).__name__}.")
    _require_shapes(q, k, v)
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}; cast them."
        )
    if q.dtype not in _DTYPES:
        names = ", ".join(jnp.dtype(d).name for d in _DTYPES)
        raise ValueError(f"q, k and v must be of {names}, got {q.dtype}.")
    if sinks is None:
        return
    if sinks.shape != (q.shape[-2],) or not jnp.issubdtype(sinks.dtype, jnp.floating):
        raise ValueError(
            f"sinks must have one logit per query head, floats of shape ({q.shape[-2]},), got "
            f"{sinks.dtype} of shape {tuple(sinks.shape)}."
        )


def require_options(cp: Any, implementation: Any, **flags: Any) -> None:
    """Check the arguments that are not arrays.

    Raises:
        ValueError: for a `cp` or an `implementation` of another type, and for a flag that is
            not a boolean.
    """
    if cp is not None and not isinstance(cp, ContextParallel):
        raise ValueError(
            f"cp must be a hcp_jax.ContextParallel, got {type(cp).__name__}; a mesh becomes one by "
            "hcp.ContextParallel(mesh, comm_type=...)."
        )
    if implementation is not None and not isinstance(implementation, str):
        raise ValueError(
            f"implementation must be a name or None, got {type(implementation).__name__}."
        )
    for name, flag in flags.items():
        checks.boolean(name, flag)


def logits_scale(scale: Any, head_size: int) -> float:
    """Return the factor of the logits; 1 / sqrt(H) if `scale` is None.

    Raises:
        ValueError: unless it is None or a finite number.
    """
    if scale is None:
        return 1 / math.sqrt(head_size)
    return checks.number("scale", scale, none=f"None means 1 / sqrt(H) = 1 / sqrt({head_size}).")


def combined_mask(
    mask: Any,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: Any = None,
) -> Mask | PlacedMask:
    """Return the conjunction of all mask arguments of a call.

    Raises:
        ValueError: for arguments that are not masks, lengths or windows.
    """
    if not (mask is None or isinstance(mask, Mask | PlacedMask)):
        raise ValueError(
            f"mask must be a hcp_jax.Mask, got {type(mask).__name__}. Build one with causal(), "
            "documents(ids), sliding_window(w) ... and &; a boolean matrix that shows each query "
            "one interval of keys becomes a mask by hcp.from_dense(mask)."
        )
    parts = [] if mask is None else [mask]
    if is_causal:
        parts.append(causal())
    if query_seq_lengths is not None:
        parts.append(_lengths("query_seq_lengths", query_seq_lengths, NO_LIMIT))
    if key_value_seq_lengths is not None:
        parts.append(_lengths("key_value_seq_lengths", NO_LIMIT, key_value_seq_lengths))
    if local_window_size is not None:
        parts.append(_window(local_window_size))
    whole: Mask | PlacedMask = bidirectional() if not parts else parts[0]
    for part in parts[1:]:
        whole = whole & part
    return whole


def without_tokens(
    q: Float[Array, "B T N H"],
    v: Float[Array, "B S K Hv"],
    sinks: Float[Array, "N"] | None,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Return the output and lse of a call in which B, T or S is 0, so no query sees a key."""
    # Built from q, to get its sharding.
    zero = jnp.zeros_like(q[..., :1])
    out = jnp.broadcast_to(zero, (*q.shape[:3], v.shape[3]))
    zero = zero[..., 0].astype(jnp.promote_types(q.dtype, jnp.float32))
    if sinks is None:
        return out, jnp.full_like(zero, -jnp.inf)
    return out, zero + sinks.astype(zero.dtype)[None, None]


def _require_shapes(q: Any, k: Any, v: Any) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim or q.ndim < 3:
        raise ValueError(
            f"q must be [B, T, N, H] and k, v [B, S, K, H], all of the same rank, got {shapes}."
        )
    if not q.shape[:-3] == k.shape[:-3] == v.shape[:-3]:
        raise ValueError(
            f"q, k and v must have one batch size B (all batch dims must match), got {shapes}."
        )
    if k.shape[-3:-1] != v.shape[-3:-1]:
        raise ValueError(
            "k and v must have the same length S and heads K (their lengths must match), got "
            f"{shapes}."
        )
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"q and k must have the same head size H (their depths must match), got {shapes}."
        )
    if 0 in (*q.shape[-2:], *v.shape[-2:]):
        raise ValueError(f"there must be at least one head, of size 1 or more, got {shapes}.")
    if q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"q has N={q.shape[-2]} heads and k has K={k.shape[-2]}; K must divide N (N must be a "
            "multiple of K), so that every kv head serves as many query heads."
        )


def _lengths(name: str, queries: Any, keys: Any) -> Mask:
    """Return `lengths(queries, keys)`; errors name the argument of the call."""
    try:
        return lengths(queries, keys)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _window(size: Any) -> Mask:
    """Return the mask of `local_window_size`: a pair, or one number for both sides."""
    sides = size if isinstance(size, tuple | list) else (size, size)
    if len(sides) != 2:
        raise ValueError(f"local_window_size must be (left, right) or one integer, got {size!r}.")
    left, right = (
        checks.integer(f"local_window_size ({side})", n, least=0)
        for side, n in zip(("left", "right"), sides, strict=True)
    )
    return sliding_window(left + 1, right=right)


def flat(x: Any) -> Any:
    """Flatten the batch dims of an array `[*B, T, N, H]` to one."""
    return x if x.ndim == 4 else jnp.reshape(x, (math.prod(x.shape[:-3]), *x.shape[-3:]))


def unflat(x: jax.Array, batch: tuple[int, ...]) -> jax.Array:
    """Restore the batch dims `batch` of an array with one batch dim."""
    return x if len(batch) == 1 else jnp.reshape(x, (*batch, *x.shape[1:]))
