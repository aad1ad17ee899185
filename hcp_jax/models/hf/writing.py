"""Parameters to a Hugging Face folder: config.json, safetensors in shards, and their index.

Apart from `hf`, since it begins from arrays on the host, wherever they came from.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from hcp_jax.models.config import ModelConfig
from hcp_jax.models.hf.loading import Slot, slots, to_stored
from hcp_jax.models.hf.model_folder import CONFIG, INDEX, ONE_FILE

NUMPY_DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
"""What tensors can be written as."""


def write_folder(
    folder: pathlib.Path,
    config: ModelConfig,
    raw: dict[str, Any],
    values_of: Callable[[Slot], np.ndarray],
    shard_bytes: int,
) -> int:
    """Writes the weights and the config; the number of shards.

    One shard is in memory at a time, besides what `values_of` holds.

    Args:
        folder: an existing folder.
        config: the model.
        raw: its config.json, with the dtype of the tensors.
        values_of: the float32 values of a slot; called once for each, in the order of `slots`.
        shard_bytes: how much a file may hold, unless a single tensor is larger.
    """
    dtype = NUMPY_DTYPES[raw["torch_dtype"]]
    shards = _shards(slots(config), dtype.itemsize, shard_bytes)
    placed: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        alone = len(shards) == 1
        name = ONE_FILE if alone else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {slot.name: to_stored(slot, values_of(slot), dtype) for slot in shard}
        # transformers asks for the word in the head of a file before it reads the tensors.
        save_file(tensors, folder / name, metadata={"format": "pt"})
        placed |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    # Last, so that a folder with a config has its weights.
    (folder / CONFIG).write_text(json.dumps(raw, indent=2) + "\n")
    return len(shards)


def _shards(all_slots: list[Slot], itemsize: int, limit: int) -> list[list[Slot]]:
    """The slots, in order, in as few files of at most `limit` bytes as will do."""
    shards: list[list[Slot]] = [[]]
    size = 0
    for slot in all_slots:
        of_slot = int(np.prod(slot.shape)) * itemsize
        if shards[-1] and size + of_slot > limit:
            shards.append([])
            size = 0
        shards[-1].append(slot)
        size += of_slot
    return shards
