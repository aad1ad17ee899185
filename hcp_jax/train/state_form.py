"""Hold the state as training needs it, and store it as every mesh reads it.

Checkpoints and weights have the model's own parameters, with the layers in a row. Without a
pipeline, training holds them so, too. In a pipeline it holds those of each stage
(`pipeline/stages.py`): then a state is rearranged when it is restored, imported or saved. So a run
goes on with any number of stages.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from hcp_jax.models.transformer import abstract_model, init_params
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.pipeline.stages import Stages, stage_params, stage_shardings, whole_params
from hcp_jax.train.config import TrainConfig
from hcp_jax.train.optimizer import make_optimizer
from hcp_jax.train.sharding import check_divides, optimizer_shardings
from hcp_jax.train.step import TrainState, abstract_state, sharded_state

AXIS = "pp"
"""The mesh axis of the stages."""


class StateForm:
    """How a run holds its state on the devices, and how checkpoints store it.

    Args:
        config: the run.
        cp: the context parallelism on the run's mesh; of one stage, in a pipeline.

    Attributes:
        trained: shapes, dtypes and shardings of the state that training holds.
        stored: those of the state in checkpoints.

    Raises:
        ValueError: if tp or the stages cannot cut the model.
    """

    trained: TrainState
    stored: TrainState

    def __init__(self, config: TrainConfig, cp: ContextParallel):
        self._model = config.model
        self._optimizer = make_optimizer(config.optimizer, config.steps)
        parallel = config.parallel
        if parallel.pp == 1:
            self._stages = None
            abstract = abstract_state(config.model, self._optimizer, cp, fsdp=parallel.fsdp)
            self.stored = self.trained = abstract
            return
        check_divides(config.model, cp)
        self._stages = stages = Stages(config.model, parallel.pp, parallel.virtual_stages)
        shapes = abstract_model(config.model)[1]
        shardings = stage_shardings(stages, cp, shapes, axis=AXIS, fsdp=parallel.fsdp)
        staged = jax.eval_shape(functools.partial(stage_params, stages), shapes)
        self.trained = self._sharded(staged, shardings)
        shardings = jax.tree_util.tree_map_with_path(_unstaged, shapes, shardings)
        self.stored = self._sharded(shapes, shardings)

    @property
    def num_params(self) -> int:
        """Number of parameters of the model."""
        return sum(x.size for x in jax.tree.leaves(self.stored.params))

    def initial(self, seed: int) -> TrainState:
        """Return a new state with random parameters.

        They depend on the seed alone; rounding may differ with the mesh in the last bit.
        """

        def init(key: jax.Array) -> TrainState:
            params = init_params(self._model, key)
            return self._cut(self._begun(params))

        return self._jitted(init, self.trained, jax.random.key(seed))

    def begun(self, params: Any) -> TrainState:
        """Return the state before the first step.

        Args:
            params: as `stored` has them.
        """
        # A copy of the parameters is needed only where they are rearranged.
        donate = 0 if self._stages is None else ()
        shardings = jax.tree.map(lambda x: x.sharding, self.trained)
        begin = jax.jit(
            lambda params: self._cut(self._begun(params)),
            donate_argnums=donate,
            out_shardings=shardings,
        )
        state: TrainState = begin(params)
        return state

    def take(self, state: TrainState) -> TrainState:
        """Return a stored state as training holds it; in a pipeline, a copy."""
        return state if self._stages is None else self._jitted(self._cut, self.trained, state)

    def give(self, state: TrainState) -> TrainState:
        """Return the state of training as checkpoints store it; in a pipeline, a copy."""
        if self._stages is None:
            return state
        stages = self._stages
        join = functools.partial(self._rearranged, functools.partial(whole_params, stages))
        return self._jitted(join, self.stored, state)

    def _begun(self, params: Any) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), params, self._optimizer.init(params))

    def _cut(self, state: TrainState) -> TrainState:
        if self._stages is None:
            return state
        return self._rearranged(functools.partial(stage_params, self._stages), state)

    def _rearranged(self, rearrange: Any, state: TrainState) -> TrainState:
        """Apply `stage_params` or `whole_params` to the parameters and to each of their moments."""

        def like_params(x: Any) -> bool:
            return isinstance(x, dict) and x.keys() == state.params.keys()

        opt_state = jax.tree.map(
            lambda x: rearrange(x) if like_params(x) else x, state.opt_state, is_leaf=like_params
        )
        return TrainState(state.step, rearrange(state.params), opt_state)

    def _sharded(self, params: Any, shardings: Any) -> TrainState:
        of_state = optimizer_shardings(params, self._optimizer, shardings)
        return sharded_state(params, self._optimizer, (shardings, of_state))

    def _jitted(self, function: Any, like: TrainState, *args: Any) -> TrainState:
        shardings = jax.tree.map(lambda x: x.sharding, like)
        state: TrainState = jax.jit(function, out_shardings=shardings)(*args)
        return state


def _unstaged(path: Any, shape: Any, staged: NamedSharding) -> NamedSharding:
    """Return the sharding of a stored parameter; stages cut its layers, or else another dim."""
    if path[0].key != "layers":
        return staged
    spec, size = staged.spec, staged.mesh.shape[AXIS]
    dims: list[Any] = [None, *spec[3:], *[None] * (shape.ndim + 2 - len(spec))]
    fits = [d for d, n in enumerate(shape.shape) if dims[d] is None and n % size == 0]
    if fits:
        dims[fits[0]] = AXIS
    return NamedSharding(staged.mesh, PartitionSpec(*dims))
