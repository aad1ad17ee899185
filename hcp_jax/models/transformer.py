"""Define a decoder in Flax NNX: an embedding, layers by spec, a norm and an output head.

Parallelism is mostly outside the model: attention is one op that takes a `ContextParallel`,
activations get a sharding constraint between layers, and `train/sharding.py` decides how parameters
are cut. With `cp=None` this is a plain model on one device.

Submodules have the names of Hugging Face's models, so that their weights map one to one:
`self_attn.q_proj.kernel[layer]` is `layers.{layer}.self_attn.q_proj.weight`, transposed to
`[D, N, H]` (`[N, H, D]` for `o_proj`). The parameters of equal layers are stacked along a first
dim: they lie in `layers` if all layers are equal, else in `layers.0`, `layers.1`, ... (`specs.py`).
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
from jaxtyping import Array, Bool, Float, Int32

from hcp_jax.attention.local import RESIDUALS
from hcp_jax.models import mtp, rules
from hcp_jax.models.config import ModelConfig
from hcp_jax.models.layers import decoder, moe_router
from hcp_jax.models.layers.decoder import MIXERS, DecoderLayer
from hcp_jax.models.layers.embedding import live_tp, lookup
from hcp_jax.models.layers.loss import soft_capped
from hcp_jax.models.layers.moe_router import RouterSums
from hcp_jax.models.layers.norm import make_norm
from hcp_jax.models.specs import LayerSpec, Plan
from hcp_jax.parallel import spmd
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.sequence.mask import Mask
from hcp_jax.sequence.placed_mask import PlacedMask

_INIT_STD = 0.02
_INPUT = "hcp_layer_input"


class Stacks(nnx.Module):
    """Stacked layers of several specs, by their index in the plan: "0", "1", ..."""

    def __init__(self, stacks: list[DecoderLayer]):
        for i, stack in enumerate(stacks):
            setattr(self, str(i), stack)


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
        config = self.config
        total = None if config.moe is None else moe_router.no_sums()
        real = None if total is None else real_tokens(mask, positions.shape, cp)
        last = config.specs[-1].mixer
        shared = MIXERS[type(last)].share(last, positions, mask, config.widest_window)
        layer_cp = None if cp is None else cp.for_layer(config.num_layers - 1)
        graphdef, params = nnx.split(self.mtp)

        def depth(params: Any, hidden: Any, embedded: Any) -> Any:
            hidden = checkpoint_name(hidden, _INPUT)
            depth = nnx.merge(graphdef, params)
            hidden, sums = depth(hidden, embedded, shared, real, layer_cp)
            return _cut(hidden, cp), sums

        depth = _remat(depth, config, 1)
        outputs = []
        for number in range(config.mtp_depths):
            own = jax.tree.map(operator.itemgetter(number), params)
            hidden, sums = depth(own, hidden, self._embedded(targets[..., number], cp))
            total = total if sums is None else jax.tree.map(jnp.add, total, sums)
            outputs.append(nnx.merge(graphdef, own).norm(hidden))
        return outputs, total

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


def apply_layers(
    layers: DecoderLayer | Stacks,
    config: ModelConfig,
    x: Float[Array, "B T D"],
    positions: Int32[Array, "B T"],
    mask: Mask | PlacedMask,
    cp: ContextParallel | None,
    plan: Plan | None = None,
) -> tuple[Float[Array, "B T D"], RouterSums | None]:
    """Apply stacked layers to activations; inside `spmd.run`.

    Args:
        layers: `Transformer.layers`.
        config: the model.
        x: activations, in cp's layout order.
        positions: as in `Transformer.__call__`.
        mask: the batch's mask, with the window of the model's widest layer.
        cp: as in `Transformer.__call__`; with comm types for the layers of the plan.
        plan: how these layers are stacked; None for all layers of the model.

    Returns:
        The activations, and the sums of the layers' routers; None if there are no experts.
    """
    plan = config.plan if plan is None else plan
    shared = [
        MIXERS[type(stack.spec.mixer)].share(
            stack.spec.mixer, positions, mask, config.widest_window
        )
        for stack in plan.stacks
    ]
    routed = config.moe is not None
    real = real_tokens(mask, x.shape[:2], cp) if routed else None
    whole = len(plan.stacks) == 1
    modules = [layers] if whole else [getattr(layers, str(i)) for i in range(len(plan.stacks))]
    split = [nnx.split(module) for module in modules]

    def layer(stack: int, cp: ContextParallel | None, x: Any, params: dict[str, Any]) -> Any:
        x = checkpoint_name(x, _INPUT)
        x, sums = nnx.merge(split[stack][0], params)(x, shared[stack], real, cp)
        return _cut(x, cp), sums

    params = [nnx.to_pure_dict(state) for _, state in split]
    total = moe_router.no_sums() if routed else None
    for stretch in _stretches(plan, cp, sum(len(stack.layers) for stack in plan.stacks)):
        x, total = _scan(layer, stretch, (x, total), params, config)
    return x, total


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


class _Stretch(NamedTuple):
    """Turns of a section whose comm types repeat; one scan computes them.

    Attributes:
        stacks: the stacks of one turn, in order.
        first: index of the first layer in each of these stacks.
        last: index behind the last one.
        period: context of each layer of a turn, for each turn until the comm types repeat.
    """

    stacks: tuple[int, ...]
    first: int
    last: int
    period: tuple[tuple[ContextParallel | None, ...], ...]


def _stretches(plan: Plan, cp: ContextParallel | None, num_layers: int) -> list[_Stretch]:
    """Split the sections into stretches, as few as possible, because each is compiled.

    If the comm types of a whole section repeat (for example, every fourth layer gathers), there is
    one stretch; otherwise there is one for every run of equal comm types.
    """
    if cp is not None and not isinstance(cp.comm_type, str) and len(cp.comm_type) != num_layers:
        raise ValueError(
            f"comm_type names {len(cp.comm_type)} layers, but the model has {num_layers}; give one "
            "per layer, or one string for all."
        )
    found = []
    for stacks, first, turns, skipped in plan.sections:
        width = len(stacks)
        contexts = [
            tuple(None if cp is None else cp.for_layer(first + t * width + i) for i in range(width))
            for t in range(turns)
        ]
        for begin, end, period in _repeats(contexts):
            found.append(_Stretch(stacks, skipped + begin, skipped + end, period))
    return found


def _repeats(turns: list[Any]) -> list[tuple[int, int, tuple[Any, ...]]]:
    """Return (first, last, period) of the stretches of equal or repeating turns."""
    number = len(turns)
    edges = [i for i in range(1, number) if turns[i] != turns[i - 1]]
    for period in range(2, number // 2 + 1):
        repeats = number % period == 0 and turns[period:] == turns[:-period]
        if repeats and period <= len(edges):
            return [(0, number, tuple(turns[:period]))]
    borders = zip([0, *edges], [*edges, number], strict=True)
    return [(first, last, (turns[first],)) for first, last in borders]


def _scan(
    layer: Callable, stretch: _Stretch, carry: Any, params: list[dict], config: ModelConfig
) -> Any:
    """Apply the layers of a stretch in order; one step of the scan computes one period.

    Args:
        layer: applies one layer of a stack.
        stretch: the layers.
        carry: activations, and the sums of the routers so far.
        params: of each stack.
        config: of the model.
    """
    stacks, first, last, period = stretch
    steps = (last - first) // len(period)
    layers = [
        [
            _remat(functools.partial(layer, *one), config, steps)
            for one in zip(stacks, cps, strict=True)
        ]
        for cps in period
    ]

    def turn(carry: Any, layers: list[Callable], params: list[dict]) -> Any:
        x, total = carry
        for one, p in zip(layers, params, strict=True):
            x, sums = one(x, p)
            total = total if sums is None else jax.tree.map(jnp.add, total, sums)
        return x, total

    def cut(p: Array) -> Array:
        p = p[first:last]
        # Without the reshape where it is not needed: for it, XLA copies all gradients once more.
        return p if len(period) == 1 else p.reshape(steps, len(period), *p.shape[1:])

    def step(carry: Any, params: list[dict]) -> tuple[Any, None]:
        if len(period) == 1:
            return turn(carry, layers[0], params), None
        for i, one in enumerate(layers):
            carry = turn(carry, one, jax.tree.map(operator.itemgetter(i), params))
        return carry, None

    return jax.lax.scan(step, carry, jax.tree.map(cut, [params[i] for i in stacks]))[0]


def real_tokens(
    mask: Mask | PlacedMask, shape: tuple[int, ...], cp: ContextParallel | None
) -> Bool[Array, "B T"]:
    """Return which tokens are no padding: those that see a key, if only themselves.

    Args:
        mask: the batch's mask.
        shape: B and T of the tokens here; inside a `shard_map` they are a device's own part.
        cp: context; None for one device.
    """
    rows, here = shape
    inside = cp is not None and cp.on_device
    if isinstance(mask, PlacedMask):
        start, end = mask.intervals
    else:
        times = cp.size if cp is not None and inside else 1
        start, end = mask.intervals(here * times, xp=jnp)
        if cp is not None:
            start, end = (cp.placement.to_layout(x, 1) for x in (start, end))
    real = jnp.asarray(end > start)
    if cp is not None and inside and real.shape[1] != here:
        own = jax.lax.axis_index(cp.cp_axes)
        real = jax.lax.dynamic_slice_in_dim(real, own * here, here, axis=1)
    return jnp.broadcast_to(real, (rows, here))


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


def _embedding(config: ModelConfig, rngs: nnx.Rngs) -> nnx.Embed:
    return nnx.Embed(
        config.vocab_size,
        config.hidden_size,
        embedding_init=nnx.initializers.normal(_INIT_STD),
        rngs=rngs,
    )
