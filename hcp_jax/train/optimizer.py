"""AdamW and its learning rate; how its two moments are kept when memory is short.

In float32 the moments are twice the parameters. They can be kept in bfloat16, and they can lie in
the host's memory between two steps: then `init` makes them there, `sharding.py` reads from the
types of what it makes where each array belongs, and the step fetches them for the update
(`fetched`, `put_back`).
"""

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, BFloat16, Float

MomentsDtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter, 2019) with warm-up, cosine decay and clipping.

    Weight decay is on the matrices of the layers (every `kernel`), not on norms, biases, sinks, the
    embedding or the output head.

    Attributes:
        learning_rate: at the top, after the warm-up.
        warmup_steps: steps over which it rises linearly; the first step has 1 / warmup_steps of it.
        final_ratio: share of it that is left at the last step.
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

    learning_rate: float = 3e-4
    warmup_steps: int = 100
    final_ratio: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    moments_dtype: MomentsDtype = "float32"
    offload: bool = False
    max_skipped: int = 10

    def __post_init__(self):
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}.")
        if self.warmup_steps < 0 or self.weight_decay < 0 or not 0 <= self.final_ratio <= 1:
            raise ValueError(
                "warmup_steps and weight_decay must not be negative, and final_ratio lies in "
                f"[0, 1]; got {self.warmup_steps}, {self.weight_decay} and {self.final_ratio}."
            )
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"clip_norm must be positive or None, got {self.clip_norm}.")
        if self.max_skipped < 1:
            raise ValueError(f"max_skipped must be at least 1, got {self.max_skipped}.")
        if self.moments_dtype not in get_args(MomentsDtype):
            raise ValueError(
                f"moments_dtype must be one of {', '.join(get_args(MomentsDtype))}, got "
                f"{self.moments_dtype!r}."
            )


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Learning rate by step, from 0 to num_steps - 1.

    Raises:
        ValueError: if the warm-up is as long as the whole training or longer.
    """
    if num_steps <= config.warmup_steps:
        raise ValueError(
            f"warmup_steps={config.warmup_steps} must be fewer than the {num_steps} steps of the "
            "training; lower it, or train longer."
        )
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0 if config.warmup_steps else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=num_steps,
        end_value=config.final_ratio * config.learning_rate,
    )
    # optax counts from a rate of 0, which would make the first step an idle one.
    return lambda count: schedule(count + 1)


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Clipping, then AdamW under `make_schedule`.

    Raises:
        ValueError: as `make_schedule`.
    """

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
