"""Define the config of a run, one frozen dataclass, and read it from YAML and the command line.

Each section is a dataclass of its own; this module puts them together, reads and writes them.
`reading` turns a file into plain values, and `msgspec` turns those into the declared types: neither
imports or runs anything that a value names, and `include` opens YAML files only. This module
rewrites msgspec's errors as one line with the file and the nearest right name.
"""

import argparse
import dataclasses
import functools
import os
import pathlib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any

import msgspec
import yaml

from hcp_jax.base import reading, shipped
from hcp_jax.base.arguments import completed, parse_length
from hcp_jax.base.settings import MOST, check, fixed, free, numbers
from hcp_jax.models.config import ModelConfig
from hcp_jax.parallel.config import ParallelConfig
from hcp_jax.train import config_files, config_keys
from hcp_jax.train.sections import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LogConfig,
    OptimizerConfig,
)

SMALL_MODEL = ModelConfig(
    vocab_size=264,
    num_layers=4,
    hidden_size=128,
    intermediate_size=352,
    num_heads=8,
    num_kv_heads=2,
    compute_dtype="float32",
    remat="none",
)
"""A decoder for bytes that learns within minutes on a CPU; the default of `TrainConfig.model`."""


FILL_IN = "FILL_IN"
"""Placeholder of `hcp plan --write` for values that only the user knows; `hcp train` refuses it."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Attributes:
        name: the name of the run folder, to which a number is added; if a file gives none, the
            file's own name.
        steps: number of optimizer steps.
        batch_size: streams per optimizer step, over all of dp and all of `accumulation`; with
            `parallel.dynamic`, a step has up to batch_size * seq_len tokens.
        seq_len: tokens per stream; no document, or segment of one, is longer.
        accumulation: microbatches per optimizer step; `parallel.dynamic` makes its own. In a
            pipeline, use several per stage.
        seed: seed of the initial parameters and of the order of the documents.
        run_dir: the folder in which run folders are made.
        made_for: the GPUs that the config was made for, such as "8 x 8 H200" (`hcp plan --write`
            sets it): hcp train then refuses to simulate the run on a CPU. None: any devices.
        program_cache: keep compiled programs in the user's cache folder for the next start
            (HCP_PROGRAM_CACHE names another folder, or is "off").
        init_from: a Hugging Face folder with the weights to start from (`hcp import` writes a
            config that fits it); None: random weights.
        model: the decoder.
        parallel: the mesh and what its axes do.
        data: the text.
        optimizer: the optimizer and its schedule.
        checkpoint: when to save.
        eval: held-out loss.
        log: how to report.

    Raises:
        ValueError: if values do not fit together.
        NotImplementedError: for what pipelines do not support.
    """

    name: str = field(default="run", metadata=free())
    steps: int = field(default=200, metadata=free(least=1, most=MOST))
    batch_size: int = field(default=2, metadata=numbers(least=1, most=MOST))
    seq_len: int = field(default=1024, metadata=fixed(least=1, most=MOST))
    accumulation: int = field(default=1, metadata=free(least=1, most=MOST))
    seed: int = field(default=0, metadata=fixed(least=0, most=2**32 - 1))
    run_dir: str = field(default="runs", metadata=free())
    made_for: str | None = field(default=None, metadata=free())
    program_cache: bool = field(default=True, metadata=free())
    init_from: str | None = field(default=None, metadata=fixed())
    model: ModelConfig = SMALL_MODEL
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        check(self)
        self.parallel.check_model(self.model)
        if self.parallel.pp > 1:
            self._check_pipeline()
        if not self.name or "/" in self.name:
            raise ValueError(f"name must be the name of a folder, got {self.name!r}.")
        if self.parallel.dynamic.enabled:
            self._check_dynamic()
            return
        dp = self.parallel.resolve().dp
        if self.batch_size % (self.accumulation * dp):
            raise ValueError(
                f"batch_size={self.batch_size} must be a multiple of accumulation * dp = "
                f"{self.accumulation} * {dp}."
            )

    def _check_dynamic(self) -> None:
        if self.accumulation != 1:
            raise ValueError(
                f"accumulation={self.accumulation} does not go with parallel.dynamic, whose "
                "schedule decides how many microbatches a step has; leave it out."
            )
        parallel = self.parallel.resolve()
        if parallel.layout != "zigzag":
            raise ValueError(
                f"layout={parallel.layout!r} does not go with parallel.dynamic, which cuts every "
                "document zigzag over its group."
            )
        if self.data.packing != "whole":
            raise ValueError(
                f"data.packing={self.data.packing!r} does not go with parallel.dynamic, which "
                "keeps documents whole; leave it out."
            )
        parallel.dynamic.check_sizes(parallel.devices_per_stage // parallel.tp)

    def _check_pipeline(self) -> None:
        # Here, because they import jax, which configs without a pipeline do not need.
        from hcp_jax.pipeline.refusals import require_supported_model, require_vocabulary
        from hcp_jax.pipeline.stages import Stages

        parallel = self.parallel.resolve()
        require_supported_model(self.model)
        require_vocabulary(self.model, parallel.pp, parallel.tp)
        stages = Stages(self.model, parallel.pp, parallel.virtual_stages)
        stages.chunk_comm_types(parallel.comm_type)
        if self.optimizer.offload:
            raise NotImplementedError(
                "optimizer.offload is not supported in a pipeline: moments are rearranged when "
                "they are saved. Set it to false; fsdp, moments_dtype bfloat16 and more stages "
                "make them smaller."
            )

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step, of all devices together."""
        return self.batch_size * self.seq_len


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the config file, and one option for each of its keys, to a command's parser."""
    config = parser.add_argument(
        "config",
        nargs="?",
        type=pathlib.Path,
        help="a YAML file, or the name of one that comes with hcp_jax, such as quickstart",
    )
    completed(config, shipped.names())
    parser.usage = "%(prog)s [config] [--key value ...]"  # a list of all keys would fill a page
    keys = parser.add_argument_group(
        "configuration",
        "Each key of the file can be given here, too, and replaces the file's value.",
    )
    for key, kind, text in config_keys.keys(TrainConfig):
        option = keys.add_argument(
            f"--{key}",
            dest="overrides",
            action="append",
            type=functools.partial(_pair, key),
            metavar=config_keys.metavar(kind),
            help=text.replace("%", "%%"),
        )
        words = config_keys.choices(kind)
        if words:
            completed(option, words)


def from_arguments(args: argparse.Namespace) -> TrainConfig:
    """Return the config of a command line that was parsed with `add_arguments`; see `load`."""
    return load(args.config, args.overrides or ())


def load(
    path: str | os.PathLike[str] | None = None, overrides: Sequence[tuple[str, str]] = ()
) -> TrainConfig:
    """Read a config, with the files that it includes (`config_files.py`).

    Args:
        path: a YAML file, or the name of a config that comes with the package, such as
            "quickstart"; None for the defaults.
        overrides: (dotted key, text) pairs that replace values of the file, such as
            `("model.num_layers", "4")`.

    Raises:
        ValueError: if the file is not YAML, or if a key is unknown or has a value of the wrong
            type; names the key, the file and the nearest right key.
        FileNotFoundError: if there is no such file.

    >>> from hcp_jax.train import config
    >>> config.load("quickstart", [("steps", "3")]).steps
    3
    """
    values: dict[str, Any] = {}
    if path is not None:
        path = shipped.find(path)
        values = {"name": path.stem, **config_files.read(path, _require_known)}
    kinds = {key: kind for key, kind, _ in config_keys.keys(TrainConfig)}
    for key, text in overrides:
        if key not in kinds:
            raise ValueError(
                f"--{key}: there is no such key{config_keys.nearest(key, TrainConfig)}"
            )
        value = _from_text(text, kinds[key], key)
        config_keys.require_known(_nested(key, value), TrainConfig, "the command line")
        _put(values, key.split("."), value)
    _count_tokens(values)
    config = _to_config(values, "the command line" if overrides else str(path))
    _require_no_empty_texts(config)
    return config


_TOKENS = (
    "seq_len",
    "model.sliding_window",
    "model.mlp_chunk",
    "model.loss_chunk",
    "model.rope_scaling.original_max_position_embeddings",
    "parallel.dynamic.max_tokens_per_device",
    "parallel.dynamic.max_seqlen_per_dp_cp_rank",
    "eval.tokens",
)
"""Keys that count tokens: they may be written 128K or 1M."""


def _count_tokens(values: dict[str, Any]) -> None:
    """Replace token counts that are written with K, M or G by numbers."""
    for key in _TOKENS:
        *parts, last = key.split(".")
        part: Any = values
        for name in parts:
            part = part.get(name) if isinstance(part, Mapping) else None
        text = part.get(last) if isinstance(part, Mapping) else None
        if isinstance(text, str) and (number := parse_length(text)) is not None:
            part[last] = number


def _require_no_empty_texts(config: TrainConfig) -> None:
    """Refuse an empty path or name: it would mean the current folder, or nothing."""
    for key, value in flatten(config).items():
        if isinstance(value, str) and not value.strip():
            raise ValueError(f"{key} is empty; give a value, null, or leave it out.")


def dump(config: TrainConfig) -> str:
    """Return the whole config as YAML; `load` reads an equal config from it."""
    values = _plain(dataclasses.asdict(config))
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return text


def flatten(config: TrainConfig) -> dict[str, Any]:
    """Return every value of a config by its dotted key, in plain values."""
    values: dict[str, Any] = {}

    def put(part: Mapping[str, Any], prefix: str) -> None:
        for name, value in part.items():
            if isinstance(value, Mapping):
                put(value, f"{prefix}{name}.")
            else:
                values[prefix + name] = value

    put(_plain(dataclasses.asdict(config)), "")
    return values


def _to_config(values: Mapping[str, Any], origin: str) -> TrainConfig:
    if isinstance(values.get("model"), Mapping):  # given values replace those of the default model
        values = {**values, "model": dataclasses.asdict(SMALL_MODEL) | values["model"]}
    try:
        # Not strict: a number may be text, as on the command line and as YAML reads 1e-3.
        return msgspec.convert(values, TrainConfig, strict=False)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, ValueError | TypeError):  # a dataclass refused its values
            raise ValueError(str(error.__cause__)) from None
        raise ValueError(
            f"{origin}: {config_keys.explain(str(error), values, TrainConfig)}"
        ) from None
    except RecursionError:
        raise ValueError(f"{origin}: a value is nested too deeply.") from None


def _from_text(text: str, kind: Any, key: str) -> Any:
    """Return a value of the command line: text, unless it is null, a list or a mapping."""
    options = typing.get_args(kind)
    if text in ("null", "~") and type(None) in options:
        return None
    lists = any(typing.get_origin(option) in (list, tuple) for option in options)
    nested = lists or config_keys.section(kind) is not None
    if nested and text.lstrip()[:1] in ("[", "{"):
        return reading.parse_yaml(text, f"the command line: {key}")
    return text


def _require_known(values: Mapping[str, Any], origin: str) -> None:
    config_keys.require_known(values, TrainConfig, origin)


def _pair(key: str, text: str) -> tuple[str, str]:
    return key, text


def _nested(key: str, value: Any) -> dict[str, Any]:
    return functools.reduce(lambda inner, name: {name: inner}, reversed(key.split(".")), value)


def _put(values: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        if not isinstance(values.get(key), dict):
            values[key] = {}
        values = values[key]
    values[keys[-1]] = value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return list(map(_plain, value)) if isinstance(value, list | tuple) else value
