"""Check the ticks of a pipeline against one device: the loss and every gradient of a step."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from hcp_jax.models.transformer import init_params
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.pipeline.stages import whole_params
from hcp_jax.train.config import TrainConfig
from hcp_jax.train.data.batches import read
from hcp_jax.train.losses import summed_losses
from hcp_jax.train.pipelined import make_pipeline
from hcp_jax.train.portions import portion
from hcp_jax.verify import measures
from hcp_jax.verify.measures import EXACT, Check


def num_microbatches(config: TrainConfig) -> int:
    """Return how many microbatches the step has: one more than the stages, so that all wait."""
    return config.parallel.pp + 1


def one_step(config: TrainConfig, cp: ContextParallel, batch: Any) -> Iterator[Check]:
    """Yield a check of the loss, and one of the gradients of each part of the model.

    Args:
        config: the run; its model is small, and in float32.
        cp: the context parallelism of a stage.
        batch: on the host; its rows are those of `num_microbatches`.
    """
    model, number = config.model, num_microbatches(config)
    params = jax.jit(functools.partial(init_params, model))(jax.random.key(config.seed))
    params = jax.device_get(params)
    pipeline = make_pipeline(config, cp)
    placed = [cp.shard_batch(portion(batch, i, number)) for i in range(number)]
    grads, loss = pipeline.sums(pipeline.shard_params(params), placed)
    grads = whole_params(pipeline.stages, jax.device_get(grads))
    exact, right = _one_device(config, params, [portion(batch, i, number) for i in range(number)])
    yield _check("loss", [(np.asarray(loss), np.asarray(exact))])
    for part, of_part in grads.items():
        leaves = map(jax.tree.leaves, (of_part, jax.device_get(right[part])))
        yield _check(f"gradients of {part}", list(zip(*leaves, strict=True)))


def _one_device(config: TrainConfig, params: Any, batches: list[Any]) -> tuple[Any, Any]:
    """Return the loss of the next tokens, and the gradients of all that is trained on."""
    losses = summed_losses(config.model)

    def total(params: Any, batch: Any) -> tuple[Any, Any]:
        found = losses(params, batch)
        return found.total, found.main

    # Each microbatch by itself: a router's losses count the tokens of a microbatch.
    one = jax.jit(jax.grad(total, has_aux=True))
    found = [one(params, read(batch)) for batch in batches]
    grads, loss = jax.tree.map(lambda *x: sum(x), *found)
    return loss, grads


def _check(name: str, pairs: list[tuple[Any, Any]]) -> Check:
    error = max(measures.relative(np.asarray(here), np.asarray(one)) for here, one in pairs)
    cells = {"": name, "largest error": f"{error:.1e}", "allowed": f"{EXACT:.0e}"}
    return Check(cells, error <= EXACT)
