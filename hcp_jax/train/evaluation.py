"""Evaluate the loss on held-out text, also by the position in a document.

A model that uses long context predicts a token better if more of its document comes before it. So
there is a mean over all tokens, and one for each bin of positions: 0, 1, 2 to 3, 4 to 7, and so on.
A position is the number of tokens of its document that a token sees before itself; after a cut
(`data/corpus.py`) it begins at 0 again.

The result is exact on any mesh: each device sums the losses of its own tokens by row and bin, and
these few numbers are summed over devices in float64 on the host. The text is the same at every
evaluation of every run with the same `seq_len`, for any seed, batch size or mesh, with groups or
without. The loss is cross entropy alone, without `z_loss`.

The uncertainty is a standard error that treats streams as independent samples; the documents of a
group are a stream. Tokens of one document are alike; treating each as a sample would make the error
far too small. If the losses of stream i add up to s_i over c_i tokens, and m is the mean loss over
n streams, the error is

    sqrt( n / (n - 1) · Σ (s_i - m · c_i)² ) / Σ c_i

as for a ratio of two sums (Cochran, Sampling Techniques, 1977, chapter 6).
"""

import abc
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float64, Int32, Int64

from hcp_jax.models.config import ModelConfig
from hcp_jax.models.layers.loss import cross_entropy_by_bin
from hcp_jax.models.transformer import abstract_model
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.sequence.mask import Mask
from hcp_jax.train.batch import Batch
from hcp_jax.train.data.batches import evenly, held_out_batches
from hcp_jax.train.data.corpus import Corpus, open_corpus
from hcp_jax.train.sections import DataConfig, EvalConfig


def open_corpora(
    data: DataConfig, config: EvalConfig, vocab_size: int
) -> tuple[Corpus, Corpus | None]:
    """Return the text to train on, and the text to evaluate on (None without evaluation).

    Args:
        data: where the text comes from.
        config: which text is held out.
        vocab_size: number of ids of the model.

    Raises:
        ValueError: as `open_corpus`; if there are too few documents to hold some out.
    """
    corpus = open_corpus(data, vocab_size)
    if config.every is None:
        return corpus, None
    if config.path is not None:
        try:
            held_out_data = dataclasses.replace(data, path=config.path)
            return corpus, open_corpus(held_out_data, vocab_size)
        except ValueError as error:
            raise ValueError(str(error).replace("data.path", "eval.path")) from None
    number = math.ceil(config.holdout * len(corpus))
    if number >= len(corpus):
        raise ValueError(
            f"eval.holdout={config.holdout} of {len(corpus)} documents leaves none to train on; "
            "give held-out text with eval.path, or a smaller share."
        )
    order = evenly(len(corpus))
    training, held_out = corpus.select(np.sort(order[number:])), corpus.select(order[:number])
    return training, held_out


@dataclasses.dataclass(frozen=True)
class Means:
    """Mean losses of several sets of tokens.

    Attributes:
        loss: nats per token; NaN where there are no tokens.
        stderr: its standard error; NaN where there are fewer than two streams.
        tokens: number of tokens.
    """

    loss: Float64[np.ndarray, "n"]
    stderr: Float64[np.ndarray, "n"]
    tokens: Int64[np.ndarray, "n"]

    @classmethod
    def of(cls, sums: Float64[np.ndarray, "S n"], counts: Float64[np.ndarray, "S n"]) -> "Means":
        """Return the means, from the sums of losses and the numbers of tokens of each stream."""
        total, tokens = sums.sum(axis=0), counts.sum(axis=0)
        streams = (counts > 0).sum(axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            loss = total / tokens
            spread = ((sums - loss * counts) ** 2).sum(axis=0)
            stderr = np.sqrt(streams / (streams - 1) * spread) / tokens
        return cls(loss, np.where(streams > 1, stderr, np.nan), np.rint(tokens).astype(np.int64))


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result of one evaluation.

    Attributes:
        step: number of optimizer steps that the model has made.
        overall: the mean of all tokens; arrays of one element.
        borders: bin i holds the positions from `borders[i]` to `borders[i + 1] - 1`.
        by_position: the mean of each bin.
        seconds: the time that the evaluation took.
    """

    step: int
    overall: Means
    borders: tuple[int, ...]
    by_position: Means
    seconds: float

    @property
    def loss(self) -> float:
        """The mean loss, in nats per token."""
        return float(self.overall.loss[0])

    def to_json(self) -> dict[str, Any]:
        """Return a line of eval.jsonl; None where there is no number."""
        overall, bins = self.overall, self.by_position
        return {
            "step": self.step,
            "loss": _plain(overall.loss)[0],
            "stderr": _plain(overall.stderr)[0],
            "tokens": int(overall.tokens[0]),
            "seconds": self.seconds,
            "positions": list(self.borders),
            "loss_by_position": _plain(bins.loss),
            "stderr_by_position": _plain(bins.stderr),
            "tokens_by_position": bins.tokens.tolist(),
        }

    def __str__(self) -> str:
        error = self.overall.stderr[0]
        spread = "" if math.isnan(error) else f" ± {error:.4f}"
        return (
            f"held-out loss {self.loss:.4f}{spread} after {self.step} steps "
            f"({self.overall.tokens[0]:,} tokens, {self.seconds:.1f} s)"
        )


class HeldOut(abc.ABC):
    """Held-out text as microbatches, in the order in which they are evaluated.

    Attributes:
        contexts: the context parallelism of each program, by the key of its microbatches.
    """

    contexts: Mapping[Any, ContextParallel]

    @abc.abstractmethod
    def __len__(self) -> int:
        """Return the number of microbatches."""

    @abc.abstractmethod
    def key(self, number: int) -> Any:
        """Return the key of a microbatch's program."""

    @abc.abstractmethod
    def put(self, number: int) -> Batch:
        """Read a microbatch and put it on the devices."""

    @abc.abstractmethod
    def streams(self, number: int) -> Int64[np.ndarray, "D"]:
        """Return the stream, from 0, that each device of dp and cp holds tokens of."""


class HeldOutStreams(HeldOut):
    """Held-out text packed into streams of equal length.

    Args:
        held_out: the text.
        cp: the context parallelism of the training.
        seq_len: T, tokens per stream.
        batch_size: streams per batch; a multiple of dp.
        tokens: see `EvalConfig`.
        mask: `ModelConfig.packed_mask`.
    """

    _KEY = "streams"

    def __init__(
        self,
        held_out: Corpus,
        cp: ContextParallel,
        *,
        seq_len: int,
        batch_size: int,
        tokens: int | None,
        mask: Callable[[Int32[np.ndarray, "B T"]], Mask],
    ):
        self._cp = cp
        self.contexts = {self._KEY: cp}
        self._batches = held_out_batches(
            held_out, batch_size=batch_size, seq_len=seq_len, tokens=tokens, mask=mask
        )

    def __len__(self) -> int:
        return len(self._batches)

    def __str__(self) -> str:
        rows, seq_len = self._batches[0]["weights"].shape
        total = sum(int(batch["weights"].sum()) for batch in self._batches)
        return f"{total:,} held-out tokens, {rows} streams of {seq_len:,} at a time"

    def key(self, number: int) -> str:
        """Return the key of a microbatch's program."""
        return self._KEY

    def put(self, number: int) -> Batch:
        """Read a microbatch and put it on the devices."""
        batch: Any = self._cp.shard_batch(self._batches[number])
        return batch

    def streams(self, number: int) -> Int64[np.ndarray, "D"]:
        """Return the row that each device holds tokens of."""
        rows = self._batches[number]["weights"].shape[0]
        return np.repeat(np.arange(rows), self._cp.size)


class Evaluator:
    """Evaluates a model on the mesh of its training, with its own compiled programs.

    Args:
        model: the model.
        text: the held-out text.
        seq_len: T; no document, or segment of one, is longer.
    """

    def __init__(self, model: ModelConfig, text: HeldOut, *, seq_len: int):
        self._model, self._text = model, text
        self.borders = borders(seq_len)
        self._programs: dict[Any, Any] = {
            key: self._program(cp) for key, cp in text.contexts.items()
        }

    def __str__(self) -> str:
        return str(self._text)

    def _program(self, cp: ContextParallel) -> Any:
        """Return the program of the microbatches of a context, not compiled yet."""
        return make_sums_by_position(self._model, self.borders, cp)

    def compile(self, params: Any) -> int:
        """Compile the programs; return the bytes per device that the largest needs.

        The bytes are those beside its arguments.

        Args:
            params: shapes, dtypes and shardings of the parameters.
        """
        keys = [self._text.key(number) for number in range(len(self._text))]
        for key, program in self._programs.items():
            batch = self._text.put(keys.index(key))
            self._programs[key] = program.lower(params, batch).compile()
        memory = [program.memory_analysis() for program in self._programs.values()]
        return max(int(found.temp_size_in_bytes) for found in memory)

    def evaluate(
        self, step: int, params: Any, stops: Callable[[], bool] = lambda: False
    ) -> Evaluation | None:
        """Return the loss of the parameters; None if it was stopped. Call `compile` first.

        Args:
            step: number of optimizer steps that the parameters have made.
            params: the parameters, on the devices.
            stops: called before each batch; returns whether to stop, the same in all processes.
        """
        began = time.perf_counter()
        found, each = [], self._each(params)
        for _ in range(len(self._text)):
            if stops():
                return None
            found.append(next(each))
        sums, counts = (np.concatenate(x) for x in zip(*found, strict=True))
        return Evaluation(
            step,
            Means.of(sums.sum(axis=1, keepdims=True), counts.sum(axis=1, keepdims=True)),
            self.borders,
            Means.of(sums, counts),
            time.perf_counter() - began,
        )

    def _each(self, params: Any) -> Iterator[list[Float64[np.ndarray, "S n"]]]:
        """Yield `_sums` of every microbatch, in any order."""
        return (self._sums(number, params) for number in range(len(self._text)))

    def _sums(self, number: int, params: Any) -> list[Float64[np.ndarray, "S n"]]:
        """Return the sums of losses and of weights of each stream of a microbatch, by bin."""
        text = self._text
        return self._of_streams(number, self._programs[text.key(number)](params, text.put(number)))

    def _of_streams(self, number: int, pair: Any) -> list[Float64[np.ndarray, "S n"]]:
        """Return what a program has computed of a microbatch, summed over each stream's devices."""
        streams = self._text.streams(number)
        found = []
        for of_devices in np.asarray(pair, np.float64):
            # Streams lie on neighbouring devices, in ascending order.
            flat = of_devices.reshape(len(streams), -1)
            found.append(np.add.reduceat(flat, np.unique(streams, return_index=True)[1]))
        return found


def borders(seq_len: int) -> tuple[int, ...]:
    """Return the first position of each bin (0 and the powers of two), and the end of the last.

    >>> borders(10)
    (0, 1, 2, 4, 8, 10)
    """
    powers = [2**i for i in range(seq_len.bit_length()) if 2**i < seq_len]
    return (0, *powers, seq_len)


def make_sums_by_position(
    model: ModelConfig, borders: tuple[int, ...], cp: ContextParallel | None = None
) -> Callable[[Any, Batch], Float[Array, "2 B C n"]]:
    """Return a jitted function `(params, batch) -> [Σ weight · cross entropy, Σ weight]`.

    Both sums are by row, cp device and bin, and all devices have all of them. They are one array,
    so that one collective, after all those of the model, gathers them.

    Args:
        model: the model.
        borders: borders of the bins, as in `Evaluation`.
        cp: the context parallelism; None for one device.
    """
    graphdef, _ = abstract_model(model)
    begins = np.asarray(borders[:-1], np.int32)

    def sums_by_position(params: Any, batch: Batch) -> Float[Array, "2 B C n"]:
        transformer = nnx.merge(graphdef, params)
        hidden = transformer(batch["tokens"], batch["positions"], mask=batch["mask"], cp=cp)
        bins = (
            jnp.sum(batch["positions"][..., None] >= begins[None, None], axis=-1, dtype=jnp.int32)
            - 1
        )
        sums = cross_entropy_by_bin(
            hidden,
            transformer.unembedding,
            batch["targets"],
            batch["weights"],
            bins,
            len(begins),
            cp=cp,
            chunk=model.loss_chunk,
            soft_cap=model.final_soft_cap,
        )
        return jnp.stack(sums)

    if cp is None:
        return jax.jit(sums_by_position)
    return jax.jit(sums_by_position, out_shardings=NamedSharding(cp.mesh, PartitionSpec()))


def _plain(values: Float64[np.ndarray, "n"]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]
