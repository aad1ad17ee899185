"""AdamW and its learning rate; how its two moments are kept when memory is short.

In float32 the moments are twice the parameters. They can be kept in bfloat16, and they can lie in
the host's memory between two steps: then `init` makes them there, `sharding.py` reads from the
types of what it makes where each array belongs, and the step fetches them for the update
(`fetched`, `put_back`).
"""

import dataclasses
from dataclasses import field
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, BFloat16, Float

from hcp_jax.settings import MOST, check, fixed, free, numbers

MomentsDtype = Literal["float32", "bfloat16"]
Schedule = Literal["cosine", "constant", "wsd"]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter, 2019) with warm-up, a schedule and clipping.

    Weight decay is on the matrices of the layers (every `kernel`), not on norms, biases, sinks, the
    embedding or the output head.

    Attributes:
        learning_rate: at the top, after the warm-up.
        schedule: of the learning rate after the warm-up: "cosine" falls until the last step;
            "constant" stays; "wsd" (warm-up, stable, decay) stays, then falls linearly over
            `decay_share` of all steps. With the latter two a run can be made longer without a
            jump of the rate (wsd: until its decay begins).
        warmup_steps: steps over which it rises linearly; the first step has 1 / warmup_steps of it.
            In a training that is no longer than this, it is a tenth of all steps.
        decay_share: wsd: the share of all steps, at the end, over which the rate falls.
        final_ratio: share of it that is left at the last step; constant keeps all of it.
        beta1: decay of the mean of gradients.
        beta2: decay of the mean of their squares.
        eps: added to the root of the latter.
        weight_decay: per unit of learning rate.
        clip_norm: greatest norm of all gradients together; None for no limit.
        moments_dtype: what the two means are kept in. "bfloat16" halves them; they are rounded up
            or down by chance, since to the nearest, a change of less than 1 in 256 would be lost
            every time.
        offload: whether they lie in the host's memory between two steps.
        max_skipped: steps in a row that may be skipped, because their loss or their gradient is not
            finite, before training stops.
    """

    learning_rate: float = field(default=3e-4, metadata=numbers(above=0, most=1e3))
    schedule: Schedule = field(default="cosine", metadata=numbers())
    warmup_steps: int = field(default=100, metadata=numbers(least=0, most=MOST))
    decay_share: float = field(default=0.2, metadata=numbers(least=0, most=1))
    final_ratio: float = field(default=0.1, metadata=numbers(least=0, most=1))
    # In float32, 1 - beta must not round to 0, nor eps: either would make 0 / 0.
    beta1: float = field(default=0.9, metadata=numbers(least=0, most=0.999999))
    beta2: float = field(default=0.95, metadata=numbers(least=0, most=0.999999))
    eps: float = field(default=1e-8, metadata=numbers(least=1e-30, most=1))
    weight_decay: float = field(default=0.1, metadata=numbers(least=0, most=1e3))
    clip_norm: float | None = field(default=1.0, metadata=numbers(above=0, most=1e18))
    moments_dtype: MomentsDtype = field(default="float32", metadata=fixed())
    offload: bool = field(default=False, metadata=free())
    max_skipped: int = field(default=10, metadata=free(least=1, most=MOST))

    def __post_init__(self):
        check(self, "optimizer.")
        for name, choices in (("moments_dtype", MomentsDtype), ("schedule", Schedule)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(
                    f"{name} must be one of {', '.join(get_args(choices))}, got "
                    f"{getattr(self, name)!r}."
                )


def fitted_warmup(config: OptimizerConfig, num_steps: int) -> int:
    """Return the steps of warm-up in a training of so many steps.

    Those of the config; a tenth of all, but at least one of several, if they do not fit.
    """
    if config.warmup_steps < num_steps:
        return config.warmup_steps
    return min(max(1, num_steps // 10), num_steps - 1)


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Return the learning rate by step, from 0 to num_steps - 1."""
    top, low = config.learning_rate, config.final_ratio * config.learning_rate
    warmup = fitted_warmup(config, num_steps)
    first = 0.0 if warmup else top
    if config.schedule == "cosine":
        schedule = optax.warmup_cosine_decay_schedule(first, top, warmup, num_steps, low)
    elif config.schedule == "constant":
        schedule = optax.warmup_constant_schedule(first, top, warmup)
    else:
        decay = min(round(config.decay_share * num_steps), num_steps - warmup)
        schedule = optax.join_schedules(
            [
                optax.warmup_constant_schedule(first, top, warmup),
                optax.linear_schedule(top, low, decay),
            ],
            [num_steps - decay],
        )
    # optax counts from a rate of 0, which would make the first step an idle one.
    return lambda count: schedule(count + 1)


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Return clipping, then AdamW under `make_schedule`."""

    def is_decayed(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)

    adamw = optax.chain(
        _kept_small(optax.scale_by_adam(config.beta1, config.beta2, config.eps), config),
        optax.add_decayed_weights(config.weight_decay, is_decayed),
        optax.scale_by_learning_rate(make_schedule(config, num_steps)),
    )
    if config.clip_norm is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def fetched(opt_state: Any, grads: Any) -> tuple[Any, Any]:
    """(optimizer state on the device, wherever it lies; the gradients); to be traced.

    What comes from the host comes when the gradients are there, not before: XLA would fetch it
    early, and hold it through the backward pass.
    """
    if all(_space(x) == jax.memory.Space.Device for x in jax.tree.leaves(opt_state)):
        return opt_state, grads
    opt_state, grads = jax.lax.optimization_barrier((opt_state, grads))
    return jax.tree.map(lambda x: _moved(x, jax.memory.Space.Device), opt_state), grads


def put_back(opt_state: Any, like: Any) -> Any:
    """Optimizer state where that of `like` lies; to be traced."""
    return jax.tree.map(lambda x, there: _moved(x, _space(there)), opt_state, like)


def rounded_by_chance(key: Array, x: Float[Array, "..."]) -> BFloat16[Array, "..."]:
    """Float32 as one of the two nearest bfloat16, the nearer the likelier: right on average.

    Args:
        key: the same key gives the same numbers, however `x` is cut.
        x: float32 of any shape.
    """
    # A bfloat16 is the upper half of a float32: a random lower half carries into it as often as
    # the lower half is large.
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits = bits + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    upper = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), upper, x.astype(jnp.bfloat16))


def _kept_small(
    adam: optax.GradientTransformation, config: OptimizerConfig
) -> optax.GradientTransformation:
    """Adam whose moments are kept as the config says; it computes in float32 all the same."""

    def moments(state: Any, change: Any) -> Any:
        return state._replace(mu=jax.tree.map(change, state.mu), nu=jax.tree.map(change, state.nu))

    def init(params: Any) -> Any:
        state = adam.init(params)
        state = moments(state, lambda x: x.astype(config.moments_dtype))
        if config.offload:
            state = moments(state, lambda x: _moved(x, jax.memory.Space.Host))
        return state

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if config.moments_dtype == "float32":
            return adam.update(grads, state, params)
        exact = moments(state, lambda x: x.astype(jnp.float32))
        updates, exact = adam.update(grads, exact, params)
        leaves, tree = jax.tree.flatten((exact.mu, exact.nu))
        # By the count alone, so that a run that goes on rounds as one that was never stopped.
        keys = jax.random.split(jax.random.key(exact.count), len(leaves))
        mu, nu = jax.tree.unflatten(tree, map(rounded_by_chance, keys, leaves))
        return updates, exact._replace(mu=mu, nu=nu)

    return optax.GradientTransformation(init, update)


def _space(x: Any) -> Any:
    return getattr(jax.typeof(x), "memory_space", jax.memory.Space.Device)


def _moved(x: Any, space: Any) -> Any:
    return x if _space(x) == space else jax.device_put(x, space)
