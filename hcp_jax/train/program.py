"""What the loop runs: batches and the compiled programs that make a step of them.

The loop knows of a `Program` only this: it compiles, it yields batches, it makes steps, and it can
say where its data stand. `FixedProgram` has one compiled step for batches that are all alike.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from hcp_jax.parallel.context import ContextParallel
from hcp_jax.train import data
from hcp_jax.train.config import TrainConfig
from hcp_jax.train.metrics import traffic
from hcp_jax.train.step import TrainState, make_train_step


class Program(Protocol):
    """Batches and compiled programs; steps are made in the order `compile`, then next and step."""

    def describe(self, num_params: int) -> list[str]:
        """What a step is made of and what devices send for it, in lines for a person.

        Args:
            num_params: parameters of the model.
        """

    def compile(self, abstract: TrainState) -> int:
        """Compiles all that training will run; returns the bytes that it needs per device.

        Args:
            abstract: shapes, dtypes and shardings of the state.
        """

    def next_batch(self) -> Any:
        """The next batch, on the devices or on its way there."""

    def step(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        """Makes a step: the state after it (the one given is gone), and metrics on the devices."""

    def documents(self, batch: Any) -> Sequence[int]:
        """The numbers, from 0, of the documents that a batch has tokens of."""

    def data_state(self) -> dict[str, Any]:
        """Where the data stand after the last `next_batch`, in plain values for JSON."""

    def restore_data(self, state: dict[str, Any]) -> None:
        """Puts the data where `state` was taken; before `compile`."""

    def summary(self) -> list[str]:
        """What is to be told of the steps that were made, in lines for a person."""

    def close(self) -> None:
        """Ends what runs in the background."""


class PlacedBatch(NamedTuple):
    """A batch on the devices.

    Attributes:
        arrays: as `ContextParallel.shard_batch` leaves them.
        documents: the numbers of the documents that are in it.
        facts: how it is packed, for its metrics; see `data.packing_metrics`.
    """

    arrays: dict[str, Any]
    documents: np.ndarray
    facts: dict[str, float]


class FixedProgram:
    """One compiled step on one mesh, for batches of equal streams.

    Args:
        config: the run.
        cp: its mesh and what the axes do.
        corpus: the text.
    """

    def __init__(self, config: TrainConfig, cp: ContextParallel, corpus: data.Corpus):
        self._config, self._cp, self._corpus = config, cp, corpus
        self._batches = data.make_batches(
            corpus,
            batch_size=config.batch_size,
            seq_len=config.seq_len,
            seed=config.seed,
            mask=config.model.mask,
            prefetch=config.data.prefetch,
            place=self._place,
            packing=config.data.packing,
        )
        self._step: Any = make_train_step(
            config.model,
            config.optimizer,
            config.steps,
            cp,
            fsdp=config.parallel.fsdp,
            accumulation=config.accumulation,
        )
        self._first: PlacedBatch | None = None

    def describe(self, num_params: int) -> list[str]:
        """The streams of a step, and what each kind of layer sends."""
        config = self._config
        sent = traffic.describe(
            self._cp,
            config.model,
            config.batch_size,
            config.seq_len,
            num_params,
            fsdp=config.parallel.fsdp,
        )
        portions = f" in {config.accumulation} microbatches" if config.accumulation > 1 else ""
        return [
            data.describe_packing(
                self._corpus,
                seq_len=config.seq_len,
                seed=config.seed,
                packing=config.data.packing,
            ),
            f"step: {config.batch_size} streams of {config.seq_len:,} tokens{portions}",
            "each device sends per step:",
            *(f"  {line}" for line in sent),
        ]

    def compile(self, abstract: TrainState) -> int:
        """Compiles the step, for batches like the first."""
        self._first = next(self._batches)
        self._step = self._step.lower(abstract, self._first.arrays).compile()
        memory = self._step.memory_analysis()
        return memory.argument_size_in_bytes + memory.temp_size_in_bytes

    def next_batch(self) -> PlacedBatch:
        """The next batch; a thread has read it and put it on the devices."""
        if self._first is not None:
            batch, self._first = self._first, None
            return batch
        return next(self._batches)

    def step(self, state: TrainState, batch: PlacedBatch) -> tuple[TrainState, dict[str, Any]]:
        """See `make_train_step`; `PlacedBatch.facts` are metrics, too."""
        state, metrics = self._step(state, batch.arrays)
        return state, metrics | batch.facts

    def documents(self, batch: PlacedBatch) -> Sequence[int]:
        """The numbers of the documents in a batch."""
        return batch.documents.tolist()

    def data_state(self) -> dict[str, Any]:
        """The state of the pipeline."""
        return self._batches.get_state()

    def restore_data(self, state: dict[str, Any]) -> None:
        """Puts the pipeline there.

        Raises:
            ValueError: if the state is of a run with dynamic context parallelism.
        """
        if "window" in state:
            raise ValueError(
                "the checkpoint is of a run with parallel.dynamic, which knows no streams to go on "
                "in; go on with parallel.dynamic.enabled, or begin a new run."
            )
        self._batches.set_state(state)

    def summary(self) -> list[str]:
        """Nothing: all steps are alike."""
        return []

    def close(self) -> None:
        """Ends the thread that prepares batches."""
        self._batches.close()

    def _place(self, batch: dict[str, Any]) -> PlacedBatch:
        places = batch["tokens"].places
        begins = places[(batch["positions"] == 0) & (places > 0)]
        documents = self._corpus.documents_at(begins)
        facts = data.packing_metrics(self._corpus, batch)
        return PlacedBatch(self._cp.shard_batch(batch), np.unique(documents), facts)
