"""Evaluation: the loss on held-out text, and how it falls with the position in a document.

A model that uses long context predicts a token the better, the more of its document stands before
it. So besides the mean over all tokens there is one for each bin of positions: 0, 1, 2 to 3, 4 to
7, and so on. A position is the number of tokens of its document that a token sees before itself;
behind a cut (`data/corpus.py`) it begins at 0 again.

Exact on any mesh: each device adds up the losses of its own tokens by row and bin, and these few
numbers are summed over the cp devices inside the compiled program, and in float64 on the host. The
text is the same at every evaluation of every run with the same `seq_len`, whatever its seed, batch
size or mesh. The loss is cross entropy alone, without `z_loss`.

The uncertainty is a standard error, with streams as the units that are drawn: tokens of one
document are alike, and to take each for an observation of its own would make it far too small. With
m the mean over n streams, of which stream i has losses that add up to s_i over c_i tokens, it is

    sqrt( n / (n - 1) · Σ (s_i - m · c_i)² ) / Σ c_i

which is that of a ratio of two sums (Cochran, Sampling Techniques, 1977, chapter 6).
"""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float64, Int64

from hcp_jax.models.config import ModelConfig
from hcp_jax.models.layers.loss import cross_entropy_by_bin
from hcp_jax.models.transformer import abstract_model
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.train import data
from hcp_jax.train.data import Corpus
from hcp_jax.train.sections import DataConfig, EvalConfig


def open_corpora(
    of_data: DataConfig, config: EvalConfig, vocab_size: int
) -> tuple[Corpus, Corpus | None]:
    """The text to train on, and the text to evaluate on; None if there is no evaluation.

    Args:
        of_data: where the text comes from.
        config: what is held out.
        vocab_size: how many ids the model knows.

    Raises:
        ValueError: as `data.open_corpus`; if the documents are too few to hold some out.
    """
    corpus = data.open_corpus(of_data, vocab_size)
    if config.every is None:
        return corpus, None
    if config.path is not None:
        try:
            there = dataclasses.replace(of_data, path=config.path)
            return corpus, data.open_corpus(there, vocab_size)
        except ValueError as error:
            raise ValueError(str(error).replace("data.path", "eval.path")) from None
    number = math.ceil(config.holdout * len(corpus))
    if number >= len(corpus):
        raise ValueError(
            f"eval.holdout={config.holdout} of {len(corpus)} documents leaves none to train on; "
            "give held-out text with eval.path, or a smaller share."
        )
    order = data.evenly(len(corpus))
    training, held_out = corpus.select(np.sort(order[number:])), corpus.select(order[:number])
    return training, held_out


@dataclasses.dataclass(frozen=True)
class Means:
    """A mean loss of each of several sets of tokens.

    Attributes:
        loss: nats per token; NaN where there are no tokens.
        stderr: its standard error; NaN where there are fewer than two streams.
        tokens: how many.
    """

    loss: Float64[np.ndarray, "n"]
    stderr: Float64[np.ndarray, "n"]
    tokens: Int64[np.ndarray, "n"]

    @classmethod
    def of(cls, sums: Float64[np.ndarray, "S n"], counts: Float64[np.ndarray, "S n"]) -> "Means":
        """Of the losses' sums, and the tokens, of each stream."""
        total, tokens = sums.sum(axis=0), counts.sum(axis=0)
        streams = (counts > 0).sum(axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            loss = total / tokens
            spread = ((sums - loss * counts) ** 2).sum(axis=0)
            stderr = np.sqrt(streams / (streams - 1) * spread) / tokens
        return cls(loss, np.where(streams > 1, stderr, np.nan), np.rint(tokens).astype(np.int64))


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What came of one evaluation.

    Attributes:
        step: optimizer steps that the model had made.
        overall: of all tokens; arrays of one.
        borders: bin i holds the positions from `borders[i]` to `borders[i + 1] - 1`.
        by_position: of each bin.
        seconds: that it took.
    """

    step: int
    overall: Means
    borders: tuple[int, ...]
    by_position: Means
    seconds: float

    @property
    def loss(self) -> float:
        """Nats per token."""
        return float(self.overall.loss[0])

    def to_json(self) -> dict[str, Any]:
        """A line of eval.jsonl; null where there is no number."""
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


class Evaluator:
    """Evaluates a model on its own mesh, with a compiled program of its own.

    Args:
        model: the model.
        cp: the mesh that it is trained on, and what the axes do.
        held_out: the text.
        seq_len: T, tokens per stream.
        batch_size: streams that are computed at one time; a multiple of dp.
        tokens: see `EvalConfig`.
    """

    def __init__(
        self,
        model: ModelConfig,
        cp: ContextParallel,
        held_out: Corpus,
        *,
        seq_len: int,
        batch_size: int,
        tokens: int | None,
    ):
        self._cp = cp
        self.borders = borders(seq_len)
        self._batches = data.held_out_batches(
            held_out, batch_size=batch_size, seq_len=seq_len, tokens=tokens, mask=model.mask
        )
        self._program: Any = make_sums_by_position(model, self.borders, cp)

    def __str__(self) -> str:
        rows, seq_len = self._batches[0]["weights"].shape
        total = sum(int(batch["weights"].sum()) for batch in self._batches)
        return f"{total:,} held-out tokens, {rows} streams of {seq_len:,} at a time"

    def compile(self, params: Any) -> int:
        """Compiles the program; returns the bytes that it needs per device beside its arguments.

        Args:
            params: shapes, dtypes and shardings of the parameters.
        """
        batch = self._cp.shard_batch(self._batches[0])
        self._program = self._program.lower(params, batch).compile()
        return self._program.memory_analysis().temp_size_in_bytes

    def evaluate(
        self, step: int, params: Any, stops: Callable[[], bool] = lambda: False
    ) -> Evaluation | None:
        """Return the loss of some parameters; None if it was broken off. `compile` first.

        Args:
            step: optimizer steps that they have made.
            params: on the devices.
            stops: asked before each batch whether to break off; all processes must say the same.
        """
        began = time.perf_counter()
        found = []
        for batch in self._batches:
            if stops():
                return None
            of_batch = self._program(params, self._cp.shard_batch(batch))
            found.append([np.asarray(x, np.float64) for x in of_batch])
        sums, counts = (np.concatenate(x) for x in zip(*found, strict=True))
        return Evaluation(
            step,
            Means.of(sums.sum(axis=1, keepdims=True), counts.sum(axis=1, keepdims=True)),
            self.borders,
            Means.of(sums, counts),
            time.perf_counter() - began,
        )


def borders(seq_len: int) -> tuple[int, ...]:
    """The positions at which bins begin, and the end of the last one: 0 and the powers of two.

    >>> borders(10)
    (0, 1, 2, 4, 8, 10)
    """
    powers = [2**i for i in range(seq_len.bit_length()) if 2**i < seq_len]
    return (0, *powers, seq_len)


def make_sums_by_position(
    model: ModelConfig, borders: tuple[int, ...], cp: ContextParallel | None = None
) -> Callable[[Any, dict], tuple[Float[Array, "B n"], Float[Array, "B n"]]]:
    """The program: `(params, batch) -> (Σ weight · cross entropy, Σ weight)`, jitted.

    Both are by row and bin, and the same on all devices.

    Args:
        model: the model.
        borders: of the bins, as in `Evaluation`.
        cp: the context parallelism; None for one device.
    """
    graphdef, _ = abstract_model(model)
    begins = np.asarray(borders[:-1], np.int32)

    def sums_by_position(params: Any, batch: dict) -> tuple[Array, Array]:
        transformer = nnx.merge(graphdef, params)
        hidden = transformer(batch["tokens"], batch["positions"], mask=batch["mask"], cp=cp)
        bins = (
            jnp.sum(batch["positions"][..., None] >= begins[None, None], axis=-1, dtype=jnp.int32)
            - 1
        )
        return cross_entropy_by_bin(
            hidden,
            transformer.unembedding,
            batch["targets"],
            batch["weights"],
            bins,
            len(begins),
            cp=cp,
            chunk=model.loss_chunk,
        )

    if cp is None:
        return jax.jit(sums_by_position)
    return jax.jit(sums_by_position, out_shardings=NamedSharding(cp.mesh, PartitionSpec()))


def _plain(values: Float64[np.ndarray, "n"]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]
