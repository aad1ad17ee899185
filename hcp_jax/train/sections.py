"""Define the sections of a run's config: data, optimizer, checkpoints, evaluation, log.

They are apart from the modules that they configure, so that reading a config, or printing the help
of a command, does not import jax.
"""

import dataclasses
from dataclasses import field
from typing import Literal, get_args

from hcp_jax.base.settings import MOST, check, fixed, free, numbers

MomentsDtype = Literal["float32", "bfloat16"]
Schedule = Literal["cosine", "constant", "wsd"]
Packing = Literal["whole", "dense"]
BadLines = Literal["refuse", "skip"]
SpecialTokens = Literal["text", "control"]

SKIPPED = (
    "readme*",
    "license*",
    "index.json*",
    "index.csv*",
    "index.tsv*",
    "index.txt*",
    "metadata.*",
    "dataset_info*.json",
    "manifest.*",
    "*.md5",
    "*.sha256",
    "md5sums*",
    "sha256sums*",
    "_success",
)
"""Names of files in a folder that describe its documents but hold none."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the text comes from.

    Attributes:
        path: a file of text (one document), JSON lines, a JSON array, CSV or Parquet (one document
            per record), also compressed (.gz, .bz2, .xz, .zst); a folder of them, subfolders
            included, hidden files left out; or a folder that `hcp tokenize` made. None: the source
            files of the running Python's standard library, which every machine has.
        field: the field, or the column, that holds the text of a record.
        bad_lines: "refuse" lines and records that cannot be read, or "skip" and count them.
        skip: patterns of the names of files in a folder that hold no documents.
        tokenizer: a tokenizer.json, which encodes the text before training starts; for a tokenised
            folder, the one that it must have been made with. None: text stays bytes.
        special_tokens: whether text that spells a special token of the tokenizer, such as "</s>",
            is encoded as "text" or as the "control" token.
        packing: "whole" keeps documents whole that fit seq_len, and pads a little; "dense" fills
            every slot and cuts documents wherever a stream ends.
        prefetch: batches that a thread prepares ahead of the step.
    """

    # A resumed run compares the files' contents, not their path (data/fingerprint.py).
    path: str | None = dataclasses.field(default=None, metadata=free())
    field: str = dataclasses.field(default="text", metadata=fixed())
    bad_lines: BadLines = dataclasses.field(default="refuse", metadata=fixed())
    skip: tuple[str, ...] = dataclasses.field(default=SKIPPED, metadata=fixed())
    tokenizer: str | None = dataclasses.field(default=None, metadata=free())
    special_tokens: SpecialTokens = dataclasses.field(default="text", metadata=fixed())
    packing: Packing = dataclasses.field(default="whole", metadata=fixed())
    prefetch: int = dataclasses.field(default=2, metadata=free(least=1, most=100_000))

    def __post_init__(self) -> None:
        check(self, "data.")
        for name, kind in (
            ("packing", Packing),
            ("bad_lines", BadLines),
            ("special_tokens", SpecialTokens),
        ):
            value, choices = getattr(self, name), get_args(kind)
            if value not in choices:
                words = " or ".join(map(repr, choices))
                raise ValueError(f"data.{name} must be {words}, got {value!r}.")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter, 2019) with warm-up, a schedule and clipping.

    Weight decay applies to the matrices of the layers (every `kernel`), not to norms, biases,
    sinks, the embedding or the output head.

    Attributes:
        learning_rate: the maximum, reached after the warm-up.
        schedule: the learning rate after the warm-up: "cosine" falls until the last step;
            "constant" stays; "wsd" (warm-up, stable, decay) stays, then falls linearly over
            `decay_share` of all steps. With the latter two a run can be made longer without a
            jump of the rate (wsd: until its decay begins).
        warmup_steps: steps over which the rate rises linearly; in the first step it is
            learning_rate / warmup_steps. If the run has no more steps than this, a tenth of them.
        decay_share: for wsd: the share of all steps, at the end, over which the rate falls.
        final_ratio: the rate at the last step, divided by learning_rate; not used by constant.
        beta1: decay of the mean of gradients.
        beta2: decay of the mean of squared gradients.
        eps: added to the root of the mean of squared gradients.
        weight_decay: decay of the parameters per unit of learning rate.
        clip_norm: maximum norm of all gradients together; None for no limit.
        moments_dtype: dtype of the two means. "bfloat16" halves their memory; they are
            stochastically rounded: round-to-nearest would discard every update below 1/256 of the
            value.
        offload: whether to keep the two means in host memory between steps.
        score_correction_rate: how far each step moves the biases of `model.moe.score_correction`.
        max_skipped: steps in a row that may be skipped because their loss or gradient is not
            finite; after more of them, training stops.
    """

    learning_rate: float = field(default=3e-4, metadata=numbers(above=0, most=1e3))
    schedule: Schedule = field(default="cosine", metadata=numbers())
    warmup_steps: int = field(default=100, metadata=numbers(least=0, most=MOST))
    decay_share: float = field(default=0.2, metadata=numbers(least=0, most=1))
    final_ratio: float = field(default=0.1, metadata=numbers(least=0, most=1))
    # In float32, 1 - beta must not round to 0, nor eps: either would make 0 / 0.
    beta1: float = field(default=0.9, metadata=numbers(least=0, most=0.999999))
    beta2: float = field(default=0.95, metadata=numbers(least=0, most=0.999999))
    eps: float = field(default=1e-8, metadata=numbers(least=1e-30, most=1))
    weight_decay: float = field(default=0.1, metadata=numbers(least=0, most=1e3))
    clip_norm: float | None = field(default=1.0, metadata=numbers(above=0, most=1e18))
    moments_dtype: MomentsDtype = field(default="float32", metadata=fixed())
    offload: bool = field(default=False, metadata=free())
    score_correction_rate: float = field(default=1e-3, metadata=numbers(least=0, most=1))
    max_skipped: int = field(default=10, metadata=free(least=1, most=MOST))

    def __post_init__(self) -> None:
        check(self, "optimizer.")
        for name, choices in (("moments_dtype", MomentsDtype), ("schedule", Schedule)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(
                    f"{name} must be one of {', '.join(get_args(choices))}, got "
                    f"{getattr(self, name)!r}."
                )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save.

    Attributes:
        every: steps between two checkpoints; None: only one at the end (and on Ctrl-C or SIGTERM),
            and those of every_minutes.
        every_minutes: minutes between two checkpoints; with `every`, whichever is due first.
        keep: how many of the newest checkpoints to keep.
        keep_every: also keep the checkpoints of steps that are a multiple of this, for ever.
        on_error: what to do if a checkpoint cannot be written (the disk is full): "stop", or
            "continue" and try again when the next one is due. Existing checkpoints stay. If the
            last one of a run cannot be written, the run ends with that error in both cases.
    """

    every: int | None = field(default=None, metadata=free(least=1, most=MOST))
    every_minutes: float | None = field(default=None, metadata=free(above=0, most=1e6))
    keep: int = field(default=2, metadata=free(least=1, most=MOST))
    keep_every: int | None = field(default=None, metadata=free(least=1, most=MOST))
    on_error: Literal["stop", "continue"] = field(default="stop", metadata=free())

    def __post_init__(self) -> None:
        check(self, "checkpoint.")
        if self.on_error not in ("stop", "continue"):
            raise ValueError(
                f"checkpoint.on_error must be 'stop' or 'continue', got {self.on_error!r}."
            )

    def is_due(self, done: int) -> bool:
        """Return whether `every` asks for a checkpoint after `done` steps."""
        return self.every is not None and done % self.every == 0


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """When to evaluate the held-out loss, and on which text.

    Attributes:
        every: steps between two evaluations; there is one before the first step and one after the
            last, too. None: no evaluation.
        path: held-out text, of any kind that `data.path` takes (with `data`'s field and tokenizer).
            None: some documents of the training text are held out, and not trained on.
        holdout: the share of the documents that is held out if path is null, taken evenly from the
            whole text.
        tokens: evaluate on about this many tokens, taken evenly from the held-out text. None: on
            all of it.
    """

    every: int | None = field(default=None, metadata=free(least=1, most=MOST))
    path: str | None = field(default=None, metadata=free())
    holdout: float = field(default=0.01, metadata=numbers(above=0, most=0.999999))
    tokens: int | None = field(default=1_048_576, metadata=free(least=1, most=2**53))

    def __post_init__(self) -> None:
        check(self, "eval.")

    def is_due(self, done: int, steps: int) -> bool:
        """Return whether to evaluate after `done` of `steps` steps."""
        return self.every is not None and (done % self.every == 0 or done == steps)


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """How a run reports.

    Attributes:
        every: steps between two lines of output if it is not a terminal (a terminal shows a
            progress bar). metrics.jsonl and TensorBoard have every step.
        tensorboard: whether to write TensorBoard events, too.
        wandb: the project of Weights & Biases to send the same numbers to, too (needs the extra
            `wandb`; WANDB_MODE=offline sends nothing); None: none.
    """

    every: int = field(default=10, metadata=free(least=1, most=MOST))
    tensorboard: bool = field(default=True, metadata=free())
    wandb: str | None = field(default=None, metadata=free())

    def __post_init__(self) -> None:
        check(self, "log.")
