"""Mix tokens by grouped-query attention, rotary or without positions."""

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from hcp_jax.attention.api import dot_product_attention
from hcp_jax.models.config import ModelConfig
from hcp_jax.models.layers.norm import make_norm
from hcp_jax.models.layers.rope import Rotation, rotate, rotation
from hcp_jax.models.rules import Rule, Rules, bias, matrix
from hcp_jax.models.specs import AttentionSpec
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.sequence.mask import Mask, sliding_window
from hcp_jax.sequence.placed_mask import PlacedMask

_fan_in = nnx.initializers.variance_scaling


class Shared(NamedTuple):
    """What all attention layers of one stack share; computed once per batch.

    Attributes:
        turn: rotation of q and k; None without positions.
        mask: the batch's mask, with the layers' window.
    """

    turn: Rotation | None
    mask: Mask | PlacedMask


class Attention(nnx.Module):
    """Grouped-query attention, as `AttentionSpec` describes it."""

    NAME: ClassVar[str] = "self_attn"
    RULES: ClassVar[Rules] = {
        ("q_proj", "kernel"): matrix(tp=1),  # [D, N, H]
        ("k_proj", "kernel"): matrix(tp=1),  # [D, K, H]
        ("v_proj", "kernel"): matrix(tp=1),  # [D, K, H]
        ("gate_proj", "kernel"): matrix(tp=1),  # [D, N, H]
        ("gate_proj", "bias"): bias(tp=0),  # [N, H]
        ("q_proj", "bias"): bias(tp=0),  # [N, H]
        ("k_proj", "bias"): bias(tp=0),  # [K, H]
        ("v_proj", "bias"): bias(tp=0),  # [K, H]
        ("o_proj", "kernel"): matrix(tp=0, inputs=2),  # [N, H, D]
        ("sinks",): Rule(tp=0),  # [N]
    }

    def __init__(self, spec: AttentionSpec, *, rngs: nnx.Rngs):
        self.spec = spec
        self.q_proj = self._project_in(spec.num_heads, rngs)
        self.k_proj = self._project_in(spec.num_kv_heads, rngs)
        self.v_proj = self._project_in(spec.num_kv_heads, rngs)
        self.gate_proj = self._project_in(spec.num_heads, rngs) if spec.gate else None
        self.o_proj = nnx.LinearGeneral(
            (spec.num_heads, spec.head_size),
            spec.hidden_size,
            axis=(-2, -1),
            use_bias=spec.o_bias,
            kernel_init=_fan_in(0.5 / spec.depth, "fan_in", "normal"),
            dtype=spec.dtype,
            rngs=rngs,
        )
        self.q_norm = self._norm(spec.num_heads, rngs)
        self.k_norm = self._norm(spec.num_kv_heads, rngs)
        self.sinks = nnx.Param(jnp.zeros(spec.num_heads, jnp.float32)) if spec.sinks else None

    @staticmethod
    def share(
        spec: AttentionSpec,
        positions: Int32[Array, "B T"],
        mask: Mask | PlacedMask,
        widest: int | None,
    ) -> Shared:
        """Return what layers of one spec share.

        Args:
            spec: of the layers.
            positions: position of each token in its document.
            mask: the batch's mask, which has the window of the model's widest layer.
            widest: this window; None for no window.
        """
        turn = None
        if spec.rotary is not None:
            theta, dims, scaling = spec.rotary
            turn = rotation(positions, dims, theta, scaling)
        if spec.window is not None and spec.window != widest:
            mask = narrowed(mask, spec.window)
        return Shared(turn, mask)

    def __call__(
        self, x: Float[Array, "B T D"], shared: Shared, cp: ContextParallel | None
    ) -> Float[Array, "B T D"]:
        """Apply self-attention; `shared` comes from `share`."""
        spec = self.spec
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self._normed(self.q_norm, q), self._normed(self.k_norm, k)
        if shared.turn is not None:
            q, k = rotate(q, shared.turn), rotate(k, shared.turn)
        out: Any = dot_product_attention(
            q,
            k,
            v,
            cp=cp,
            mask=shared.mask,
            scale=spec.scale,
            logits_soft_cap=spec.soft_cap,
            sinks=None if self.sinks is None else self.sinks[...],
            implementation=spec.implementation,
        )
        if self.gate_proj is not None:
            out = out * jax.nn.sigmoid(self.gate_proj(x))
        return self.o_proj(out)

    def _normed(self, norm: Any, x: Float[Array, "B T n H"]) -> Float[Array, "B T n H"]:
        if self.spec.qk_norm == "head":
            return norm(x)
        return norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape)

    def _norm(self, heads: int, rngs: nnx.Rngs) -> Any:
        if self.spec.qk_norm is None:
            return None
        times = heads if self.spec.qk_norm == "heads" else 1
        return make_norm(self.spec.norm, times * self.spec.head_size, rngs)

    def _project_in(self, heads: int, rngs: nnx.Rngs) -> nnx.LinearGeneral:
        return nnx.LinearGeneral(
            self.spec.hidden_size,
            (heads, self.spec.head_size),
            use_bias=self.spec.qkv_bias,
            kernel_init=_fan_in(1.0, "fan_in", "normal"),
            dtype=self.spec.dtype,
            rngs=rngs,
        )


def layer_masks(
    config: ModelConfig, mask: Mask | PlacedMask
) -> list[tuple[float, Mask | PlacedMask]]:
    """Return the mask of each window of a model, with the window's share of the layers' width.

    Args:
        config: the model.
        mask: the batch's mask.
    """
    widest = config.widest_window
    return [
        (share, mask if window in (None, widest) else narrowed(mask, window))
        for window, share in config.window_shares.items()
    ]


def narrowed(mask: Mask | PlacedMask, window: int) -> Mask | PlacedMask:
    """Return the mask under which a query sees at most the last `window` of its keys."""
    if isinstance(mask, PlacedMask):
        return mask.windowed(window)
    return mask & sliding_window(window)
