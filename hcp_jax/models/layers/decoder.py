"""Compute one layer of a decoder: a mixer and a feed-forward, each with norms, added to its input.

To add a mixer, write its spec in `specs.py`, its module beside this file, and list both here.
"""

from typing import Any

from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from hcp_jax.models import rules
from hcp_jax.models.layers.attention import Attention
from hcp_jax.models.layers.gated_delta import GatedDeltaNet
from hcp_jax.models.layers.kda import KDA
from hcp_jax.models.layers.mamba2 import Mamba2
from hcp_jax.models.layers.mlp import MLP
from hcp_jax.models.layers.moe import MoE
from hcp_jax.models.layers.moe_documents import RoutedTokens
from hcp_jax.models.layers.moe_router import RouterSums
from hcp_jax.models.layers.norm import make_norm
from hcp_jax.models.recurrent_specs import GatedDeltaSpec, KDASpec, Mamba2Spec
from hcp_jax.models.specs import AttentionSpec, LayerSpec, MLPSpec, MoESpec, Norms
from hcp_jax.parallel.context import ContextParallel

MIXED = "hcp_mixed"
"""Name of a layer's activations between its mixer and its feed-forward, for remat policies."""

MIXERS: dict[type, Any] = {
    AttentionSpec: Attention,
    Mamba2Spec: Mamba2,
    GatedDeltaSpec: GatedDeltaNet,
    KDASpec: KDA,
}
"""Module of each kind of mixer."""

FEED_FORWARDS: dict[type, Any] = {MLPSpec: MLP, MoESpec: MoE}
"""Module of each kind of feed-forward."""

# Names of the norms before and after the mixer, and before and after the feed-forward, as in
# Hugging Face's folders: post_attention_layernorm is after attention, except in Llama's form.
_NORM_NAMES: dict[Norms, tuple[str | None, str | None, str | None, str | None]] = {
    "before": ("input_layernorm", None, "post_attention_layernorm", None),
    "after": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "both": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}


class DecoderLayer(nnx.Module):
    """One layer; its modules have the names of Hugging Face's folders."""

    def __init__(self, spec: LayerSpec, *, rngs: nnx.Rngs):
        mixer, ffn = MIXERS[type(spec.mixer)], FEED_FORWARDS[type(spec.ffn)]
        before, after, *around_ffn = _NORM_NAMES[spec.norms]
        self.spec, self.names = spec, (mixer.NAME, ffn.NAME)
        self._make_norms((before,), rngs)
        setattr(self, mixer.NAME, mixer(spec.mixer, rngs=rngs))
        self._make_norms((after, *around_ffn), rngs)
        setattr(self, ffn.NAME, ffn(spec.ffn, rngs=rngs))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        shared: Any,
        tokens: RoutedTokens | None,
        cp: ContextParallel | None,
    ) -> tuple[Float[Array, "B T D"], RouterSums | None]:
        """Apply the layer; return the sums of its router as well, None if it has none.

        Args:
            x: activations, in cp's layout order.
            shared: what the mixer's `share` returned.
            tokens: needed by a router only.
            cp: context with one comm type; None for one device.
        """
        mixer, ffn = (getattr(self, name) for name in self.names)
        before, after, before_ffn, after_ffn = _NORM_NAMES[self.spec.norms]
        x = x + self._norm(after, mixer(self._norm(before, x), shared, cp))
        x = checkpoint_name(x, MIXED)
        out, sums = ffn.treat(self._norm(before_ffn, x), tokens, cp)
        return x + self._norm(after_ffn, out), sums

    def _norm(self, name: str | None, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return x if name is None else getattr(self, name)(x)

    def _make_norms(self, names: tuple[str | None, ...], rngs: nnx.Rngs) -> None:
        for name in filter(None, names):
            setattr(self, name, make_norm(self.spec.norm, self.spec.mixer.hidden_size, rngs))


def rule(path: tuple[str, ...]) -> rules.Rule:
    """Return the rule of a layer's parameter by its path inside the layer."""
    for module in (*MIXERS.values(), *FEED_FORWARDS.values()):
        if path[0] == module.NAME and path[1:] in module.RULES:
            found: rules.Rule = module.RULES[path[1:]]
            return found
    return rules.find({}, path)
