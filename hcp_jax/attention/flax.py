"""Attention for Flax's own modules, linen and nnx: `attention_fn=hcp.attention_fn(cp)`."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float

from hcp_jax.attention.api import dot_product_attention
from hcp_jax.context import ContextParallel
from hcp_jax.mask import Mask


def attention_fn(
    cp: ContextParallel | None = None,
    *,
    mask: Mask | None = None,
    logits_soft_cap: float | None = None,
    implementation: str | None = None,
) -> Callable[..., Float[Array, "*B T N Hv"]]:
    """The `attention_fn` that `nnx.MultiHeadAttention` and linen's attention modules ask for.

    The module's input must be in `cp`'s layout (`cp.shard(x, dim=1)`). A `hcp_jax.Mask` may be
    given here, or to the module's call as its `mask`.

    Args:
        cp: the mesh; None for one device.
        mask: for every call; joined with that of the call.
        logits_soft_cap: as in `dot_product_attention`.
        implementation: as in `dot_product_attention`.

    Returns:
        A function with the signature that Flax calls. It raises ValueError for a dense mask or a
        bias, and NotImplementedError for attention dropout and for sown weights: neither can be
        had without the T x S matrix of weights.

    >>> import flax.nnx as nnx, jax.numpy as jnp, hcp_jax as hcp
    >>> layer = nnx.MultiHeadAttention(
    ...     8, 32, attention_fn=hcp.attention_fn(mask=hcp.causal()), decode=False, rngs=nnx.Rngs(0)
    ... )
    >>> layer(jnp.ones((2, 16, 32))).shape
    (2, 16, 32)
    """
    fixed = mask

    # Linen hands over only those keyword arguments that stand in the signature by name, so that all
    # that would change the result must stand here, to be used or refused.
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
        if bias is not None:
            raise ValueError("context-parallel attention takes no bias: masks are intervals.")
        if dropout_rate > 0.0 and not deterministic:
            raise NotImplementedError(
                f"attention dropout (rate {dropout_rate}) is not supported; set dropout_rate=0 and "
                "put dropout after the layer."
            )
        if module is not None:
            raise NotImplementedError("attention weights are never formed, so none can be sown.")
        if qk_attn_weights_einsum is not None or attn_weights_value_einsum is not None:
            raise NotImplementedError("attention has no einsum to replace; use Flax's own.")
        if mask is not None and not isinstance(mask, Mask):
            raise ValueError(
                f"mask must be a hcp_jax.Mask, got {type(mask).__name__} of shape "
                f"{getattr(mask, 'shape', '?')}: write nn.make_causal_mask as hcp.causal(), "
                "segment masks as hcp.documents(segment_ids)."
            )
        _require_layout(cp, query.shape[-3])
        joined = mask if fixed is None else fixed if mask is None else fixed & mask
        batch = query.shape[:-3]
        q, k, v = (
            (x if dtype is None else x.astype(dtype)).reshape(-1, *x.shape[-3:])
            for x in (query, key, value)
        )
        out: Any = dot_product_attention(
            q,
            k,
            v,
            cp=cp,
            mask=joined,
            is_causal=is_causal,
            logits_soft_cap=logits_soft_cap,
            implementation=implementation,
        )
        return out.reshape(*batch, *out.shape[1:])

    return attend


def _require_layout(cp: ContextParallel | None, tokens: int) -> None:
    """Refuse a length that no layout has, in the words of somebody who calls a module's `init`."""
    if cp is None or cp.groups is not None or tokens == cp.padded_length(tokens):
        return
    raise ValueError(
        f"the module's input has {tokens} tokens, which do not fit a {cp.layout} layout over "
        f"{cp.size} devices: put it there with cp.shard(x, dim=1), which pads it to "
        f"{cp.padded_length(tokens)}. The input of `init` needs such a length, too: give it "
        f"{cp.padded_length(tokens)} tokens of zeros."
    )
