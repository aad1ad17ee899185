"""Write a config that trains from the weights of a Hugging Face folder (`hcp import`).

Every tensor's name, shape and dtype is checked; the weights are not copied. Training reads them
from their folder: each process reads its own part, one tensor at a time, so that no host needs more
memory than for the state of training.
"""

import argparse
import dataclasses
import math
import pathlib
from typing import Any

import yaml

from hcp_jax.base import terminal
from hcp_jax.models.config import ModelConfig
from hcp_jax.models.hf import config_json, loading, model_folder
from hcp_jax.models.pattern import LayerConfig
from hcp_jax.train import config as configuration
from hcp_jax.train.config import SMALL_MODEL
from hcp_jax.train.hf import weights


def run(args: argparse.Namespace) -> int:
    """Run `hcp import`."""
    folder = pathlib.Path(args.folder)
    model_folder.require(folder)  # before `absolute`: the error recognises names of the Hub
    folder = folder.absolute()
    model = config_json.model_config(config_json.read_raw(folder), f"{folder}/config.json")
    told = weights.check(model, str(folder))
    stored = loading.check(model, folder)
    parameters = sum(math.prod(tensor.shape) for tensor in stored.values())
    files = len({tensor.file for tensor in stored.values()})
    terminal.say(
        f"{told}: {parameters / 1e6:,.2f} M parameters, {len(stored)} tensors, {files} files"
    )
    text = _as_yaml(model, folder)
    if args.out is None:
        terminal.say(text.rstrip("\n"))
        return 0
    file = args.out / "config.yaml"
    if file.exists():
        raise ValueError(f"{file} exists; give another folder with --out.")
    args.out.mkdir(parents=True, exist_ok=True)
    head = f"# hcp train {file} --data.path TEXT --seq_len TOKENS\n\n"
    file.write_text(head + text)
    assert configuration.load(file).model == model
    terminal.say(f"{file}: train with\n  hcp train {file} --data.path TEXT --seq_len TOKENS")
    return 0


def _as_yaml(model: ModelConfig, folder: pathlib.Path) -> str:
    """Return the config as YAML, without default values."""
    usual = dataclasses.asdict(SMALL_MODEL)
    told = {n: v for n, v in dataclasses.asdict(model).items() if v != usual[n]}
    if isinstance(model.layers, tuple):
        told["layers"] = [_given(layer) for layer in model.layers]
    values: dict[str, Any] = {"name": folder.name, "init_from": str(folder), "model": told}
    if (folder / "tokenizer.json").is_file():
        values["data"] = {"tokenizer": str(folder / "tokenizer.json")}
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return text


def _given(layer: LayerConfig) -> dict[str, Any]:
    """Return the settings of a layer of a pattern, in plain values."""
    values = dataclasses.asdict(layer)
    return {name: value for name, value in values.items() if value is not None}
