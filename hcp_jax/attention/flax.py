"""Provide attention for Flax's own modules, linen and nnx: `attention_fn=hcp.attention_fn(cp)`."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hcp_jax.attention import arguments
from hcp_jax.attention.api import dot_product_attention
from hcp_jax.base import checks
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.sequence.dense_mask import from_dense
from hcp_jax.sequence.mask import Mask
from hcp_jax.sequence.placed_mask import PlacedMask


def attention_fn(
    cp: ContextParallel | None = None,
    *,
    mask: Mask | PlacedMask | None = None,
    logits_soft_cap: float | None = None,
    implementation: str | None = None,
) -> Callable[..., Float[Array, "*B T N Hv"]]:
    """Return an `attention_fn` for `nnx.MultiHeadAttention` and linen's attention modules.

    The module's input must be in `cp`'s layout (`cp.shard(x, dim=1)`). A mask can be given here, or
    to the module's call as its `mask`: a `hcp_jax.Mask`, or a matrix as Flax builds it
    (`nn.make_causal_mask`, the mask of a decoding cache), which is converted by `hcp.from_dense`.
    Both are in natural order for any layout.

    Args:
        cp: the mesh and the roles of its axes; None for one device, and for decoding with a cache.
        mask: mask of every call; combined with the mask of the call.
        logits_soft_cap: as in `dot_product_attention`.
        implementation: as in `dot_product_attention`.

    Returns:
        A function with the signature that Flax expects. It raises ValueError for arrays and masks
        that do not fit and for a bias, and NotImplementedError for attention dropout, sown weights
        and replaced einsums: they need the T x S matrix of weights.

    >>> import flax.nnx as nnx, jax.numpy as jnp, hcp_jax as hcp
    >>> layer = nnx.MultiHeadAttention(
    ...     8, 32, attention_fn=hcp.attention_fn(mask=hcp.causal()), decode=False, rngs=nnx.Rngs(0)
    ... )
    >>> layer(jnp.ones((2, 16, 32))).shape
    (2, 16, 32)
    """
    fixed = mask
    # Flax may call the function much later, so check the arguments now.
    arguments.require_options(cp, implementation)
    arguments.combined_mask(fixed)
    if logits_soft_cap is not None:
        logits_soft_cap = checks.soft_cap("logits_soft_cap", logits_soft_cap)

    # Linen passes only keyword arguments that are named in the signature. So each argument that
    # would change the result must be listed here, to be used or refused.
    def attend(
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K Hv"],
        bias: Any = None,
        mask: Any = None,
        broadcast_dropout: bool = True,
        dropout_rng: Any = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        is_causal: bool = False,
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
    ) -> Float[Array, "*B T N Hv"]:
        q, k, v = _promoted((query, key, value), dtype)
        arguments.require_arrays(q, k, v, None)
        if bias is not None:
            raise ValueError(arguments.NO_BIAS)
        if dropout_rate > 0.0 and not deterministic:
            raise NotImplementedError(
                f"attention dropout (rate {dropout_rate}) is not supported; set dropout_rate=0 and "
                "put dropout after the layer. docs/adapters.md has one that drops the same entries "
                "on every mesh."
            )
        if module is not None:
            raise NotImplementedError(
                "attention weights are never formed, so none can be sown; set sow_weights=False, "
                "or look at them with Flax's own attention on a short sequence."
            )
        if qk_attn_weights_einsum is not None or attn_weights_value_einsum is not None:
            raise NotImplementedError("attention has no einsum to replace; use Flax's own.")
        if not (mask is None or isinstance(mask, Mask | PlacedMask)):
            _require_not_decoding(q, k, cp, fixed is not None or is_causal)
            mask = _from_flax(mask, q, k)
        _require_layout(cp, query.shape[-3])
        out: Any = dot_product_attention(
            q,
            k,
            v,
            cp=cp,
            mask=mask if fixed is None else fixed if mask is None else fixed & mask,
            is_causal=is_causal,
            logits_soft_cap=logits_soft_cap,
            implementation=implementation,
        )
        return out

    return attend


def _from_flax(mask: Any, q: Any, k: Any) -> Mask:
    """Convert a matrix that broadcasts to `[*B, N, T, S]`; as in Flax, nonzero means True.

    Raises:
        ValueError: if it does not broadcast, or is not an interval mask.
    """
    mask = mask if isinstance(mask, jax.core.Tracer) else np.asarray(mask)
    batch = q.shape[:-3]
    whole = (*batch, q.shape[-2], q.shape[-3], k.shape[-3])
    shape = (1,) * (len(whole) - mask.ndim) + mask.shape
    if len(shape) != len(whole) or any(a not in (1, b) for a, b in zip(shape, whole, strict=True)):
        raise ValueError(
            f"mask has shape {mask.shape}, which does not broadcast to [*B, N, T, S] = {whole}."
        )
    mask = (mask != 0).reshape(shape)
    rows = 1
    if any(size != 1 for size in shape[:-3]):
        rows = math.prod(batch)
        xp = np if isinstance(mask, np.ndarray) else jnp
        mask = xp.broadcast_to(mask, (*batch, *shape[-3:]))
    return from_dense(mask.reshape(rows, *shape[-3:]))


def _require_not_decoding(q: Any, k: Any, cp: ContextParallel | None, joined: bool) -> None:
    """Check a call whose mask is a matrix, in case it decodes with a cache (`decode=True`).

    Raises:
        ValueError: if it is combined with a mask that counts queries from 0, although the one query
            is not the first token.
        NotImplementedError: if the one query would have to be cut over devices.
    """
    if not q.shape[-3] == 1 < k.shape[-3]:
        return
    if joined:
        raise ValueError(
            "this call looks like decoding with a cache: one query, and a matrix as mask. Give "
            "attention_fn no mask and the module no is_causal there: they would take the query "
            "for the first token. Flax's own mask already hides what is not in the cache yet."
        )
    if cp is not None and cp.size > 1:
        raise NotImplementedError(
            f"decoding with a cache attends with one query, which cannot be cut over {cp.size} "
            "devices. Use attention_fn() without cp for decoding."
        )


def _promoted(arrays: tuple[Any, ...], dtype: Any) -> tuple[Any, ...]:
    """Cast the arrays to `dtype`; if None, to the dtype that they all promote to."""
    if dtype is None:
        dtype = jnp.result_type(*(x.dtype for x in arrays))
    return tuple(jnp.asarray(x, dtype) for x in arrays)


def _require_layout(cp: ContextParallel | None, tokens: int) -> None:
    """Check that `tokens` is a padded length; the error also explains how to call `init`."""
    if cp is None or cp.on_device:
        return
    if tokens == cp.padded_length(tokens):
        return
    raise ValueError(
        f"the module's input has {tokens} tokens, which do not fit a {cp.layout} layout over "
        f"{cp.size} devices: put it there with cp.shard(x, dim=1), which pads it to "
        f"{cp.padded_length(tokens)}. The input of `init` needs such a length, too: give it "
        f"{cp.padded_length(tokens)} tokens of zeros."
    )
