"""Define a decoder in Flax NNX: an embedding, layers by spec, a norm and an output head.

Parallelism is mostly outside the model: attention is one op that takes a `ContextParallel`,
activations get a sharding constraint between layers, and `train/sharding.py` decides how parameters
are cut. With `cp=None` this is a plain model on one device.

Submodules have the names of Hugging Face's models, so that their weights map one to one:
`self_attn.q_proj.kernel[layer]` is `layers.{layer}.self_attn.q_proj.weight`, transposed to
`[D, N, H]` (`[N, H, D]` for `o_proj`). The parameters of equal layers are stacked along a first
dim: they lie in `layers` if all layers are equal, else in `layers.0`, `layers.1`, ... (`specs.py`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32

from hcp_jax.models import mtp, rules
from hcp_jax.models.config import ModelConfig
from hcp_jax.models.layers import decoder, moe_router
from hcp_jax.models.layers.decoder import DecoderLayer
from hcp_jax.models.layers.embedding import live_tp, lookup
from hcp_jax.models.layers.loss import soft_capped
from hcp_jax.models.layers.moe_router import RouterSums
from hcp_jax.models.layers.norm import make_norm
from hcp_jax.models.specs import LayerSpec
from hcp_jax.models.stacks import Stacks, apply_layers
from hcp_jax.parallel import spmd
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.sequence.mask import Mask
from hcp_jax.sequence.placed_mask import PlacedMask

_INIT_STD = 0.02


class Transformer(nnx.Module):
    """Decoder from tokens to hidden states, and from these to logits.

    >>> config = ModelConfig(vocab_size=256, num_layers=2, hidden_size=16, intermediate_size=32,
    ...                      num_heads=4, num_kv_heads=2)
    >>> model = Transformer(config, rngs=nnx.Rngs(0))
    >>> tokens = jnp.arange(8, dtype=jnp.int32)[None]
    >>> model.logits(model(tokens, tokens)).shape
    (1, 8, 256)
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed_tokens = _embedding(config, rngs)

        def stacked(spec: LayerSpec, number: int) -> DecoderLayer:
            layers = nnx.vmap(lambda rngs: DecoderLayer(spec, rngs=rngs))
            made: DecoderLayer = layers(rngs.split(number))
            return made

        stacks = [stacked(spec, len(layers)) for spec, layers in config.plan.stacks]
        self.layers = stacks[0] if len(stacks) == 1 else Stacks(stacks)
        self.norm = make_norm(config.norm_spec, config.hidden_size, rngs)
        self.lm_head = None if config.tie_embeddings else _embedding(config, rngs)
        if config.mtp_depths:
            self.mtp = mtp.make_depths(config.specs[-1], config.mtp_depths, rngs)

    def __call__(
        self,
        tokens: Int32[Array, "B T"],
        positions: Int32[Array, "B T"],
        *,
        mask: Mask | PlacedMask | None = None,
        cp: ContextParallel | None = None,
    ) -> Float[Array, "B T D"]:
        """Return the hidden states after the last norm, in the compute dtype.

        Args:
            tokens: token ids in cp's layout order, as returned by `cp.shard_batch`.
            positions: position of each token in its document.
            mask: attention mask; `config.mask()` (causal, with the window of the widest layer) if
                None. A given mask replaces it, so it must include this window. Layers with a
                narrower one add it.
            cp: context with one comm type, or one per layer; None for one device.

        Raises:
            ValueError: if cp has comm types for another number of layers.
        """
        return self.hidden_and_sums(tokens, positions, mask=mask, cp=cp)[0]

    def hidden_and_sums(
        self,
        tokens: Int32[Array, "B T"],
        positions: Int32[Array, "B T"],
        *,
        mask: Mask | PlacedMask | None = None,
        cp: ContextParallel | None = None,
    ) -> tuple[Float[Array, "B T D"], RouterSums | None]:
        """Return the hidden states, and the sums of all routers; None if there are no experts.

        The arguments are those of a call. Queries whose interval of the mask is empty are padding,
        which is not routed. Inside a `shard_map` over dp or cp axes, the sums cover the tokens
        given there.

        Raises:
            ValueError: as a call.
        """
        config = self.config
        live_tp(cp)
        mask = config.mask() if mask is None else mask
        mesh, axes = (None, ()) if cp is None else (cp.mesh, cp.axes)
        spec = PartitionSpec(*spmd.explicit_spec(tokens), None) if cp is None else cp.spec(3)
        graphdef, params = nnx.split(self)

        def hidden(params: Any, tokens: Any, positions: Any, mask: Mask | PlacedMask) -> Any:
            return nnx.merge(graphdef, params)._hidden(tokens, positions, mask, cp)

        specs = spec, self._sums_spec
        out: tuple[Any, RouterSums | None] = spmd.run(
            mesh, axes, hidden, specs, params, tokens, positions, mask
        )
        return out

    def further(
        self,
        hidden: Float[Array, "B T D"],
        targets: Int32[Array, "B T n"],
        positions: Int32[Array, "B T"],
        *,
        mask: Mask | PlacedMask | None = None,
        cp: ContextParallel | None = None,
    ) -> tuple[list[Float[Array, "B T D"]], RouterSums | None]:
        """Return the hidden states of each depth of multi-token prediction, after its norm.

        The sums of their routers come with them, as from `hidden_and_sums`. Those of depth d
        predict the token d + 1 places further on than the model's own.

        Args:
            hidden: what the model returned for the tokens.
            targets: for each of the n depths, the target of the depth before (the model's own
                targets for the first): the token that it embeds.
            positions: as for the model.
            mask: as for the model.
            cp: as for the model.

        Raises:
            ValueError: if there are targets for another number of depths.
        """
        config, depths = self.config, self.config.mtp_depths
        if targets.shape[2:] != (depths,):
            raise ValueError(
                f"the model has mtp_depths={depths}, but the targets {targets.shape} are for "
                f"{targets.shape[2:] or 'no'} depths."
            )
        live_tp(cp)
        mask = config.mask() if mask is None else mask
        mesh, axes = (None, ()) if cp is None else (cp.mesh, cp.axes)
        spec = PartitionSpec(*spmd.explicit_spec(hidden)) if cp is None else cp.spec(3)
        graphdef, params = nnx.split(self)

        def further(params: Any, hidden: Any, targets: Any, positions: Any, mask: Any) -> Any:
            model = nnx.merge(graphdef, params)
            return model._further(hidden, targets, positions, mask, cp)

        arrays = params, hidden, targets, positions, mask
        specs = [spec] * depths, self._sums_spec
        found: tuple[list[Any], RouterSums | None] = spmd.run(mesh, axes, further, specs, *arrays)
        return found

    @property
    def _sums_spec(self) -> Any:
        return None if self.config.moe is None else moe_router.WHOLE

    def _further(self, hidden: Any, targets: Any, positions: Any, mask: Any, cp: Any) -> Any:
        def embedded(depth: int) -> Any:
            return self._embedded(targets[..., depth], cp)

        return mtp.apply_depths(self.mtp, self.config, hidden, embedded, (positions, mask), cp)

    def _embedded(self, tokens: Any, cp: ContextParallel | None) -> Any:
        config = self.config
        x = lookup(self.embed_tokens.embedding[...], tokens, config.compute_dtype, cp)
        if config.embedding_scale is not None:
            x = x * jnp.asarray(config.embedding_scale, x.dtype)
        return x

    def _hidden(
        self, tokens: Any, positions: Any, mask: Mask | PlacedMask, cp: ContextParallel | None
    ) -> Any:
        x = self._embedded(tokens, cp)
        x, total = apply_layers(self.layers, self.config, x, positions, mask, cp)
        return self.norm(x), total

    @property
    def unembedding(self) -> Float[Array, "V D"]:
        """Return the output matrix: logits are `hidden · unembeddingᵀ`."""
        return (self.embed_tokens if self.lm_head is None else self.lm_head).embedding[...]

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Return all logits at once, in float32; training uses `summed_cross_entropy` instead."""

        def logits(hidden: Any, unembedding: Any) -> Any:
            raw = jnp.einsum(
                "btd,vd->btv",
                hidden,
                unembedding.astype(hidden.dtype),
                preferred_element_type=jnp.float32,
            )
            return soft_capped(raw, self.config.final_soft_cap)

        spec = PartitionSpec(*spmd.explicit_spec(hidden)[:2], None)
        return spmd.run(None, (), logits, spec, hidden, self.unembedding)


def abstract_model(config: ModelConfig) -> tuple[Any, dict[str, Any]]:
    """Return a model without values: its static graph, and the shapes of its parameters.

    `nnx.merge(graph, params)` builds a `Transformer` from the graph and a dict of parameters of
    these shapes, so only a plain tree of arrays crosses a `jit`.
    """
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    shapes = nnx.to_pure_dict(state)
    return graphdef, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shapes)


def init_params(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Return new random parameters: nested dicts of arrays that mirror the modules; `jit` it."""
    return nnx.to_pure_dict(nnx.state(Transformer(config, rngs=nnx.Rngs(key))))


def rule(path: tuple[str, ...]) -> rules.Rule:
    """Return the rule of a parameter of the model, as its module declares it.

    >>> rule(("layers", "self_attn", "q_proj", "kernel")).tp
    1
    """
    if path[0] == "mtp":
        return mtp.rule(path[1:])
    stack, inside = inside_layer(path)
    return rules.find(_RULES, path) if stack is None else decoder.rule(inside)


def is_stacked(path: tuple[str, ...]) -> bool:
    """Return whether a parameter's first dim counts layers, or depths of multi-token prediction."""
    return path[0] in ("layers", "mtp")


def inside_layer(path: tuple[str, ...]) -> tuple[int | None, tuple[str, ...]]:
    """Return the stack that a parameter belongs to, None if to no layer, and the rest of its path.

    >>> inside_layer(("layers", "2", "mlp", "up_proj", "kernel"))
    (2, ('mlp', 'up_proj', 'kernel'))
    """
    if path[0] != "layers":
        return None, path
    return (int(path[1]), path[2:]) if path[1].isdigit() else (0, path[1:])


_TABLE = rules.Rule(tp=0, fsdp=True)  # [V, D]
_RULES: rules.Rules = {("embed_tokens", "embedding"): _TABLE, ("lm_head", "embedding"): _TABLE}


def _embedding(config: ModelConfig, rngs: nnx.Rngs) -> nnx.Embed:
    return nnx.Embed(
        config.vocab_size,
        config.hidden_size,
        embedding_init=nnx.initializers.normal(_INIT_STD),
        rngs=rngs,
    )
