"""Define what the training loop runs: batches and compiled programs that make steps of them.

`Program` prefetches, compiles, restores and makes steps, for every kind of run. Its kinds say where
the microbatches of a step come from, and which program of the menu computes each: `FixedProgram`
has one program, for batches that are all alike; `dynamic.py` has one for each grouping.
"""

import abc
import functools
from typing import Any

import grain
import numpy as np
import rich.console

from hcp_jax.parallel.context import ContextParallel
from hcp_jax.train.batch import Batch, PlacedMicrobatch, PlacedStep
from hcp_jax.train.config import TrainConfig
from hcp_jax.train.data.batches import describe_packing, packed_batches, packing_metrics, prefetched
from hcp_jax.train.data.corpus import Corpus
from hcp_jax.train.evaluation import HeldOut, HeldOutStreams
from hcp_jax.train.menu import Menu
from hcp_jax.train.metrics import traffic
from hcp_jax.train.pipelined import make_menu
from hcp_jax.train.portions import portion
from hcp_jax.train.state_form import StateForm
from hcp_jax.train.step import TrainState, visible_pairs


class Program(abc.ABC):
    """Batches and compiled programs: call `compile` once, then `next_batch` and `step` in turn.

    Args:
        config: the run.
        menu: the programs.
        steps: the steps, each put on the devices when it is asked for.
        console: where the progress of compiling is shown.
    """

    def __init__(
        self,
        config: TrainConfig,
        menu: Menu,
        steps: grain.IterDataset[PlacedStep],
        console: rich.console.Console,
    ):
        self._config, self._console = config, console
        self.menu = menu
        self._steps = iter(prefetched(steps, config.data.prefetch))

    @functools.cached_property
    def form(self) -> StateForm:
        """How this run holds its state, and how checkpoints store it."""
        return StateForm(self._config, next(iter(self.menu.contexts.values())))

    @abc.abstractmethod
    def describe(self, num_params: int) -> list[str]:
        """Return lines for the log: what a step trains on, and what devices send for it.

        Args:
            num_params: number of parameters of the model.
        """

    @abc.abstractmethod
    def held_out(self, corpus: Corpus) -> HeldOut:
        """Return text to evaluate on, as microbatches of this kind of run."""

    @abc.abstractmethod
    def example(self, key: Any) -> Batch:
        """Return a batch on the devices to compile the program of `key` with."""

    def compile(self, abstract: TrainState) -> int:
        """Compile all that training will run; return the bytes that it needs per device.

        Args:
            abstract: shapes, dtypes and shardings of the state.
        """
        return self.menu.compile(abstract, self.example, self._console)

    def next_batch(self) -> PlacedStep:
        """Return the next step; a thread has read it and put it on the devices."""
        found: PlacedStep = next(self._steps)
        return found

    def step(self, state: TrainState, batch: PlacedStep) -> tuple[TrainState, dict[str, Any]]:
        """Make a step; return the new state (the old one is donated) and metrics.

        The metrics are those of `apply_gradients`, on the devices, and `PlacedStep.facts`.

        Raises:
            RuntimeError: if a microbatch has no compiled program; says why.
        """
        state, metrics = self.menu.step(state, batch.microbatches)
        return state, metrics | batch.facts

    def data_state(self) -> dict[str, Any]:
        """Return the state of the data after the last `next_batch`, in plain values for JSON."""
        state: dict[str, Any] = self._steps.get_state()
        return state

    def restore_data(self, state: dict[str, Any]) -> None:
        """Restore the state of the data; call this before `compile`.

        Raises:
            ValueError: if the state is from other data, or from the other kind of run.
        """
        self._steps.set_state(state)

    def summary(self) -> list[str]:
        """Return lines about the steps that were made, for the end of the log."""
        return []

    def close(self) -> None:
        """Stop the thread that prepares steps."""
        self._steps.close()


class FixedProgram(Program):
    """One program on one mesh, for batches of equal streams.

    In a pipeline, the portions of a batch (`accumulation`) are microbatches of their own.

    Args:
        config: the run.
        cp: the context parallelism on the run's mesh.
        corpus: the text.
        console: as for `Program`.
    """

    _KEY = "streams"

    def __init__(
        self,
        config: TrainConfig,
        cp: ContextParallel,
        corpus: Corpus,
        console: rich.console.Console,
    ):
        self._cp, self._corpus = cp, corpus
        self._first: PlacedStep | None = None
        batches = packed_batches(
            corpus,
            batch_size=config.batch_size,
            seq_len=config.seq_len,
            seed=config.seed,
            mask=config.model.packed_mask,
            packing=config.data.packing,
            mtp_depths=config.model.mtp_depths,
        )
        menu = make_menu(config, {self._KEY: cp}, one_program=True)
        super().__init__(config, menu, batches.map(self._put), console)

    def describe(self, num_params: int) -> list[str]:
        """Return lines about the streams of a step, and about what each kind of layer sends."""
        config = self._config
        sent = traffic.describe(
            self._cp,
            config.model,
            config.batch_size,
            config.seq_len,
            num_params // config.parallel.pp,
            fsdp=config.parallel.fsdp,
        )
        microbatches = f" in {config.accumulation} microbatches" if config.accumulation > 1 else ""
        return [
            describe_packing(
                self._corpus,
                seq_len=config.seq_len,
                seed=config.seed,
                packing=config.data.packing,
            ),
            f"step: {config.batch_size} streams of {config.seq_len:,} tokens{microbatches}",
            "each device sends per step:",
            *(f"  {line}" for line in sent),
        ]

    def held_out(self, corpus: Corpus) -> HeldOut:
        """Return text to evaluate on, with the batch size of a microbatch."""
        config, dp = self._config, self._cp.axis_size(self._cp.dp)
        return HeldOutStreams(
            corpus,
            self._cp,
            seq_len=config.seq_len,
            batch_size=max(1, config.batch_size // config.accumulation // dp) * dp,
            tokens=config.eval.tokens,
            mask=config.model.packed_mask,
        )

    def example(self, key: Any) -> Batch:
        """Return the first batch, which `next_batch` then returns, too."""
        self._first = super().next_batch()
        return self._first.microbatches[0].arrays

    def next_batch(self) -> PlacedStep:
        """Return the next step; a thread has read it and put it on the devices."""
        if self._first is None:
            return super().next_batch()
        batch, self._first = self._first, None
        return batch

    def restore_data(self, state: dict[str, Any]) -> None:
        """Restore the state of the data; see `Program.restore_data`."""
        if "window" in state:
            raise ValueError(
                "this checkpoint was written with parallel.dynamic enabled. Enable it to resume, "
                "or start a new run."
            )
        super().restore_data(state)

    def _put(self, batch: Batch) -> PlacedStep:
        refs = batch["tokens"].places
        begins = refs[(batch["positions"] == 0) & (refs > 0)]
        documents = np.unique(self._corpus.documents_at(begins)).tolist()
        facts = packing_metrics(self._corpus, batch)
        portions = [batch]
        if self._config.parallel.pp > 1:
            number = self._config.accumulation
            portions = [portion(batch, i, number) for i in range(number)]
            facts["pairs"] = visible_pairs(batch, self._config.model)
        arrays: Any = (self._cp.shard_batch(batch) for batch in portions)
        placed = tuple(PlacedMicrobatch(self._KEY, x) for x in arrays)
        return PlacedStep(placed, tuple(documents), facts)
