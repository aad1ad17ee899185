"""Write parameters to a Hugging Face folder: config.json, sharded safetensors, and their index."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from hcp_jax.models.config import ModelConfig
from hcp_jax.models.hf.model_folder import CONFIG, INDEX, ONE_FILE
from hcp_jax.models.hf.slots import Slot, slots, to_stored

NUMPY_DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
"""Dtypes that tensors can be written in."""


def write_folder(
    folder: pathlib.Path,
    config: ModelConfig,
    raw: dict[str, Any],
    values_of: Callable[[Slot], np.ndarray],
    shard_bytes: int,
) -> int:
    """Write the weights and the config, and return the number of shards.

    One shard is in memory at a time, besides the memory that `values_of` uses, and the tensors
    that hold several parameters, from the first of these parameters to the last.

    Args:
        folder: an existing folder.
        config: the model.
        raw: its config.json, with the dtype of the tensors.
        values_of: returns the float32 values of a slot; called once for each, in the order of
            `slots`.
        shard_bytes: size limit of a file; a larger single tensor gets a file of its own.
    """
    dtype = NUMPY_DTYPES[raw["torch_dtype"]]
    every = slots(config, raw["model_type"])
    last = {slot.name: slot for slot in every}
    shards = _shards(every, last, dtype.itemsize, shard_bytes)
    placed: dict[str, str] = {}
    total = 0
    begun: dict[str, np.ndarray] = {}  # tensors of several parameters, until they are whole
    for number, shard in enumerate(shards, 1):
        alone = len(shards) == 1
        name = ONE_FILE if alone else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for slot in shard:
            if slot.part is None:
                tensors[slot.name] = to_stored(slot, values_of(slot), dtype)
                continue
            tensor = begun.setdefault(slot.name, np.zeros(slot.stored_shape, dtype))
            slot.part.put(tensor, values_of(slot).astype(dtype))
            if slot is last[slot.name]:
                tensors[slot.name] = begun.pop(slot.name)
        # transformers requires this word in a file's header before it reads the tensors.
        save_file(tensors, folder / name, metadata={"format": "pt"})
        placed |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    # Written last, so that a folder with a config always has its weights.
    (folder / CONFIG).write_text(json.dumps(raw, indent=2) + "\n")
    return len(shards)


def _shards(
    every: list[Slot], last: dict[str, Slot], itemsize: int, limit: int
) -> list[list[Slot]]:
    """Split the slots, in order, so that the tensors that end in each have at most `limit` bytes.

    Args:
        every: the slots.
        last: the last slot of each tensor.
        itemsize: bytes of an entry.
        limit: size limit of a file.
    """
    shards: list[list[Slot]] = [[]]
    size = 0
    for slot in every:
        ends = slot is last[slot.name]
        slot_bytes = int(np.prod(slot.stored_shape)) * itemsize if ends else 0
        if size and size + slot_bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(slot)
        size += slot_bytes
    return shards
