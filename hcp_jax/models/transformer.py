"""Define a decoder of the Llama kind in Flax NNX: RMSNorm, rotary GQA, SwiGLU, scanned layers.

Parallelism is mostly outside the model: attention is one op that takes a `ContextParallel`,
activations get a sharding constraint between layers, and `train/sharding.py` decides how parameters
are cut. With `cp=None` this is a plain model on one device.

Submodules have the names of Hugging Face's Llama and Qwen, so that their weights map one to one:
`self_attn.q_proj.kernel[layer]` is `layers.{layer}.self_attn.q_proj.weight`, transposed to
`[D, N, H]` (`[N, H, D]` for `o_proj`). The parameters of all layers are stacked along a first dim.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32

from hcp_jax.attention.api import dot_product_attention
from hcp_jax.attention.local import RESIDUALS
from hcp_jax.models.config import ModelConfig
from hcp_jax.models.layers.embedding import live_tp, lookup
from hcp_jax.models.layers.mlp import MLP
from hcp_jax.models.layers.rope import Rotation, rotate, rotation
from hcp_jax.parallel import spmd
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.sequence.mask import Mask

_INIT_STD = 0.02
_INPUT = "hcp_layer_input"
_fan_in = nnx.initializers.variance_scaling


class Attention(nnx.Module):
    """Rotary grouped-query attention."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        size, heads = config.head_dim, config.num_heads
        self.config = config
        self.q_proj = self._project_in(heads, rngs)
        self.k_proj = self._project_in(config.num_kv_heads, rngs)
        self.v_proj = self._project_in(config.num_kv_heads, rngs)
        self.o_proj = nnx.LinearGeneral(
            (heads, size),
            config.hidden_size,
            axis=(-2, -1),
            use_bias=False,
            kernel_init=_fan_in(0.5 / config.num_layers, "fan_in", "normal"),
            dtype=config.compute_dtype,
            rngs=rngs,
        )
        self.q_norm = _norm(config, size, rngs) if config.qk_norm else None
        self.k_norm = _norm(config, size, rngs) if config.qk_norm else None
        self.sinks = nnx.Param(jnp.zeros(heads, jnp.float32)) if config.attention_sinks else None

    def __call__(
        self, x: Float[Array, "B T D"], turn: Rotation, *, mask: Mask, cp: ContextParallel | None
    ) -> Float[Array, "B T D"]:
        """Apply self-attention to `x`; `turn` rotates q and k, the op takes `mask` and `cp`."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        out: Any = dot_product_attention(
            rotate(q, turn),
            rotate(k, turn),
            v,
            cp=cp,
            mask=mask,
            logits_soft_cap=self.config.logits_soft_cap,
            sinks=None if self.sinks is None else self.sinks[...],
            implementation=self.config.implementation,
        )
        return self.o_proj(out)

    def _project_in(self, heads: int, rngs: nnx.Rngs) -> nnx.LinearGeneral:
        return nnx.LinearGeneral(
            self.config.hidden_size,
            (heads, self.config.head_dim),
            use_bias=self.config.qkv_bias,
            kernel_init=_fan_in(1.0, "fan_in", "normal"),
            dtype=self.config.compute_dtype,
            rngs=rngs,
        )


class DecoderLayer(nnx.Module):
    """Attention and MLP, each behind a norm and added to its input."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.input_layernorm = _norm(config, config.hidden_size, rngs)
        self.self_attn = Attention(config, rngs=rngs)
        self.post_attention_layernorm = _norm(config, config.hidden_size, rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], turn: Rotation, *, mask: Mask, cp: ContextParallel | None
    ) -> Float[Array, "B T D"]:
        """Apply one layer; arguments as in `Attention`."""
        x = x + self.self_attn(self.input_layernorm(x), turn, mask=mask, cp=cp)
        return x + self.mlp(self.post_attention_layernorm(x), cp)


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

        def layer(rngs: nnx.Rngs) -> DecoderLayer:
            return DecoderLayer(config, rngs=rngs)

        self.layers = nnx.vmap(layer)(rngs.split(config.num_layers))
        self.norm = _norm(config, config.hidden_size, rngs)
        self.lm_head = None if config.tie_embeddings else _embedding(config, rngs)

    def __call__(
        self,
        tokens: Int32[Array, "B T"],
        positions: Int32[Array, "B T"],
        *,
        mask: Mask | None = None,
        cp: ContextParallel | None = None,
    ) -> Float[Array, "B T D"]:
        """Return the hidden states after the last norm, in the compute dtype.

        Args:
            tokens: token ids in cp's layout order, as returned by `cp.shard_batch`.
            positions: position of each token in its document.
            mask: attention mask; `config.mask()` (causal, with the sliding window) if None. A given
                mask replaces it, so it must include the model's sliding window.
            cp: context with one comm type, or one per layer; None for one device.

        Raises:
            ValueError: if cp has comm types for another number of layers.
        """
        config = self.config
        live_tp(cp)
        mask = config.mask() if mask is None else mask
        mesh, axes = (None, ()) if cp is None else (cp.mesh, cp.axes)
        spec = PartitionSpec(*spmd.explicit_spec(tokens), None) if cp is None else cp.spec(3)
        graphdef, params = nnx.split(self)

        def hidden(params: Any, tokens: Any, positions: Any, mask: Mask) -> Any:
            return nnx.merge(graphdef, params)._hidden(tokens, positions, mask, cp)

        return spmd.run(mesh, axes, hidden, spec, params, tokens, positions, mask)

    def _hidden(self, tokens: Any, positions: Any, mask: Mask, cp: ContextParallel | None) -> Any:
        config = self.config
        turn = rotation(positions, config.head_dim, config.rope_theta, config.rope_scaling)
        x = lookup(self.embed_tokens.embedding[...], tokens, config.compute_dtype, cp)
        graphdef, state = nnx.split(self.layers)

        def layer(cp: ContextParallel | None, x: Any, params: dict[str, Any]) -> Any:
            x = checkpoint_name(x, _INPUT)
            return _cut(nnx.merge(graphdef, params)(x, turn, mask=mask, cp=cp), cp)

        for stretch in _stretches(cp, config.num_layers):
            x = _scan(layer, stretch, x, nnx.to_pure_dict(state), config)
        return self.norm(x)

    @property
    def unembedding(self) -> Float[Array, "V D"]:
        """Return the output matrix: logits are `hidden · unembeddingᵀ`."""
        return (self.embed_tokens if self.lm_head is None else self.lm_head).embedding[...]

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Return all logits at once, in float32; training uses `summed_cross_entropy` instead."""

        def logits(hidden: Any, unembedding: Any) -> Any:
            return jnp.einsum(
                "btd,vd->btv",
                hidden,
                unembedding.astype(hidden.dtype),
                preferred_element_type=jnp.float32,
            )

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


class _Stretch(NamedTuple):
    """Layers `first` to `last - 1`, whose comm types repeat `period`; one scan computes them."""

    first: int
    last: int
    period: tuple[ContextParallel | None, ...]


def _stretches(cp: ContextParallel | None, num_layers: int) -> list[_Stretch]:
    """Split the layers into stretches, as few as possible, because each is compiled.

    If the comm types of the whole model repeat (for example, every fourth layer gathers), there is
    one stretch; otherwise there is one for every run of equal comm types.
    """
    if cp is None or isinstance(cp.comm_type, str):
        return [_Stretch(0, num_layers, (cp,))]
    if len(cp.comm_type) != num_layers:
        raise ValueError(
            f"comm_type names {len(cp.comm_type)} layers, but the model has {num_layers}; give one "
            "per layer, or one string for all."
        )
    of_layer = [cp.for_layer(i) for i in range(num_layers)]
    edges = [i for i in range(1, num_layers) if of_layer[i] != of_layer[i - 1]]
    for period in range(2, num_layers // 2 + 1):
        repeats = num_layers % period == 0 and of_layer[period:] == of_layer[:-period]
        if repeats and period <= len(edges):
            return [_Stretch(0, num_layers, tuple(of_layer[:period]))]
    borders = zip([0, *edges], [*edges, num_layers], strict=True)
    return [_Stretch(first, last, (of_layer[first],)) for first, last in borders]


def _scan(layer: Callable, stretch: _Stretch, x: Any, params: dict, config: ModelConfig) -> Any:
    """Apply the layers of a stretch in order; one turn of the scan computes one period."""
    first, last, period = stretch
    turns = (last - first) // len(period)
    layers = [_remat(functools.partial(layer, cp), config, turns) for cp in period]

    if len(period) == 1:
        # This avoids the reshape below, for which XLA copies the gradients of all layers once more.
        whole = jax.tree.map(lambda p: p[first:last], params)
        return jax.lax.scan(lambda x, p: (layers[0](x, p), None), x, whole)[0]

    def turn(x: Any, params: dict[str, Any]) -> tuple[Any, None]:
        for i, one in enumerate(layers):
            x = one(x, jax.tree.map(operator.itemgetter(i), params))
        return x, None

    def cut(p: Array) -> Array:
        return p[first:last].reshape(turns, len(period), *p.shape[1:])

    return jax.lax.scan(turn, x, jax.tree.map(cut, params))[0]


def _remat(layer: Callable, config: ModelConfig, turns: int) -> Callable:
    """Wrap a layer so that backward recomputes what the config's policy does not keep."""
    if config.remat == "none":
        return layer
    kept = {"attention": RESIDUALS, "full": ()}[config.remat]
    if config.offload_activations:
        # The inputs of a checkpoint stay on the device under every policy. Here the input is read
        # only through its checkpoint name, so that the offloaded copy is all that backward needs.
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[_INPUT, *kept],
            offload_src="device",
            offload_dst="pinned_host",
        )
    else:
        policy = jax.checkpoint_policies.save_only_these_names(*kept)
    # XLA never merges the body of a loop with its recomputation in another loop, so the barriers of
    # prevent_cse are not needed. But XLA removes a loop of one turn, and then they are.
    return jax.checkpoint(layer, policy=policy, prevent_cse=turns == 1)


def _cut(x: Float[Array, "B T D"], cp: ContextParallel | None) -> Float[Array, "B T D"]:
    if cp is None:
        return x
    return spmd.constrain(x, cp.mesh, cp.axes, cp.spec(x.ndim))


def _norm(config: ModelConfig, size: int, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(size, epsilon=config.norm_eps, dtype=config.compute_dtype, rngs=rngs)


def _embedding(config: ModelConfig, rngs: nnx.Rngs) -> nnx.Embed:
    return nnx.Embed(
        config.vocab_size,
        config.hidden_size,
        embedding_init=nnx.initializers.normal(_INIT_STD),
        rngs=rngs,
    )
