"""Make steps and evaluate in a pipeline: the menu of a run whose layers are cut over stages.

A step is one flush: all its microbatches pass the stages in ticks (`pipeline/ticks.py`), each
device sums its own gradients, and one update reduces them and ends the step. All microbatches of a
step have the same program, the one that serves the widest of them.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import rich.console
from jaxtyping import Array, Float64

from hcp_jax.parallel.context import ContextParallel
from hcp_jax.pipeline.carry import StepSums
from hcp_jax.pipeline.forward import ForwardPipeline
from hcp_jax.pipeline.stages import Stages
from hcp_jax.pipeline.ticks import Pipeline
from hcp_jax.train.batch import Batch, PlacedMicrobatch
from hcp_jax.train.config import TrainConfig
from hcp_jax.train.evaluation import Evaluator, HeldOut
from hcp_jax.train.losses import nonzero, values
from hcp_jax.train.menu import Menu
from hcp_jax.train.optimizer import make_optimizer, make_schedule
from hcp_jax.train.sharding import jit_on_mesh
from hcp_jax.train.state_form import AXIS
from hcp_jax.train.step import TrainState, apply_gradients


class PipelineMenu(Menu):
    """The compiled pipelines of a run, by key; see `Menu`.

    Attributes:
        programs: a `Pipeline` for each key: its programs begin the sums and run the ticks.
        update: compiled `(state, sums of each device) -> (state, metrics)`.

    Raises:
        ValueError: if the stages cannot cut the model.
        NotImplementedError: for what pipelines do not support.
    """

    def __init__(
        self,
        config: TrainConfig,
        contexts: Mapping[Any, ContextParallel],
        *,
        name: Callable[[Any], str] = str,
    ):
        super().__init__(config, contexts, name=name)
        self.programs = {key: make_pipeline(config, cp) for key, cp in contexts.items()}

    def compile(
        self,
        abstract: TrainState,
        example: Callable[[Any], Batch],
        console: rich.console.Console,
    ) -> int:
        """Compile all programs; return the bytes per device that the largest needs."""
        compiled = [
            self.programs[key].compile(abstract.params, example(key))
            for key in self._tracked(console)
        ]
        like, most = compiled[0][0], max(size for _, size in compiled)
        pipeline = next(iter(self.programs.values()))
        self.update = make_update(self._config, pipeline, abstract, like).compile()
        return self._most(abstract, most)

    def add(self, params: Any, sums: Any, microbatch: PlacedMicrobatch) -> Any:
        """Refuse: microbatches pass the stages together."""
        raise NotImplementedError("a pipeline sums the microbatches of a step together: call sums.")

    def sums(self, params: Any, microbatches: Sequence[PlacedMicrobatch]) -> Any:
        """Return the sums of a step of each device, which its update reduces and divides.

        Raises:
            RuntimeError: if there is no compiled program for all of them.
        """
        key = microbatches[0].key
        arrays = [microbatch.arrays for microbatch in microbatches]
        return self._call(key, lambda: self.programs[key].unreduced(params, arrays))


def make_pipeline(config: TrainConfig, cp: ContextParallel) -> Pipeline:
    """Return the pipeline of a run; its programs compile when they are called.

    Args:
        config: the run.
        cp: the context parallelism of a stage.
    """
    parallel = config.parallel
    return Pipeline(
        config.model,
        cp,
        axis=AXIS,
        virtual_stages=parallel.virtual_stages,
        fsdp=parallel.fsdp,
    )


def make_update(
    config: TrainConfig, pipeline: Pipeline, abstract: TrainState, like: StepSums
) -> jax.stages.Lowered:
    """Return the lowered function `(state, sums) -> (state, metrics)` that ends a step.

    Args:
        config: the run.
        pipeline: what the sums are from; it reduces them.
        abstract: shapes, dtypes and shardings of the state.
        like: those of the sums.
    """
    optimizer = make_optimizer(config.optimizer, config.steps)
    schedule = make_schedule(config.optimizer, config.steps)

    def update(state: TrainState, sums: StepSums) -> tuple[TrainState, dict[str, Array]]:
        grads, loss, tokens, means = pipeline.reduced(sums)
        weight = nonzero(tokens)
        grads, loss = jax.tree.map(lambda x: x / weight, (grads, loss))
        decay = config.optimizer.weight_decay
        state, metrics = apply_gradients(state, grads, loss, tokens, optimizer, schedule, decay)
        return state, metrics | values(means)

    jitted = jit_on_mesh(update, pipeline.cp, (abstract, like), (abstract, None), donate=(0, 1))
    return jitted.lower(abstract, like)


class PipelineEvaluator(Evaluator):
    """Evaluates a model in a pipeline, forward only; see `Evaluator`.

    Args:
        config: the run.
        text: the held-out text.
    """

    def __init__(self, config: TrainConfig, text: HeldOut):
        self._config = config
        super().__init__(config.model, text, seq_len=config.seq_len)

    def compile(self, params: Any) -> int:
        """Compile the programs; return the bytes per device, beside arguments, of the largest."""
        return max(
            program.compile_forward(params, self._text.put(self._numbers(key)[0]))
            for key, program in self._programs.items()
        )

    def _program(self, cp: ContextParallel) -> ForwardPipeline:
        parallel = self._config.parallel
        return ForwardPipeline(
            self._model,
            cp,
            self.borders[:-1],
            axis=AXIS,
            virtual_stages=parallel.virtual_stages,
            fsdp=parallel.fsdp,
        )

    def _each(self, params: Any) -> Iterator[list[Float64[np.ndarray, "S n"]]]:
        for key, program in self._programs.items():
            numbers = self._numbers(key)
            put = functools.partial(_put, self._text, numbers)
            found = program.by_bin(params, len(numbers), put)
            for number, pair in zip(numbers, found, strict=True):
                yield self._of_streams(number, pair)

    def _numbers(self, key: Any) -> list[int]:
        return [n for n in range(len(self._text)) if self._text.key(n) == key]


def _put(text: HeldOut, numbers: list[int], number: int) -> Batch:
    return text.put(numbers[number])


def make_evaluator(config: TrainConfig, text: HeldOut) -> Evaluator:
    """Return the evaluator of a run on held-out text, in a pipeline if the run has one."""
    if config.parallel.pp > 1:
        return PipelineEvaluator(config, text)
    return Evaluator(config.model, text, seq_len=config.seq_len)


def describe_stages(config: TrainConfig) -> list[str]:
    """Return a line about the stages of a run's pipeline, for the log; none if it has none."""
    parallel = config.parallel
    if parallel.pp == 1:
        return []
    stages = Stages(config.model, parallel.pp, parallel.virtual_stages)
    chunks = f"{stages.virtual_stages} chunks of " if stages.virtual_stages > 1 else ""
    layers = stages.turns * len(config.model.plan.stacks)
    return [
        f"pipeline: {stages.num_stages} stages of {parallel.devices_per_stage} devices, each "
        f"with {chunks}{layers} layer{'s' * (layers > 1)}"
    ]


def make_menu(
    config: TrainConfig,
    contexts: Mapping[Any, ContextParallel],
    *,
    one_program: bool = False,
    name: Callable[[Any], str] = str,
) -> Menu:
    """Return the menu of a run, of pipelines if its layers are cut over stages; see `Menu`."""
    if config.parallel.pp > 1:
        return PipelineMenu(config, contexts, name=name)
    return Menu(config, contexts, one_program=one_program, name=name)
