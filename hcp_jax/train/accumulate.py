"""A step in pieces: sums over microbatches of different programs, and one update at the end.

`step.make_train_step` is a single program, since its microbatches are alike. Those of dynamic
context parallelism are not: every group layout is a program of its own. What they share is the sum
of their losses, weights and gradients, which each takes from the one before and hands on:

    sums = zeros()
    sums = accumulate[layout](params, sums, batch)      for every microbatch
    state, metrics = update(state, sums)

Losses are summed, not averaged, and divided by the weight of the whole step in the end, so that the
gradient is that of all its documents however they were dealt to microbatches.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from hcp_jax.models.config import ModelConfig
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.train.step import (
    OptimizerConfig,
    TrainState,
    apply_gradients,
    make_optimizer,
    make_schedule,
    summed_loss,
)


class Sums(NamedTuple):
    """What microbatches add up to; all of it in float32.

    Attributes:
        grads: of `loss`, a tree like the parameters.
        loss: Σ weight · loss over all tokens.
        weight: Σ weight.
    """

    grads: Any
    loss: Any
    weight: Any


def abstract_sums(state: TrainState, cp: ContextParallel) -> Sums:
    """Shapes and shardings of the sums: the gradients lie as the parameters do.

    Args:
        state: from `abstract_state`.
        cp: the context parallelism that the state is cut for.
    """
    whole = NamedSharding(cp.mesh, PartitionSpec())
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    return Sums(state.params, scalar, scalar)


def make_zeros(like: Sums) -> jax.stages.Wrapped:
    """The sums of no microbatch, `() -> sums`, jitted; `like` from `abstract_sums`."""
    shardings = jax.tree.map(lambda x: x.sharding, like)

    def zeros() -> Sums:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)

    return jax.jit(zeros, out_shardings=shardings)


def make_accumulate(model: ModelConfig, cp: ContextParallel, like: Sums) -> jax.stages.Wrapped:
    """One microbatch: `(params, sums, batch) -> sums`, jitted; the sums given are donated.

    Args:
        model: the model.
        cp: the context parallelism of the microbatch, with its groups if it has some.
        like: from `abstract_sums`.
    """
    grad_of = jax.value_and_grad(summed_loss(model, cp))
    shardings = jax.tree.map(lambda x: x.sharding, like)

    def accumulate(params: Any, sums: Sums, batch: dict) -> Sums:
        loss, grads = grad_of(params, batch)
        of_batch = Sums(grads, loss, jnp.sum(batch["weights"]))
        return jax.tree.map(jnp.add, sums, of_batch)

    return jax.jit(
        accumulate,
        donate_argnums=1,
        in_shardings=(shardings.grads, shardings, None),
        out_shardings=shardings,
    )


def make_update(
    optimizer: OptimizerConfig, num_steps: int, state: TrainState, like: Sums
) -> jax.stages.Wrapped:
    """The end of a step: `(state, sums) -> (state, metrics)`, jitted; the state given is donated.

    Args:
        optimizer: the optimizer's config.
        num_steps: as in `make_train_step`; so are the metrics.
        state: from `abstract_state`.
        like: from `abstract_sums`.
    """
    schedule, transform = make_schedule(optimizer, num_steps), make_optimizer(optimizer, num_steps)
    of_state, of_sums = (jax.tree.map(lambda x: x.sharding, tree) for tree in (state, like))

    def update(state: TrainState, sums: Sums) -> tuple[TrainState, dict[str, jax.Array]]:
        # A step in which nothing counts has loss 0, not NaN.
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
        update, donate_argnums=0, in_shardings=(of_state, of_sums), out_shardings=(of_state, None)
    )
