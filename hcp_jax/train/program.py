"""Define what the training loop runs: a `Program` compiles, yields batches and makes steps.

The loop also saves and restores the state of its data. `FixedProgram` has one compiled step, for
batches that are all alike; `dynamic.py` has the other program.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Int64

from hcp_jax.parallel.context import ContextParallel
from hcp_jax.train.config import TrainConfig
from hcp_jax.train.data.batches import describe_packing, make_batches, packing_metrics
from hcp_jax.train.data.corpus import Corpus
from hcp_jax.train.metrics import traffic
from hcp_jax.train.step import TrainState, make_train_step


class Program(Protocol):
    """Batches and compiled programs: call `compile` once, then `next_batch` and `step` in turn."""

    def describe(self, num_params: int) -> list[str]:
        """Return lines for the log: what a step trains on, and what devices send for it.

        Args:
            num_params: number of parameters of the model.
        """
        ...

    def compile(self, abstract: TrainState) -> int:
        """Compile all that training will run; return the bytes that it needs per device.

        Args:
            abstract: shapes, dtypes and shardings of the state.
        """
        ...

    def next_batch(self) -> Any:
        """Return the next batch, on the devices or on its way there."""
        ...

    def step(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        """Make a step; return the new state (the old one is donated) and metrics on the devices."""
        ...

    def documents(self, batch: Any) -> Sequence[int]:
        """Return the numbers, from 0, of the documents in a batch."""
        ...

    def data_state(self) -> dict[str, Any]:
        """Return the state of the data after the last `next_batch`, in plain values for JSON."""
        ...

    def restore_data(self, state: dict[str, Any]) -> None:
        """Restore the state of the data; call this before `compile`."""
        ...

    def summary(self) -> list[str]:
        """Return lines about the steps that were made, for the end of the log."""
        ...

    def close(self) -> None:
        """Stop the threads in the background."""
        ...


class PlacedBatch(NamedTuple):
    """A batch on the devices.

    Attributes:
        arrays: from `ContextParallel.shard_batch`.
        documents: the numbers of its documents.
        facts: how it is packed, for the metrics of its step; see `packing_metrics`.
    """

    arrays: dict[str, Any]
    documents: Int64[np.ndarray, "d"]
    facts: dict[str, float]


class FixedProgram:
    """One compiled step on one mesh, for batches of equal streams.

    Args:
        config: the run.
        cp: the context parallelism on the run's mesh.
        corpus: the text.
    """

    def __init__(self, config: TrainConfig, cp: ContextParallel, corpus: Corpus):
        self._config, self._cp, self._corpus = config, cp, corpus
        self._batches = make_batches(
            corpus,
            batch_size=config.batch_size,
            seq_len=config.seq_len,
            seed=config.seed,
            mask=config.model.mask,
            prefetch=config.data.prefetch,
            put=self._put,
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
        """Return lines about the streams of a step, and about what each kind of layer sends."""
        config = self._config
        sent = traffic.describe(
            self._cp,
            config.model,
            config.batch_size,
            config.seq_len,
            num_params,
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

    def compile(self, abstract: TrainState) -> int:
        """Compile the step for the shapes of the first batch; return its bytes per device."""
        self._first = next(self._batches)
        self._step = self._step.lower(abstract, self._first.arrays).compile()
        memory = self._step.memory_analysis()
        return int(memory.argument_size_in_bytes + memory.temp_size_in_bytes)

    def next_batch(self) -> PlacedBatch:
        """Return the next batch; a thread has read it and put it on the devices."""
        if self._first is not None:
            batch, self._first = self._first, None
            return batch
        found: PlacedBatch = next(self._batches)
        return found

    def step(self, state: TrainState, batch: PlacedBatch) -> tuple[TrainState, dict[str, Any]]:
        """Make a step (`make_train_step`); its metrics include `PlacedBatch.facts`."""
        state, metrics = self._step(state, batch.arrays)
        return state, metrics | batch.facts

    def documents(self, batch: PlacedBatch) -> Sequence[int]:
        """Return the numbers of the documents in a batch."""
        numbers: list[int] = batch.documents.tolist()
        return numbers

    def data_state(self) -> dict[str, Any]:
        """Return the state of the data pipeline."""
        state: dict[str, Any] = self._batches.get_state()
        return state

    def restore_data(self, state: dict[str, Any]) -> None:
        """Restore the state of the data pipeline.

        Raises:
            ValueError: if the state is from a run with dynamic context parallelism.
        """
        if "window" in state:
            raise ValueError(
                "this checkpoint was written with parallel.dynamic enabled. Enable it to resume, "
                "or start a new run."
            )
        self._batches.set_state(state)

    def summary(self) -> list[str]:
        """Return nothing: all steps are alike."""
        return []

    def close(self) -> None:
        """Stop the thread that prepares batches."""
        self._batches.close()

    def _put(self, batch: dict[str, Any]) -> PlacedBatch:
        refs = batch["tokens"].places
        begins = refs[(batch["positions"] == 0) & (refs > 0)]
        documents = self._corpus.documents_at(begins)
        facts = packing_metrics(self._corpus, batch)
        return PlacedBatch(self._cp.shard_batch(batch), np.unique(documents), facts)
