"""Compile the programs that a run needs, and make its steps with them.

A step is one or more microbatches. Each is computed by the program of its key, which adds to sums;
one update ends the step:

    sums = zeros()
    sums = programs[key](params, sums, batch)      for every microbatch
    state, metrics = update(state, sums)

A run whose steps are all one microbatch has one program, which does all of this at once: nothing
has to be written to memory between the sums and the update.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress

from hcp_jax.models.loss_terms import mean_names
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.train.batch import Batch, PlacedMicrobatch
from hcp_jax.train.config import TrainConfig
from hcp_jax.train.portions import (
    Sums,
    abstract_sums,
    add_on_each_device,
    weight_on_each_device,
    whole_gradients,
)
from hcp_jax.train.sharding import jit_on_mesh
from hcp_jax.train.step import (
    TrainState,
    make_train_step,
    make_update,
    summed_gradients,
)


class Menu:
    """The compiled programs of a run, by key; call `compile` once, then `step`.

    Args:
        config: the run.
        contexts: the context parallelism of each program; they differ in their groups only.
        one_program: whether every step is exactly one microbatch, and so one call of the only
            program; `config.accumulation` says in how many portions it is computed.
        name: returns a key as text for errors.

    Attributes:
        contexts: as given; its keys are the keys of the programs.
        programs: the compiled programs: `(params, sums, batch) -> sums`, or with `one_program`
            `(state, batch) -> (state, metrics)`.
        zeros: compiled `() -> sums` that begins a step; None with `one_program`.
        update: compiled `(state, sums) -> (state, metrics)` that ends a step; as `zeros`.
        used: how many microbatches each program has computed.
    """

    def __init__(
        self,
        config: TrainConfig,
        contexts: Mapping[Any, ContextParallel],
        *,
        one_program: bool = False,
        name: Callable[[Any], str] = str,
    ):
        self._config, self.contexts, self._name = config, contexts, name
        self._one_program = one_program
        self.programs: dict[Any, Any] = {}
        self.used: Counter[Any] = Counter()
        self.zeros: Any = None
        self.update: Any = None

    def compile(
        self,
        abstract: TrainState,
        example: Callable[[Any], Batch],
        console: rich.console.Console,
    ) -> int:
        """Compile all programs; return the bytes per device that the largest needs.

        Args:
            abstract: shapes, dtypes and shardings of the state.
            example: returns a batch for a key; all its batches have the same shapes.
            console: where progress is shown.
        """
        keys = self._tracked(console)
        if self._one_program:
            for key in keys:
                step = self._whole_step(self.contexts[key])
                self.programs[key] = step.lower(abstract, example(key)).compile()
            return max(map(_bytes, self.programs.values()))
        like = self._compile_ends(abstract)
        for key in keys:
            add = make_accumulate(self._config, self.contexts[key], abstract.params)
            self.programs[key] = add.lower(abstract.params, like, example(key)).compile()
        return self._most(abstract, max(map(_bytes, self.programs.values())))

    def step(
        self, state: TrainState, microbatches: Sequence[PlacedMicrobatch]
    ) -> tuple[TrainState, dict[str, Any]]:
        """Make a step; return the new state (the old one is donated) and metrics on the devices.

        Raises:
            RuntimeError: if a microbatch has no compiled program; says why.
        """
        self.used.update(microbatch.key for microbatch in microbatches)
        made: tuple[TrainState, dict[str, Any]]
        if self._one_program:
            (microbatch,) = microbatches
            made = self._run(microbatch, state)
        else:
            made = self.update(state, self.sums(state.params, microbatches))
        return made

    def sums(self, params: Any, microbatches: Sequence[PlacedMicrobatch]) -> Sums:
        """Return the sums of a step, which its update would divide; not with `one_program`."""
        sums = self.zeros()
        for microbatch in microbatches:
            sums = self.add(params, sums, microbatch)
        return sums

    def add(self, params: Any, sums: Sums, microbatch: PlacedMicrobatch) -> Sums:
        """Return the sums with those of a microbatch added; the given sums are donated."""
        added: Sums = self._run(microbatch, params, sums)
        return added

    def _tracked(self, console: rich.console.Console) -> Iterable[Any]:
        """Return the keys; iterating over them shows progress."""
        return rich.progress.track(
            self.contexts,
            "compiling the menu",
            console=console,
            transient=True,
            disable=len(self.contexts) == 1,
        )

    def _most(self, abstract: TrainState, programs: int) -> int:
        """Return the bytes per device that the largest of the programs and the update needs."""
        # The optimizer's state is no argument of programs, but it is on the devices, too.
        besides = sum(map(_bytes_per_device, jax.tree.leaves(abstract.opt_state)))
        return max(_bytes(self.update), besides + programs)

    def _run(self, microbatch: PlacedMicrobatch, *args: Any) -> Any:
        key, arrays = microbatch
        return self._call(key, lambda: self.programs[key](*args, arrays))

    def _call(self, key: Any, run: Callable[[], Any]) -> Any:
        """Run programs of a key; an error of compiled programs says why there is no such one."""
        try:
            return run()
        except (KeyError, TypeError, ValueError) as error:
            cause = str(error) if key in self.programs else "it is not on the menu."
            raise RuntimeError(
                f"a microbatch of {self._name(key)} has no compiled program, and nothing is "
                f"compiled once training runs: {cause}"
            ) from error

    def _whole_step(self, cp: ContextParallel) -> jax.stages.Wrapped:
        config = self._config
        return make_train_step(
            config.model,
            config.optimizer,
            config.steps,
            cp,
            fsdp=config.parallel.fsdp,
            accumulation=config.accumulation,
        )

    def _compile_ends(self, abstract: TrainState) -> Sums:
        """Compile what begins and ends a step; return shapes and shardings of the sums."""
        cp = next(iter(self.contexts.values()))
        fsdp, means = self._config.parallel.fsdp, mean_names(self._config.model)
        like = abstract_sums(abstract.params, cp, means, fsdp=fsdp)

        def zeros() -> Sums:
            sums: Sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
            return sums

        update = make_update(self._config.optimizer, self._config.steps, cp, fsdp=fsdp)
        self.zeros = jit_on_mesh(zeros, cp, (), like).lower().compile()
        jitted = jit_on_mesh(update, cp, (abstract, like), (abstract, None), donate=0)
        self.update = jitted.lower(abstract, like).compile()
        return like


def make_accumulate(config: TrainConfig, cp: ContextParallel, params: Any) -> jax.stages.Wrapped:
    """Return a jitted function `(params, sums, batch) -> sums` that adds a microbatch.

    The given sums are donated.

    Args:
        config: the run.
        cp: the context parallelism of the microbatch.
        params: shapes and shardings of the parameters.
    """
    gradients = summed_gradients(config.model, params, cp)

    def accumulate(params: Any, sums: Sums, batch: Batch) -> Sums:
        # No collective sums the weights: nothing would say if it comes before those of attention,
        # and devices of several CPU processes that disagreed would wait for each other.
        found = gradients(params, batch, 1.0)
        found = found._replace(weight=weight_on_each_device(batch, cp))
        total: Sums = jax.tree.map(jnp.add, sums, found)
        return total

    fsdp = config.parallel.fsdp
    whole = whole_gradients(cp, fsdp=fsdp)
    add = add_on_each_device(gradients, cp) if whole else accumulate
    like = abstract_sums(params, cp, mean_names(config.model), fsdp=fsdp)
    return jit_on_mesh(add, cp, (params, like, None), like, donate=1)


def _bytes(compiled: Any) -> int:
    memory = compiled.memory_analysis()
    return int(memory.argument_size_in_bytes + memory.temp_size_in_bytes)


def _bytes_per_device(x: jax.ShapeDtypeStruct) -> int:
    shape = x.sharding.shard_shape(x.shape)
    return int(np.prod(shape, dtype=np.int64)) * int(x.dtype.itemsize)
