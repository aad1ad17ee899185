"""Define the config of a run, one frozen dataclass, and read it from YAML and the command line.

Each section is a dataclass of its own; this module puts them together, reads and writes them.
`reading` turns a file into plain values, and `msgspec` turns those into the declared types: neither
imports, opens or runs anything that a value names. This module rewrites msgspec's errors as one
line with the file and the nearest right name.
"""

import argparse
import dataclasses
import difflib
import functools
import os
import pathlib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from typing import Any

import docstring_parser
import msgspec
import yaml

from hcp_jax.base import reading
from hcp_jax.base.arguments import parse_length
from hcp_jax.base.settings import MOST, check, fixed, free, numbers
from hcp_jax.models.config import ModelConfig
from hcp_jax.parallel.config import ParallelConfig
from hcp_jax.train.sections import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LogConfig,
    OptimizerConfig,
)

_SHOWN = 100  # characters of a key or value in a message

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
        accumulation: microbatches per optimizer step; `parallel.dynamic` makes its own.
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
        parallel.dynamic.check_sizes(parallel.num_devices // parallel.tp)

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step, of all devices together."""
        return self.batch_size * self.seq_len


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the config file, and one option for each of its keys, to a command's parser."""
    parser.add_argument("config", nargs="?", type=pathlib.Path, help="a YAML file (see configs/)")
    parser.usage = "%(prog)s [config] [--key value ...]"  # a list of all keys would fill a page
    keys = parser.add_argument_group(
        "configuration",
        "Each key of the file can be given here, too, and replaces the file's value.",
    )
    for key, kind, text in _keys(TrainConfig):
        keys.add_argument(
            f"--{key}",
            dest="overrides",
            action="append",
            type=functools.partial(_pair, key),
            metavar=_metavar(kind),
            help=text.replace("%", "%%"),
        )


def from_arguments(args: argparse.Namespace) -> TrainConfig:
    """Return the config of a command line that was parsed with `add_arguments`; see `load`."""
    return load(args.config, args.overrides or ())


def load(
    path: str | os.PathLike[str] | None = None, overrides: Sequence[tuple[str, str]] = ()
) -> TrainConfig:
    """Read a config.

    Args:
        path: a YAML file; None for the defaults.
        overrides: (dotted key, text) pairs that replace values of the file, such as
            `("model.num_layers", "4")`.

    Raises:
        ValueError: if the file is not YAML, or if a key is unknown or has a value of the wrong
            type; names the key, the file and the nearest right key.
        FileNotFoundError: if there is no such file.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values = {"name": pathlib.Path(path).stem, **_read_yaml(path)}
        _require_known_keys(values, TrainConfig, str(path))
    kinds = {key: kind for key, kind, _ in _keys(TrainConfig)}
    for key, text in overrides:
        if key not in kinds:
            raise ValueError(f"--{key}: there is no such key{_nearest(key)}")
        value = _from_text(text, kinds[key], key)
        _require_known_keys(_nested(key, value), TrainConfig, "the command line")
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
        raise ValueError(f"{origin}: {_explain(str(error), values)}") from None
    except RecursionError:
        raise ValueError(f"{origin}: a value is nested too deeply.") from None


def _explain(message: str, values: Mapping[str, Any]) -> str:
    """Return msgspec's error about a value as a message that names the config's key."""
    found = re.search(r"at `\$\.([\w.]+)", message)
    key = found[1] if found else ""
    kinds = {known: kind for known, kind, _ in _keys(TrainConfig)}
    if key not in kinds:
        return message
    value: Any = values
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    part = _part(kinds[key])
    if part is not None and isinstance(value, Mapping):
        absent = [f.name for f in dataclasses.fields(part) if _required(f) and f.name not in value]
        if absent:
            return f"{key} needs {', '.join(absent)}, too."
    near = difflib.get_close_matches(str(value)[:_SHOWN], _choices(kinds[key]), 1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"{key} must be {_describe_type(kinds[key])}, got {_short(value)}{hint}"


def _from_text(text: str, kind: Any, key: str) -> Any:
    """Return a value of the command line: text, unless it is null, a list or a mapping."""
    options = typing.get_args(kind)
    if text in ("null", "~") and type(None) in options:
        return None
    nested = _part(kind) is not None or any(typing.get_origin(option) is list for option in options)
    if nested and text.lstrip()[:1] in ("[", "{"):
        return reading.parse_yaml(text, f"the command line: {key}")
    return text


def _read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    values = reading.read_yaml(path)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold keys and values, got {type(values).__name__}.")
    return values


def _require_known_keys(values: Mapping[str, Any], cls: type, path: str, prefix: str = "") -> None:
    kinds = typing.get_type_hints(cls)
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in kinds:
            raise ValueError(f"{path}: there is no key {_short(key)}{_nearest(key)}")
        part = _part(kinds[name])
        if value is None and type(None) not in typing.get_args(kinds[name]):
            raise ValueError(f"{path}: {key} must be {_describe_type(kinds[name])}, got null.")
        if part is None:
            continue
        if isinstance(value, Mapping):
            _require_known_keys(value, part, path, f"{key}.")
        elif part is kinds[name]:
            raise ValueError(f"{path}: {key} must hold keys and values, got {_short(value)}.")


def _nearest(key: str) -> str:
    """Return the end of a message: a key that is spelt alike, or has the same last part."""
    key = key[:_SHOWN]
    known = [k for k, _, _ in _keys(TrainConfig)] + [
        f.name for f in dataclasses.fields(TrainConfig) if _part(f.type)
    ]
    near = difflib.get_close_matches(key, known, 1, cutoff=0.75)
    last = key.rsplit(".", 1)[-1]
    near = near or [k for k in known if k.rsplit(".", 1)[-1] == last]
    near = near or difflib.get_close_matches(key, known, 1)
    return f"; did you mean {near[0]!r}?" if near else "."


def _keys(cls: type, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yield (dotted key, type, description) of every value that a config can have."""
    kinds = typing.get_type_hints(cls)
    texts = {p.arg_name: p.description for p in docstring_parser.parse(cls.__doc__ or "").params}
    for name in (one.name for one in dataclasses.fields(cls)):
        part = _part(kinds[name])
        if part is not kinds[name]:
            text = " ".join((texts.get(name) or "").split())
            yield f"{prefix}{name}", kinds[name], text
        if part is not None:
            yield from _keys(part, f"{prefix}{name}.")


def _part(kind: Any) -> type | None:
    """Return the dataclass that a field holds or may hold; None if it holds none."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    parts = [k for k in options if isinstance(k, type) and dataclasses.is_dataclass(k)]
    return parts[0] if parts else None


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _choices(kind: Any) -> list[str]:
    if typing.get_origin(kind) is typing.Literal:
        return [str(value) for value in typing.get_args(kind)]
    return [c for k in typing.get_args(kind) for c in _choices(k)]


def _describe_type(kind: Any) -> str:
    """Return a type as a phrase for messages."""
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(kind)))}"
    if isinstance(kind, types.UnionType):
        return " or ".join(map(_describe_type, typing.get_args(kind)))
    plain = {int: "int", float: "float", str: "str", bool: "true or false", types.NoneType: "null"}
    if kind in plain:
        return plain[kind]
    if typing.get_origin(kind) in (list, tuple):
        return f"a list of {_describe_type(typing.get_args(kind)[0])}"
    return "keys and values" if dataclasses.is_dataclass(kind) else str(kind)


def _metavar(kind: Any) -> str:
    """Return a type as the help of an option shows it."""
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(map(str, typing.get_args(kind)))
    if isinstance(kind, types.UnionType):
        return _metavar(typing.get_args(kind)[0])
    return {int: "INT", float: "FLOAT", str: "STR", bool: "BOOL"}.get(kind, "VALUE")


def _pair(key: str, text: str) -> tuple[str, str]:
    return key, text


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


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
