"""Start a run from the weights of a Hugging Face folder.

The weights are not copied: when training starts, every process reads the parts that its own devices
hold, directly into the sharded state. The run folder keeps copies of the small files beside them
(config.json, the tokenizer's), so that `hcp export` can write such a folder when the first one no
longer exists.
"""

import json
import pathlib
import shutil

import jax

from hcp_jax.base import reading
from hcp_jax.models.config import ModelConfig
from hcp_jax.models.hf import config_json, loading, model_folder
from hcp_jax.train.config import TrainConfig
from hcp_jax.train.state_form import StateForm
from hcp_jax.train.step import TrainState

KEPT = "huggingface"
"""The folder in a run folder with the small files."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)
"""Files beside the weights that are copied unchanged."""


def check(model: ModelConfig, folder: str, seq_len: int = 0) -> str:
    """Check the weights that a run starts from; return lines that describe them.

    Args:
        model: the run's model.
        folder: the Hugging Face folder.
        seq_len: tokens of the run's sequences; if the model was made for fewer, one of the lines
            is a warning.

    Raises:
        NotImplementedError: if the folder is of a family that is not supported.
        ValueError: if the folder's parameters do not fit the model, or a file is missing; says
            which.
    """
    path = pathlib.Path(folder)
    for name in present(path):
        model_folder.member(path, name)
    raw = config_json.read_raw(path)
    theirs = config_json.model_config(raw, f"{path}/config.json")
    wrong = config_json.differences(config_json.SHAPES, theirs, model)
    if wrong:
        raise ValueError(
            f"init_from: {folder} has the weights of another model: {'; '.join(wrong)}. "
            "hcp import writes a config that fits."
        )
    stored = loading.check(model, path)
    lines = [f"weights: {folder} ({raw['model_type']}, {_dtype(stored)})"]
    changed = config_json.differences(config_json.READINGS, theirs, model)
    if changed:
        lines.append(f"  settings changed from its config.json: {'; '.join(changed)}")
    reach = config_json.reach(raw, model)
    if reach is not None and seq_len > reach and model.rope_theta == theirs.rope_theta:
        lines.append(
            f"  warning: seq_len {seq_len:,} is longer than the {reach:,} tokens that the model "
            "was made for; give model.rope_scaling or a greater model.rope_theta (docs/weights.md)"
        )
    return "\n".join(lines)


def initial_state(config: TrainConfig, form: StateForm, run: pathlib.Path) -> TrainState:
    """Return the state before the first step: with the weights of `init_from`, or random ones.

    Args:
        config: the run; its weights have been checked.
        form: how the run holds its state.
        run: the run folder, which exists.
    """
    if config.init_from is None:
        return form.initial(config.seed)
    if jax.process_index() == 0:
        keep_small_files(pathlib.Path(config.init_from), run / KEPT)
    shardings = jax.tree.map(lambda x: x.sharding, form.stored.params)
    return form.begun(loading.load_params(config.model, pathlib.Path(config.init_from), shardings))


def keep_small_files(origin: pathlib.Path, kept: pathlib.Path) -> None:
    """Copy the files that `hcp export` needs besides the weights."""
    kept.mkdir(exist_ok=True)
    copy_tokenizer(origin, kept)
    raw = config_json.read_raw(origin)
    # The dtype of the stored tensors counts, not what the file says.
    raw["torch_dtype"] = _dtype(model_folder.stored_tensors(origin))
    raw.pop("dtype", None)
    (kept / "config.json").write_text(json.dumps(raw, indent=2) + "\n")


def copy_tokenizer(origin: pathlib.Path, out: pathlib.Path) -> list[str]:
    """Copy the files of a tokenizer; return their names.

    Raises:
        ValueError: if one is a link to a file outside the folder.
    """
    there = present(origin)
    for name in there:
        shutil.copyfile(model_folder.member(origin, name), out / name)
    return there


def present(folder: pathlib.Path) -> list[str]:
    """Return which of `TOKENIZER_FILES` a folder has."""
    return [name for name in TOKENIZER_FILES if reading.is_regular(folder / name)]


def _dtype(stored: dict[str, model_folder.Stored]) -> str:
    """Return a dtype that holds every tensor exactly."""
    found = {
        loading.DTYPES[tensor.dtype] for tensor in stored.values() if tensor.dtype in loading.DTYPES
    }
    return found.pop() if len(found) == 1 else "float32"
