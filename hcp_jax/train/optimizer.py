"""Make AdamW and its learning rate; keep its two moments in less memory on request.

In float32 the moments take twice the memory of the parameters. They can be kept in bfloat16, and in
host memory between two steps: then `init` makes them there, `sharding.py` reads from the types of
the arrays where each belongs, and the step fetches them for the update (`fetched`, `put_back`).
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, BFloat16, Float

from hcp_jax.models.transformer import rule
from hcp_jax.train.sections import OptimizerConfig

_RATIO = 1e12


def fitted_warmup(config: OptimizerConfig, num_steps: int) -> int:
    """Return the steps of warm-up in a training of `num_steps` steps.

    These are the steps of the config, or, if they do not fit, a tenth of all steps (at least one if
    there are several steps).
    """
    if config.warmup_steps < num_steps:
        return config.warmup_steps
    return min(max(1, num_steps // 10), num_steps - 1)


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Return a function from the step, 0 to num_steps - 1, to the learning rate."""
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
    # At count 0 optax's rate is 0, which would waste the first step.
    return lambda count: schedule(count + 1)


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Return an optimizer that clips gradients and applies AdamW with `make_schedule`."""

    def is_decayed(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: rule(tuple(key.key for key in path)).decay, params
        )

    adamw = optax.chain(
        _compact_moments(optax.scale_by_adam(config.beta1, config.beta2, config.eps), config),
        optax.add_decayed_weights(config.weight_decay, is_decayed),
        optax.scale_by_learning_rate(make_schedule(config, num_steps)),
    )
    if config.clip_norm is not None:
        adamw = optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
    return _following_signals(adamw, config.score_correction_rate)


def without_signals(grads: Any) -> Any:
    """Return gradients with zeros for parameters that follow the sign of a signal (`Rule`)."""
    return _by_signal(lambda g: jnp.zeros_like(g), lambda g: g, grads)


def _by_signal(signals: Any, others: Any, *trees: Any) -> Any:
    def one(path: Any, *leaves: Any) -> Any:
        return (signals if rule(tuple(k.key for k in path)).signal else others)(*leaves)

    return jax.tree_util.tree_map_with_path(one, *trees)


def _following_signals(
    inner: optax.GradientTransformation, rate: float
) -> optax.GradientTransformation:
    """Return `inner` for all parameters but those that move by `rate` against a signal's sign."""

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = inner.update(without_signals(grads), state, params)
        moved = _by_signal(lambda _, g: -rate * jnp.sign(g), lambda u, _: u, updates, grads)
        return moved, state

    return optax.GradientTransformation(inner.init, update)


def farthest(params: Any, rate: Float[Array, ""], weight_decay: float) -> Float[Array, ""]:
    """Return a bound on the absolute value of any parameter after one step of AdamW, in float32.

    It is infinite, or NaN, where the step could make a parameter so. The bound needs the old
    parameters only: looking at the new ones before the old are given up would keep both in memory.
    Adam divides a mean of gradients by the root of a mean of their squares: the ratio is at most
    1 / sqrt(1 - beta2) / (1 - beta1 / sqrt(beta2)), 58 for the usual betas, while gradients are
    finite. `_RATIO` leaves room for any betas.

    Args:
        params: before the step.
        rate: the learning rate.
        weight_decay: per unit of learning rate.
    """
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(x)) for x in jax.tree.leaves(params)]))
    return largest * (1 + rate * weight_decay) + rate * _RATIO


def fetched(opt_state: Any, grads: Any) -> tuple[Any, Any]:
    """Return the optimizer state in device memory, and the gradients; to be traced.

    State in host memory is fetched after the gradients are computed: XLA would fetch it early, and
    hold it through the backward pass.
    """
    if all(_space(x) == jax.memory.Space.Device for x in jax.tree.leaves(opt_state)):
        return opt_state, grads
    opt_state, grads = jax.lax.optimization_barrier((opt_state, grads))
    return jax.tree.map(lambda x: _moved(x, jax.memory.Space.Device), opt_state), grads


def put_back(opt_state: Any, like: Any) -> Any:
    """Return the optimizer state in the memory in which `like` is; to be traced."""
    return jax.tree.map(lambda x, there: _moved(x, _space(there)), opt_state, like)


def stochastic_round(key: Array, x: Float[Array, "..."]) -> BFloat16[Array, "..."]:
    """Round float32 stochastically to one of the two nearest bfloat16, unbiased on average.

    Args:
        key: the same key gives the same numbers, however `x` is cut.
        x: float32 of any shape.
    """
    # A bfloat16 is the upper half of a float32. Adding a random lower half carries into the upper
    # one with a probability proportional to the lower half.
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits = bits + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    upper = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), upper, x.astype(jnp.bfloat16))


def _compact_moments(
    adam: optax.GradientTransformation, config: OptimizerConfig
) -> optax.GradientTransformation:
    """Return Adam with moments in the config's dtype and memory; it computes in float32."""

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
            exact_updates, state = adam.update(grads, state, params)
            return exact_updates, state
        exact = moments(state, lambda x: x.astype(jnp.float32))
        updates, exact = adam.update(grads, exact, params)
        leaves, tree = jax.tree.flatten((exact.mu, exact.nu))
        # Keys depend on the count alone, so that a resumed run rounds as an uninterrupted one.
        keys = jax.random.split(jax.random.key(exact.count), len(leaves))
        mu, nu = jax.tree.unflatten(tree, map(stochastic_round, keys, leaves))
        return updates, exact._replace(mu=mu, nu=nu)

    return optax.GradientTransformation(init, update)


def _space(x: Any) -> Any:
    return getattr(jax.typeof(x), "memory_space", jax.memory.Space.Device)


def _moved(x: Any, space: Any) -> Any:
    return x if _space(x) == space else jax.device_put(x, space)
