"""Apply stacked layers: one scan for each stretch of layers whose specs and comm types repeat.

Layers of equal specs are stacked (`specs.py`): their parameters have a leading dim of layers. A
scan computes a whole period of the model's pattern in each turn, so that a program does not grow
with the number of layers.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int32

from hcp_jax.attention.local import OPERANDS, RESIDUALS
from hcp_jax.models import small_params
from hcp_jax.models.config import ModelConfig
from hcp_jax.models.layers import moe_router
from hcp_jax.models.layers.decoder import MIXED, MIXERS, DecoderLayer
from hcp_jax.models.layers.mlp import PRODUCTS
from hcp_jax.models.layers.moe_documents import RoutedTokens
from hcp_jax.models.layers.moe_router import RouterSums
from hcp_jax.models.specs import Plan
from hcp_jax.parallel import spmd
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.sequence.layout import runs_per_device
from hcp_jax.sequence.mask import Mask
from hcp_jax.sequence.placed_mask import PlacedMask
from hcp_jax.sequence.placement import Groups, Streams

LAYER_INPUT = "hcp_layer_input"

_PROJECTIONS = (*RESIDUALS, *OPERANDS, MIXED)
KEPT: dict[str, tuple[str, ...]] = {
    "mlp": (*_PROJECTIONS, *PRODUCTS),
    "projections": _PROJECTIONS,
    "attention": RESIDUALS,
    "auto": RESIDUALS,
    "full": (),
}
"""Names of what a layer keeps beside its input, by remat policy."""


class Stacks(nnx.Module):
    """Stacked layers of several specs, by their index in the plan: "0", "1", ..."""

    def __init__(self, stacks: list[DecoderLayer]):
        for i, stack in enumerate(stacks):
            setattr(self, str(i), stack)


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
    tokens = routed_tokens(config, mask, positions, x.shape[:2], cp)
    whole = len(plan.stacks) == 1
    modules: list[Any] = (
        [layers] if whole else [getattr(layers, str(i)) for i in range(len(plan.stacks))]
    )
    split = [nnx.split(module) for module in modules]

    def layer(stack: int, cp: ContextParallel | None, x: Any, params: dict[str, Any]) -> Any:
        x = checkpoint_name(x, LAYER_INPUT)
        module = small_params.use_copies(nnx.merge(split[stack][0], params), cp)
        x, sums = module(x, shared[stack], tokens, cp)
        return constrained(x, cp), sums

    params = [
        small_params.copied(module, nnx.to_pure_dict(state), cp)
        for module, (_, state) in zip(modules, split, strict=True)
    ]
    total = moe_router.no_sums() if routed else None
    for stretch in _stretches(plan, cp, sum(len(stack.layers) for stack in plan.stacks)):
        x, total = _scan(layer, stretch, (x, total), params, config)
    return x, total


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
            remat(functools.partial(layer, *one), config, steps)
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


def routed_tokens(
    config: ModelConfig,
    mask: Mask | PlacedMask,
    positions: Int32[Array, "B1 T"],
    shape: tuple[int, ...],
    cp: ContextParallel | None,
) -> RoutedTokens | None:
    """Return what routers know of the tokens; None if there are no experts.

    Positions tell where documents begin, if their load-balance loss has a weight.

    Args:
        config: the model.
        mask: the batch's mask.
        positions: number of tokens of the same document before each token.
        shape: as in `real_tokens`.
        cp: context; None for one device.
    """
    if config.moe is None:
        return None
    real = real_tokens(mask, shape, cp)
    if not config.moe.sequence_aux_loss_coef:
        return RoutedTokens(real)
    placement = Streams() if cp is None else cp.placement
    if isinstance(placement, Groups):
        assert isinstance(mask, PlacedMask)
        assert mask.runs is not None
        index, runs = jnp.asarray(mask.intervals.end) - 1, mask.runs.starts.shape[-1]
    else:
        length = shape[1] * (cp.size if cp is not None and cp.on_device else 1)
        index, runs = jnp.asarray(placement.global_index(length))[None], _runs(placement)
    index = _here(index, shape, cp)
    return RoutedTokens(real, index, index - jnp.broadcast_to(positions, shape), runs)


def _runs(placement: Streams) -> int:
    return 1 if placement.cp_size == 1 else runs_per_device(placement.layout)


def real_tokens(
    mask: Mask | PlacedMask, shape: tuple[int, ...], cp: ContextParallel | None
) -> Bool[Array, "B T"]:
    """Return which tokens are no padding: those that see a key, if only themselves.

    Args:
        mask: the batch's mask.
        shape: B and T of the tokens here; inside a `shard_map` they are a device's own part.
        cp: context; None for one device.
    """
    if isinstance(mask, PlacedMask):
        start, end = mask.intervals
    else:
        times = cp.size if cp is not None and cp.on_device else 1
        start, end = mask.intervals(shape[1] * times, xp=jnp)
        if cp is not None:
            start, end = (cp.placement.to_layout(x, 1) for x in (start, end))
    return _here(jnp.asarray(end > start), shape, cp)


def _here(x: Array, shape: tuple[int, ...], cp: ContextParallel | None) -> Array:
    """Return a device's own part of an array, in the shape of its tokens."""
    rows, here = shape
    if cp is not None and cp.on_device and x.shape[1] != here:
        # Under groups, the intervals may be cut already, over all but the axes that exchange heads.
        own = jax.lax.axis_index(cp.cp_axes) % (x.shape[1] // here)
        x = jax.lax.dynamic_slice_in_dim(x, own * here, here, axis=1)
    return jnp.broadcast_to(x, (rows, here))


def remat(layer: Callable, config: ModelConfig, turns: int) -> Callable:
    """Wrap a layer so that backward recomputes what the config's policy does not keep."""
    if config.remat == "none":
        return layer
    kept = KEPT[config.remat]
    if config.offload_activations:
        # The inputs of a checkpoint stay on the device under every policy. Here the input is read
        # only through its checkpoint name, so that the offloaded copy is all that backward needs.
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[LAYER_INPUT, *kept],
            offload_src="device",
            offload_dst="pinned_host",
        )
    else:
        policy = jax.checkpoint_policies.save_only_these_names(*kept)
    # XLA never merges the body of a loop with its recomputation in another loop, so the barriers of
    # prevent_cse are not needed. But XLA removes a loop of one turn, and then they are.
    return jax.checkpoint(layer, policy=policy, prevent_cse=turns == 1)


def constrained(x: Float[Array, "B T D"], cp: ContextParallel | None) -> Float[Array, "B T D"]:
    """Return activations, cut over dp and cp as the compiler is to keep them."""
    if cp is None:
        return x
    return spmd.constrain(x, cp.mesh, cp.axes, cp.spec(x.ndim))
