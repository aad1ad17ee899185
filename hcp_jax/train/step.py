"""One step of training: loss, gradients, AdamW.

All that crosses a `jit` is a plain tree of arrays (`TrainState`, and a batch that is a dict); the
model's graph is static. Nothing here loops, logs or reads data.

A batch is a dict, on one device or as `ContextParallel.shard_batch` leaves it:

    tokens, targets, positions   int32[R, T]
    weights                      float32[R, T], 0 where the target does not count
    mask                         hcp_jax.Mask

Accumulation does not show in it: with `accumulation=A`, the R rows are computed in A portions of
R / A, and since the loss is normalised by the weights of *all* rows, the gradient is that of the
whole batch whatever A is.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from hcp_jax.models.config import ModelConfig
from hcp_jax.models.layers.loss import summed_cross_entropy
from hcp_jax.models.transformer import abstract_model, init_params
from hcp_jax.parallel import host_memory, spmd
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.train.optimizer import (
    OptimizerConfig,
    farthest,
    fetched,
    make_optimizer,
    make_schedule,
    put_back,
)
from hcp_jax.train.sharding import check_divides, state_shardings


class TrainState(NamedTuple):
    """All that changes from step to step.

    Attributes:
        step: how many steps have been made, an int32 scalar.
        params: a dict of dicts that mirrors the model's modules, in float32.
        opt_state: optax's.
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
    """Shapes, dtypes and (with a cp) shardings of the state: what a checkpoint is restored into.

    Raises:
        ValueError: if tp cannot cut the model.
    """
    params = abstract_model(model)[1]
    state = TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32),
        params=params,
        opt_state=jax.eval_shape(optimizer.init, params),
    )
    if cp is None:
        return state
    check_divides(model, cp)
    of_params, of_opt_state = state_shardings(params, optimizer, cp, fsdp=fsdp)
    whole = jax.sharding.NamedSharding(cp.mesh, jax.sharding.PartitionSpec())
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        state,
        TrainState(whole, of_params, of_opt_state),
    )


def init_state(
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    seed: int,
    cp: ContextParallel | None = None,
    *,
    fsdp: bool = False,
) -> TrainState:
    """A fresh state, every array made where it belongs: no device ever holds the whole.

    The numbers depend on the seed alone, not on the mesh.

    Args:
        model: the model.
        optimizer: from `make_optimizer`.
        seed: of the parameters.
        cp: the context parallelism; None for one device.
        fsdp: cut parameters and optimizer state over dp and cp as well.

    Raises:
        ValueError: if tp cannot cut the model.
    """

    def init(key: jax.Array) -> TrainState:
        params = init_params(model, key)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    shardings = _shardings(abstract_state(model, optimizer, cp, fsdp=fsdp))
    return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))


def make_train_step(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    num_steps: int,
    cp: ContextParallel | None = None,
    *,
    fsdp: bool = False,
    accumulation: int = 1,
) -> Callable[[TrainState, dict], tuple[TrainState, dict[str, Array]]]:
    """The compiled step.

    Args:
        model: the model.
        optimizer: with `num_steps`, what `init_state`'s optimizer was made of.
        num_steps: length of the training, which the learning rate's decay is stretched over.
        cp: the context parallelism; None for one device.
        fsdp: as in `init_state`.
        accumulation: A, the number of portions that the rows of a batch are computed in; row r is
            in portion r mod A.

    Returns:
        `(state, batch) -> (state, metrics)`, jitted; the state given is donated. See
        `apply_gradients` for the metrics; "pairs", the visible (query, key) pairs of the batch, is
        one more.

    Raises:
        ValueError: if tp cannot cut the model; when called, if A portions cannot be made.
    """
    schedule, transform = make_schedule(optimizer, num_steps), make_optimizer(optimizer, num_steps)
    loss_sum = summed_loss(model, cp)
    shardings = _shardings(abstract_state(model, transform, cp, fsdp=fsdp))

    def place(grads: Any) -> Any:
        if cp is None:
            return grads
        constrain = functools.partial(spmd.constrain, mesh=cp.mesh, axes=cp.axes)
        return jax.tree.map(lambda g, s: constrain(g, spec=s.spec), grads, shardings.params)

    def step(state: TrainState, batch: dict) -> tuple[TrainState, dict[str, Array]]:
        tokens = jnp.sum(batch["weights"])

        def loss_of(params: Any, portion: dict) -> Float[Array, ""]:
            return loss_sum(params, portion) / _nonzero(tokens)

        loss, grads = _accumulate(
            jax.value_and_grad(loss_of),
            state.params,
            _portions(batch, accumulation, cp),
            place,
        )
        state, metrics = apply_gradients(
            state, grads, loss, tokens, transform, schedule, optimizer.weight_decay
        )
        return state, metrics | {"pairs": _visible_pairs(batch)}

    if cp is None:
        return jax.jit(step, donate_argnums=0)
    specs = jax.tree.map(lambda sharding: sharding.spec, shardings), PartitionSpec()

    @functools.wraps(step)
    def over(state: TrainState, batch: dict) -> tuple[TrainState, dict[str, Array]]:
        return spmd.run(cp.mesh, cp.axes, step, specs, state, batch)

    return jax.jit(
        over, donate_argnums=0, in_shardings=(shardings, None), out_shardings=(shardings, None)
    )


def apply_gradients(
    state: TrainState,
    grads: Any,
    loss: Float[Array, ""],
    tokens: Float[Array, ""],
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    weight_decay: float,
) -> tuple[TrainState, dict[str, Array]]:
    """The update that ends a step; to be traced.

    A step is skipped if its loss or gradient is not finite, or if the update could make a parameter
    so (`farthest`): parameters and optimizer state stay as they are, and so does the learning rate,
    which goes by the updates made.

    Args:
        state: before the step.
        grads: of the loss, like `state.params`.
        loss: nats per unit of weight.
        tokens: the sum of the weights, of all devices.
        optimizer: from `make_optimizer`.
        schedule: from `make_schedule`.
        weight_decay: of the optimizer.

    Returns:
        The state after the step, and metrics, scalars on the device: "loss", "grad_norm" (before
        clipping), "learning_rate", "tokens", and "skipped" (1 if the step was, else 0).
    """
    grad_norm = optax.tree.norm(grads)
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
    """Return how many steps were not skipped, as the optimizer's own schedule counts them."""
    return optax.tree.get(
        state.opt_state,
        "count",
        filtering=lambda path, _: path[-1].tuple_name == "ScaleByScheduleState",
    )


def make_eval_loss(
    model: ModelConfig, cp: ContextParallel | None = None
) -> Callable[[Any, dict], dict[str, Float[Array, ""]]]:
    """The loss without a step: `(params, batch) -> {"loss", "tokens"}`, jitted.

    Batches of different weight are averaged right by weighing each loss with its "tokens".
    """
    loss_sum = summed_loss(model, cp)

    def eval_loss(params: Any, batch: dict) -> dict[str, Float[Array, ""]]:
        tokens = jnp.sum(batch["weights"])
        return {"loss": loss_sum(params, batch) / _nonzero(tokens), "tokens": tokens}

    return jax.jit(eval_loss)


def summed_loss(
    model: ModelConfig, cp: ContextParallel | None = None
) -> Callable[[Any, dict], Float[Array, ""]]:
    """Σ weight · loss over a batch, `(params, batch) -> nats`; to be traced.

    Raises:
        NotImplementedError: if activations are to be offloaded and the devices cannot.
    """
    if model.offload_activations and cp is not None:
        host_memory.require(cp.mesh)
    graphdef, _ = abstract_model(model)

    def loss_sum(params: Any, batch: dict) -> Float[Array, ""]:
        transformer = nnx.merge(graphdef, params)
        hidden = transformer(batch["tokens"], batch["positions"], mask=batch["mask"], cp=cp)
        return summed_cross_entropy(
            hidden,
            transformer.unembedding,
            batch["targets"],
            batch["weights"],
            cp=cp,
            chunk=model.loss_chunk,
            z_loss=model.z_loss,
        )

    return loss_sum


def _visible_pairs(batch: dict) -> Float[Array, ""]:
    rows, length = batch["tokens"].shape
    start, end = batch["mask"].intervals(length, xp=jnp)
    # In float32, as a million tokens have more pairs than int32 counts.
    return jnp.sum((end - start).astype(jnp.float32)) * (rows / start.shape[0])


def _portions(batch: dict, number: int, cp: ContextParallel | None) -> dict:
    """The batch with a leading dim of `number` portions, row r in portion r mod `number`.

    Rows are cut over dp in equal stretches; taking every `number`-th of each stretch moves nothing.
    """
    rows = batch["tokens"].shape[0]
    each = number * (1 if cp is None else cp.axis_size(cp.dp))
    if rows % each:
        raise ValueError(
            f"a batch of {rows} rows cannot be computed in accumulation={number} portions on "
            f"dp={each // number}: the rows must be a multiple of {each}."
        )

    def split(x: Array) -> Array:
        if x.shape[0] != rows:  # one for all rows
            return jnp.broadcast_to(x, (number, *x.shape))
        return x.reshape(rows // number, number, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)


def _accumulate(grad_of, params, portions, place) -> tuple[Float[Array, ""], Any]:
    """Sum loss and gradients over the portions, which are computed one after the other.

    `place` says how gradients are cut.
    """

    def add(total: tuple, portion: dict) -> tuple[tuple, None]:
        loss, grads = grad_of(params, portion)
        return (total[0] + loss, place(jax.tree.map(jnp.add, total[1], grads))), None

    number = jax.tree.leaves(portions)[0].shape[0]
    if number == 1:
        loss, grads = grad_of(params, jax.tree.map(lambda x: x[0], portions))
        return loss, place(grads)
    zeros = (jnp.zeros((), jnp.float32), place(jax.tree.map(jnp.zeros_like, params)))
    return jax.lax.scan(add, zeros, portions)[0]


def _shardings(state: TrainState) -> TrainState:
    return jax.tree.map(lambda x: x.sharding, state)


def _nonzero(tokens: Float[Array, ""]) -> Float[Array, ""]:
    """A batch in which nothing counts has loss 0, not NaN."""
    return jnp.where(tokens > 0, tokens, 1)
