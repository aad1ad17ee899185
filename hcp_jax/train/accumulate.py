"""Make a step of several programs: each microbatch adds to sums, and one update ends the step.

`step.make_train_step` is a single program, since all its microbatches are alike. With dynamic
context parallelism they are not: each grouping has its own program. Each of these takes the sums of
losses, weights and gradients so far, and returns them with its own added:

    sums = zeros()
    sums = accumulate[layout](params, sums, batch)      for every microbatch
    state, metrics = update(state, sums)

Losses are summed, not averaged, and divided by the weight of the whole step at the end. So the
gradient is the same however the documents of the step are distributed over microbatches.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from hcp_jax.models.config import ModelConfig
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.train.optimizer import make_optimizer, make_schedule
from hcp_jax.train.sections import OptimizerConfig
from hcp_jax.train.step import TrainState, apply_gradients, summed_loss


class Sums(NamedTuple):
    """Sums over the microbatches so far, all in float32.

    Attributes:
        grads: gradients of `loss`, a tree like the parameters.
        loss: Σ weight · loss over all tokens.
        weight: Σ weight.
    """

    grads: Any
    loss: Any
    weight: Any


def abstract_sums(state: TrainState, cp: ContextParallel) -> Sums:
    """Return shapes and shardings of the sums; gradients are sharded like the parameters.

    Args:
        state: from `abstract_state`.
        cp: the context parallelism of the state.
    """
    whole = NamedSharding(cp.mesh, PartitionSpec())
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    return Sums(state.params, scalar, scalar)


def make_zeros(like: Sums) -> jax.stages.Wrapped:
    """Return a jitted function `() -> sums` that makes sums of zeros.

    Args:
        like: from `abstract_sums`.
    """
    shardings = jax.tree.map(lambda x: x.sharding, like)

    def zeros() -> Sums:
        sums: Sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
        return sums

    return jax.jit(zeros, out_shardings=shardings)


def make_accumulate(model: ModelConfig, cp: ContextParallel, like: Sums) -> jax.stages.Wrapped:
    """Return a jitted function `(params, sums, batch) -> sums` that adds a microbatch.

    The given sums are donated.

    Args:
        model: the model.
        cp: the context parallelism of the microbatch, with its groups if any.
        like: from `abstract_sums`.
    """
    loss_and_grads = jax.value_and_grad(summed_loss(model, cp))
    shardings = jax.tree.map(lambda x: x.sharding, like)

    def accumulate(params: Any, sums: Sums, batch: dict[str, Any]) -> Sums:
        loss, grads = loss_and_grads(params, batch)
        added = Sums(grads, loss, jnp.sum(batch["weights"]))
        total: Sums = jax.tree.map(jnp.add, sums, added)
        return total

    return jax.jit(
        accumulate,
        donate_argnums=1,
        in_shardings=(shardings.grads, shardings, None),
        out_shardings=shardings,
    )


def make_update(
    optimizer: OptimizerConfig, num_steps: int, state: TrainState, like: Sums
) -> jax.stages.Wrapped:
    """Return a jitted function `(state, sums) -> (state, metrics)` that ends a step.

    The given state is donated; the metrics are those of `apply_gradients`.

    Args:
        optimizer: the optimizer's config.
        num_steps: as in `make_train_step`.
        state: from `abstract_state`.
        like: from `abstract_sums`.
    """
    schedule, transform = make_schedule(optimizer, num_steps), make_optimizer(optimizer, num_steps)
    shardings = [jax.tree.map(lambda x: x.sharding, tree) for tree in (state, like)]

    def update(state: TrainState, sums: Sums) -> tuple[TrainState, dict[str, jax.Array]]:
        # A step without weight has loss 0, not NaN.
        weight = jnp.where(sums.weight > 0, sums.weight, 1)
        grads = jax.tree.map(lambda g: g / weight, sums.grads)
        return apply_gradients(
            state,
            grads,
            sums.loss / weight,
            sums.weight,
            transform,
            schedule,
            optimizer.weight_decay,
        )

    return jax.jit(
        update,
        donate_argnums=0,
        in_shardings=tuple(shardings),
        out_shardings=(shardings[0], None),
    )
