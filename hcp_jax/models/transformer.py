"""A decoder of the Llama kind in Flax NNX: RMSNorm, rotary GQA, SwiGLU, layers scanned.

Parallelism stays outside: attention is one op that is told a `ContextParallel`, activations are
told at the border of every layer how they are cut, and how parameters are cut is the business of
`train/sharding.py`. With `cp=None` this is a plain model on one device.

Submodules are called what Hugging Face's Llama and Qwen call them, so that their weights map one to
one: `self_attn.q_proj.kernel[layer]` is `layers.{layer}.self_attn.q_proj.weight`, transposed to
`[D, N, H]` (`[N, H, D]` for `o_proj`); the parameters of all layers are stacked in front.
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
        """`x` attends to itself; `turn` rotates q and k, `mask` and `cp` are the op's."""
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
        """One layer; arguments as `Attention`'s."""
        x = x + self.self_attn(self.input_layernorm(x), turn, mask=mask, cp=cp)
        return x + self.mlp(self.post_attention_layernorm(x), cp)


class Transformer(nnx.Module):
    """Tokens to hidden states, and from those to logits.

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
        """Hidden states after the last norm, in the compute dtype.

        Args:
            tokens: in cp's layout order, as `cp.shard_batch` leaves them.
            positions: of each token in its document.
            mask: who sees whom; `config.mask()` (causal, and the sliding window) if None. One that
                is given is all there is: it must have the model's sliding window in it.
            cp: the context parallelism, with one comm type or one per layer; None for one device.

        Raises:
            ValueError: if cp has a comm type per layer, but not for as many layers as these.
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

        def layer(cp: ContextParallel | None, x: Any, params: dict) -> Any:
            x = checkpoint_name(x, _INPUT)
            return _cut(nnx.merge(graphdef, params)(x, turn, mask=mask, cp=cp), cp)

        for stretch in _stretches(cp, config.num_layers):
            x = _scan(layer, stretch, x, nnx.to_pure_dict(state), config)
        return self.norm(x)

    @property
    def unembedding(self) -> Float[Array, "V D"]:
        """The output matrix: logits are `hidden · unembeddingᵀ`."""
        return (self.embed_tokens if self.lm_head is None else self.lm_head).embedding[...]

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits in float32, all of them at once; training uses `summed_cross_entropy` instead."""

        def logits(hidden: Any, unembedding: Any) -> Any:
            return jnp.einsum(
                "btd,vd->btv",
                hidden,
                unembedding.astype(hidden.dtype),
                preferred_element_type=jnp.float32,
            )

        spec = PartitionSpec(*spmd.explicit_spec(hidden)[:2], None)
        return spmd.run(None, (), logits, spec, hidden, self.unembedding)


def abstract_model(config: ModelConfig) -> tuple[Any, dict]:
    """The model without its numbers: the static graph, and the parameters' shapes.

    `nnx.merge(graph, params)` makes a `Transformer` of the graph and any dict of parameters of
    these shapes, so that what crosses a `jit` is a plain tree of arrays.
    """
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    shapes = nnx.to_pure_dict(state)
    return graphdef, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shapes)


def init_params(config: ModelConfig, key: jax.Array) -> dict:
    """Fresh parameters, as a dict of dicts of arrays that mirrors the modules; `jit` it."""
    return nnx.to_pure_dict(nnx.state(Transformer(config, rngs=nnx.Rngs(key))))


class _Stretch(NamedTuple):
    """Layers `first … last - 1`, whose comm types repeat `period`: what one scan computes."""

    first: int
    last: int
    period: tuple[ContextParallel | None, ...]


def _stretches(cp: ContextParallel | None, num_layers: int) -> list[_Stretch]:
    """The layers in as few different pieces as will do, since each is compiled.

    If the comm types of the whole model repeat (one in four gathers, say), that is one stretch;
    otherwise there is one for every run of equal ones.
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
    """The layers of a stretch one after the other, a period of them at each turn."""
    first, last, period = stretch
    turns = (last - first) // len(period)
    layers = [_remat(functools.partial(layer, cp), config, turns) for cp in period]

    if len(period) == 1:
        # Without the reshape below, of which XLA makes one more copy of all layers' gradients.
        whole = jax.tree.map(lambda p: p[first:last], params)
        return jax.lax.scan(lambda x, p: (layers[0](x, p), None), x, whole)[0]

    def turn(x: Any, params: dict) -> tuple[Any, None]:
        for i, one in enumerate(layers):
            x = one(x, jax.tree.map(operator.itemgetter(i), params))
        return x, None

    def cut(p: Array) -> Array:
        return p[first:last].reshape(turns, len(period), *p.shape[1:])

    return jax.lax.scan(turn, x, jax.tree.map(cut, params))[0]


def _remat(layer: Callable, config: ModelConfig, turns: int) -> Callable:
    """The layer with a backward pass that recomputes all but what the config's policy keeps."""
    if config.remat == "none":
        return layer
    kept = {"attention": RESIDUALS, "full": ()}[config.remat]
    if config.offload_activations:
        # A checkpoint's inputs stay on the device, whatever the policy; but this one's is read only
        # under its name, and what the name stands for is what backward then needs.
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[_INPUT, *kept],
            offload_src="device",
            offload_dst="pinned_host",
        )
    else:
        policy = jax.checkpoint_policies.save_only_these_names(*kept)
    # A loop's body is never merged with its recomputation in another loop, and barriers would cost;
    # but a loop of one turn is no loop to XLA.
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
