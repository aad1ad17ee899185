"""Make one step of training: loss, gradients, AdamW.

The arguments of a `jit` are plain trees of arrays (`TrainState`, and a batch that is a dict); the
model's graph is static. Nothing here loops, logs or reads data.

A batch is a dict, on one device or from `ContextParallel.shard_batch`:

    tokens, targets, positions   int32[R, T]
    weights                      float32[R, T], 0 where the target does not count
    mask                         hcp_jax.Mask

Accumulation does not change a batch: with `accumulation=A`, its R rows are computed in A portions
of R / A. The loss is normalised by the weights of *all* rows, so the gradient is that of the whole
batch for any A.
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
from hcp_jax.models.layers.attention import layer_masks
from hcp_jax.models.layers.loss import summed_cross_entropy
from hcp_jax.models.transformer import abstract_model, init_params
from hcp_jax.parallel import host_memory, spmd
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.sequence.mask import Mask
from hcp_jax.train.optimizer import farthest, fetched, make_optimizer, make_schedule, put_back
from hcp_jax.train.sections import OptimizerConfig
from hcp_jax.train.sharding import check_divides, state_shardings


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
    state = TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32),
        params=params,
        opt_state=jax.eval_shape(optimizer.init, params),
    )
    if cp is None:
        return state
    check_divides(model, cp)
    param_shardings, opt_shardings = state_shardings(params, optimizer, cp, fsdp=fsdp)
    whole = jax.sharding.NamedSharding(cp.mesh, jax.sharding.PartitionSpec())
    sharded: TrainState = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        state,
        TrainState(whole, param_shardings, opt_shardings),
    )
    return sharded


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
        The function; it donates the given state. Its metrics are those of `apply_gradients`, and
        "pairs", the number of visible (query, key) pairs of the batch.

    Raises:
        ValueError: if tp cannot cut the model; when called, if the rows of a batch cannot be cut
            into A portions.
    """
    schedule, transform = make_schedule(optimizer, num_steps), make_optimizer(optimizer, num_steps)
    loss_sum = summed_loss(model, cp)
    shardings = _shardings(abstract_state(model, transform, cp, fsdp=fsdp))

    def constrain_grads(grads: Any) -> Any:
        if cp is None:
            return grads
        constrain = functools.partial(spmd.constrain, mesh=cp.mesh, axes=cp.axes)
        return jax.tree.map(lambda g, s: constrain(g, spec=s.spec), grads, shardings.params)

    def step(state: TrainState, batch: dict[str, Any]) -> tuple[TrainState, dict[str, Array]]:
        tokens = jnp.sum(batch["weights"])

        def mean_loss(params: Any, portion: dict[str, Any]) -> Float[Array, ""]:
            return loss_sum(params, portion) / _nonzero(tokens)

        loss, grads = _accumulate(
            jax.value_and_grad(mean_loss),
            state.params,
            _portions(batch, accumulation, cp),
            constrain_grads,
        )
        state, metrics = apply_gradients(
            state, grads, loss, tokens, transform, schedule, optimizer.weight_decay
        )
        return state, metrics | {"pairs": _visible_pairs(batch, model)}

    if cp is None:
        return jax.jit(step, donate_argnums=0)
    specs = jax.tree.map(lambda sharding: sharding.spec, shardings), PartitionSpec()

    @functools.wraps(step)
    def step_on_mesh(
        state: TrainState, batch: dict[str, Any]
    ) -> tuple[TrainState, dict[str, Array]]:
        return spmd.run(cp.mesh, cp.axes, step, specs, state, batch)

    return jax.jit(
        step_on_mesh,
        donate_argnums=0,
        in_shardings=(shardings, None),
        out_shardings=(shardings, None),
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
    """Return the number of steps that were not skipped, from the optimizer's schedule."""
    return optax.tree.get(
        state.opt_state,
        "count",
        filtering=lambda path, _: path[-1].tuple_name == "ScaleByScheduleState",
    )


def make_eval_loss(
    model: ModelConfig, cp: ContextParallel | None = None
) -> Callable[[Any, dict[str, Any]], dict[str, Float[Array, ""]]]:
    """Return a jitted function `(params, batch) -> {"loss", "tokens"}`: the loss without a step.

    To average over batches, weight each loss with its "tokens".
    """
    loss_sum = summed_loss(model, cp)

    def eval_loss(params: Any, batch: dict[str, Any]) -> dict[str, Float[Array, ""]]:
        tokens = jnp.sum(batch["weights"])
        return {"loss": loss_sum(params, batch) / _nonzero(tokens), "tokens": tokens}

    return jax.jit(eval_loss)


def summed_loss(
    model: ModelConfig, cp: ContextParallel | None = None
) -> Callable[[Any, dict[str, Any]], Float[Array, ""]]:
    """Return a function `(params, batch) -> Σ weight · loss`, in nats; to be traced.

    Raises:
        NotImplementedError: if activations are offloaded and the devices do not support it.
    """
    if model.offload_activations and cp is not None:
        host_memory.require(cp.mesh)
    graphdef, _ = abstract_model(model)

    def loss_sum(params: Any, batch: dict[str, Any]) -> Float[Array, ""]:
        transformer = nnx.merge(graphdef, params)
        hidden = transformer(batch["tokens"], batch["positions"], mask=batch["mask"], cp=cp)
        return summed_cross_entropy(
            hidden,
            transformer.unembedding,
            batch["targets"],
            batch["weights"],
            cp=cp,
            chunk=model.loss_chunk,
            soft_cap=model.final_soft_cap,
            z_loss=model.z_loss,
        )

    return loss_sum


def _visible_pairs(batch: dict[str, Any], model: ModelConfig) -> Float[Array, ""]:
    """Return the visible pairs of one head of one layer: the mean over the layers by width."""
    rows, length = batch["tokens"].shape

    def pairs(mask: Mask) -> Float[Array, ""]:
        start, end = mask.intervals(length, xp=jnp)
        # In float32: a million tokens have more pairs than int32 can hold.
        return jnp.sum((end - start).astype(jnp.float32)) * (rows / start.shape[0])

    masks = layer_masks(model, batch["mask"], length)
    if len(masks) == 1:
        return pairs(batch["mask"])
    return jnp.sum(jnp.stack([share * pairs(mask) for share, mask in masks]))


def _portions(batch: dict[str, Any], number: int, cp: ContextParallel | None) -> Any:
    """Return the batch with a leading dim of `number` portions; row r is in portion r mod `number`.

    Rows are cut over dp in equal stretches; taking every `number`-th row of each moves no data.
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


def _accumulate(
    loss_and_grads: Callable[[Any, Any], tuple[Array, Any]],
    params: Any,
    portions: Any,
    constrain_grads: Callable[[Any], Any],
) -> tuple[Float[Array, ""], Any]:
    """Return the sums of loss and gradients over the portions, computed one after the other.

    Args:
        loss_and_grads: `(params, portion) -> (loss, grads)`.
        params: the parameters.
        portions: from `_portions`.
        constrain_grads: constrains the sharding of gradients.
    """

    def add(total: tuple[Array, Any], portion: Any) -> tuple[tuple[Array, Any], None]:
        loss, grads = loss_and_grads(params, portion)
        return (total[0] + loss, constrain_grads(jax.tree.map(jnp.add, total[1], grads))), None

    number = jax.tree.leaves(portions)[0].shape[0]
    if number == 1:
        loss, grads = loss_and_grads(params, jax.tree.map(lambda x: x[0], portions))
        return loss, constrain_grads(grads)
    zeros = (jnp.zeros((), jnp.float32), constrain_grads(jax.tree.map(jnp.zeros_like, params)))
    total: tuple[Array, Any] = jax.lax.scan(add, zeros, portions)[0]
    return total


def _shardings(state: TrainState) -> TrainState:
    shardings: TrainState = jax.tree.map(lambda x: x.sharding, state)
    return shardings


def _nonzero(tokens: Float[Array, ""]) -> Float[Array, ""]:
    """Return `tokens`, or 1 if it is 0, so that a batch without weight has loss 0, not NaN."""
    return jnp.where(tokens > 0, tokens, 1)
