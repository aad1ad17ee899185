"""Make one step of training: sums over microbatches, then one update.

    sums = gradients(params, microbatch) + ...      loss, weight and gradients of each microbatch
    state, metrics = update(state, sums)            divide by the weight; clipping and AdamW

Losses are summed, not averaged, and divided by the weight of the whole step at the end. So the
gradient is the same however the tokens of a step are distributed over microbatches.
`make_train_step` is one program of both, for a step whose microbatches are alike; `menu.py`
compiles them one by one, for microbatches that are not.

The arguments of a `jit` are plain trees of arrays (`TrainState`, `Batch`); the model's graph is
static. Nothing here loops, logs or reads data.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from hcp_jax.models.config import ModelConfig
from hcp_jax.models.layers.attention import layer_masks
from hcp_jax.models.transformer import abstract_model, init_params
from hcp_jax.parallel import spmd
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.sequence.mask import Mask
from hcp_jax.sequence.placed_mask import PlacedMask
from hcp_jax.train.batch import Batch
from hcp_jax.train.losses import nonzero, summed_losses, values
from hcp_jax.train.optimizer import (
    farthest,
    fetched,
    make_optimizer,
    make_schedule,
    put_back,
    without_signals,
)
from hcp_jax.train.portions import (
    Sums,
    reduce_over_devices,
    reduced_once,
    split_portions,
    sum_portions,
    whole_gradients,
)
from hcp_jax.train.sections import OptimizerConfig
from hcp_jax.train.sharding import check_divides, jit_on_mesh, state_shardings


class TrainState(NamedTuple):
    """The arrays that change from step to step.

    Attributes:
        step: number of steps that have been made, an int32 scalar.
        params: a dict of dicts that mirrors the model's modules, in float32.
        opt_state: the state of the optax optimizer.
    """

    step: Any
    params: Any
    opt_state: Any


def abstract_state(
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    cp: ContextParallel | None = None,
    *,
    fsdp: bool = False,
) -> TrainState:
    """Return shapes, dtypes and (with `cp`) shardings of the state, to compile or restore with.

    Raises:
        ValueError: if tp cannot cut the model.
    """
    params = abstract_model(model)[1]
    if cp is None:
        return _abstract(params, optimizer)
    check_divides(model, cp)
    return sharded_state(params, optimizer, state_shardings(params, optimizer, cp, fsdp=fsdp))


def sharded_state(
    params: Any, optimizer: optax.GradientTransformation, shardings: tuple[Any, Any]
) -> TrainState:
    """Return shapes, dtypes and shardings of the state of any parameters.

    Args:
        params: their shapes.
        optimizer: from `make_optimizer`.
        shardings: those of the parameters, and of the optimizer state.
    """
    whole = NamedSharding(jax.tree.leaves(shardings[0])[0].mesh, PartitionSpec())
    sharded: TrainState = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        _abstract(params, optimizer),
        TrainState(whole, *shardings),
    )
    return sharded


def _abstract(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32),
        params=params,
        opt_state=jax.eval_shape(optimizer.init, params),
    )


def init_state(
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    seed: int,
    cp: ContextParallel | None = None,
    *,
    fsdp: bool = False,
) -> TrainState:
    """Return a new state with random parameters; each device makes only its own part.

    The numbers depend on the seed alone, not on the mesh.

    Args:
        model: the model.
        optimizer: from `make_optimizer`.
        seed: seed of the parameters.
        cp: the context parallelism; None for one device.
        fsdp: whether to cut parameters and optimizer state over dp and cp as well.

    Raises:
        ValueError: if tp cannot cut the model.
    """

    def init(key: jax.Array) -> TrainState:
        params = init_params(model, key)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    shardings = _shardings(abstract_state(model, optimizer, cp, fsdp=fsdp))
    state: TrainState = jax.jit(init, out_shardings=shardings)(jax.random.key(seed))
    return state


def make_train_step(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    num_steps: int,
    cp: ContextParallel | None = None,
    *,
    fsdp: bool = False,
    accumulation: int = 1,
) -> jax.stages.Wrapped:
    """Return the jitted function `(state, batch) -> (state, metrics)` that makes a step.

    Args:
        model: the model.
        optimizer: config of the optimizer; `init_state` must get `make_optimizer` of it and of
            `num_steps`.
        num_steps: number of steps of the training, over which the learning rate decays.
        cp: the context parallelism; None for one device.
        fsdp: as in `init_state`.
        accumulation: A, the number of portions in which the rows of a batch are computed; row r is
            in portion r mod A.

    Returns:
        The function; it donates the given state. Its metrics are those of `apply_gradients` and the
        means of `mean_names`, and "pairs", the number of visible (query, key) pairs of the batch.

    Raises:
        ValueError: if tp cannot cut the model; when called, if the rows of a batch cannot be cut
            into A portions.
    """
    transform = make_optimizer(optimizer, num_steps)
    like = abstract_state(model, transform, cp, fsdp=fsdp)
    summed: Callable[[Any, Any, Any], Sums] = functools.partial(
        sum_portions, summed_gradients(model, like.params, cp)
    )
    if cp is not None and accumulation > 1 and whole_gradients(cp, fsdp=fsdp):
        summed = reduced_once(summed, cp)
    schedule = make_schedule(optimizer, num_steps)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        # The loss is divided before the backward pass, so that every other collective waits for
        # the sum of the weights. Devices of several CPU processes that began two collectives in
        # different orders would wait for each other.
        tokens, pairs = _tokens_and_pairs(batch, model)
        sums = summed(state.params, split_portions(batch, accumulation, cp), nonzero(tokens))
        state, metrics = apply_gradients(
            state, sums.grads, sums.loss, tokens, transform, schedule, optimizer.weight_decay
        )
        return state, metrics | values(sums.means) | {"pairs": pairs}

    return jit_on_mesh(step, cp, (like, None), (like, None), donate=0)


def summed_gradients(
    model: ModelConfig, like: Any, cp: ContextParallel | None = None
) -> Callable[[Any, Batch, Any], Sums]:
    """Return a function `(params, batch, weight) -> Sums` of one microbatch; to be traced.

    It divides the loss, and so its gradients, by `weight`; the sums of means it does not divide.

    Args:
        model: the model.
        like: shapes and shardings of the parameters; gradients are sharded alike.
        cp: the context parallelism of the microbatch; None for one device.

    Raises:
        NotImplementedError: as `summed_losses`.
    """
    losses = summed_losses(model, cp)

    def divided(params: Any, batch: Batch, weight: Any) -> tuple[Float[Array, ""], Any]:
        found = losses(params, batch)
        return found.total / weight, (found.main / weight, found.means)

    def gradients(params: Any, batch: Batch, weight: Any) -> Sums:
        grads, (loss, means) = jax.grad(divided, has_aux=True)(params, batch, weight)
        if cp is not None:
            constrain = functools.partial(spmd.constrain, mesh=cp.mesh, axes=cp.axes)
            grads = jax.tree.map(lambda g, x: constrain(g, spec=x.sharding.spec), grads, like)
        return Sums(grads, loss, jnp.sum(batch["weights"]), means)

    return gradients


def make_update(
    optimizer: OptimizerConfig, num_steps: int, cp: ContextParallel, *, fsdp: bool
) -> Callable[[TrainState, Sums], tuple[TrainState, dict[str, Array]]]:
    """Return a function `(state, sums) -> (state, metrics)` that ends a step; to be traced.

    Args:
        optimizer: config of the optimizer.
        num_steps: as in `make_train_step`.
        cp: the context parallelism of the sums, which are `abstract_sums` of it.
        fsdp: as in `init_state`; without it, all sums have still to be reduced over the devices.

    Returns:
        The function; its metrics are those of `apply_gradients` and the means of `mean_names`.
    """
    schedule, transform = make_schedule(optimizer, num_steps), make_optimizer(optimizer, num_steps)

    def update(state: TrainState, sums: Sums) -> tuple[TrainState, dict[str, Array]]:
        tokens = reduce_over_devices(sums.weight, cp)
        # Divided first, so that the other reductions wait for this one; see `make_train_step`.
        weight = nonzero(tokens)
        grads, loss = jax.tree.map(lambda x: x / weight, (sums.grads, sums.loss))
        means = sums.means
        if whole_gradients(cp, fsdp=fsdp):
            grads, loss, means = reduce_over_devices((grads, loss, means), cp)
        state, metrics = apply_gradients(
            state, grads, loss, tokens, transform, schedule, optimizer.weight_decay
        )
        return state, metrics | values(means)

    return update


def apply_gradients(
    state: TrainState,
    grads: Any,
    loss: Float[Array, ""],
    tokens: Float[Array, ""],
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    weight_decay: float,
) -> tuple[TrainState, dict[str, Array]]:
    """Return the state after the update that ends a step, and its metrics; to be traced.

    A step is skipped if its loss or gradient is not finite, or if the update could make a parameter
    not finite (`farthest`). Then parameters and optimizer state do not change, and neither does the
    learning rate, which depends on the number of updates made.

    Args:
        state: the state before the step.
        grads: gradients of the loss, a tree like `state.params`.
        loss: nats per unit of weight.
        tokens: the sum of the weights over all devices.
        optimizer: from `make_optimizer`.
        schedule: from `make_schedule`.
        weight_decay: of the optimizer.

    Returns:
        The new state, and metrics, which are scalars on the device: "loss", "grad_norm" (before
        clipping), "learning_rate", "tokens", and "skipped" (1 if the step was skipped, else 0).
    """
    grad_norm = optax.tree.norm(without_signals(grads))
    rate = jnp.asarray(schedule(updates_made(state)), jnp.float32)
    reach = farthest(state.params, rate, weight_decay)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(reach)
    before, grads = fetched(state.opt_state, grads)
    updates, opt_state = optimizer.update(grads, before, state.params)
    params = optax.apply_updates(state.params, updates)
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, before)
    )
    metrics = {
        "loss": loss,
        "grad_norm": grad_norm,
        "learning_rate": rate,
        "tokens": tokens,
        "skipped": 1 - finite.astype(jnp.int32),
    }
    return TrainState(state.step + 1, params, put_back(opt_state, state.opt_state)), metrics


def updates_made(state: TrainState) -> Any:
    """Return the number of steps that were not skipped, from the optimizer's schedule."""
    return optax.tree.get(
        state.opt_state,
        "count",
        filtering=lambda path, _: path[-1].tuple_name == "ScaleByScheduleState",
    )


def visible_pairs(batch: Batch, model: ModelConfig) -> float:
    """Return the visible pairs of one head, the mean over the layers, of a batch on the host."""
    shape = batch["weights"].shape

    def pairs(mask: Mask) -> float:
        start, end = mask.intervals(shape[1], xp=np)
        return float(np.broadcast_to(end - start, shape).sum(dtype=np.float64))

    masks: Any = layer_masks(model, batch["mask"])
    return sum(share * pairs(mask) for share, mask in masks)


def _tokens_and_pairs(batch: Batch, model: ModelConfig) -> tuple[Any, Any]:
    """Return the sum of the weights, and `visible_pairs`.

    Both are one sum over the devices: a second one would be independent of the first, and CPU
    processes may begin independent sums in different orders.
    """
    weights = batch["weights"]

    def widths(mask: Mask | PlacedMask) -> Float[Array, "B T"]:
        if isinstance(mask, PlacedMask):
            start, end = mask.intervals
        else:
            start, end = mask.intervals(weights.shape[1], xp=jnp)
        # In float32: a million tokens have more pairs than int32 can hold.
        return jnp.broadcast_to((end - start).astype(jnp.float32), weights.shape)

    masks = layer_masks(model, batch["mask"])
    if len(masks) <= 1:  # none: no layer attends, and no pair counts
        seen = widths(batch["mask"])
    else:
        seen = jnp.sum(jnp.stack([share * widths(mask) for share, mask in masks]), axis=0)
    tokens, pairs = jnp.sum(jnp.stack([weights, seen]), axis=(1, 2))
    return tokens, pairs


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)
