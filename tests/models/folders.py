"""Hugging Face folders of small random models, written without the package that reads them."""

import json
import zlib

import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from hcp_jax.models.config import ModelConfig
from hcp_jax.models.hf import config_json, loading, model_folder

CONFIG = ModelConfig(
    vocab_size=272,
    num_layers=3,
    hidden_size=64,
    intermediate_size=96,
    num_heads=8,
    num_kv_heads=2,
    head_size=16,
    qkv_bias=True,
    rope_theta=1e6,
    compute_dtype="float32",
    remat="none",
)


def stored_values(slot, dtype=ml_dtypes.bfloat16):
    """Random values of a tensor as a file has them, told by its name alone."""
    rng = np.random.default_rng(zlib.crc32(slot.name.encode()))
    return (0.3 * rng.standard_normal(slot.stored_shape)).astype(dtype)


def make_folder(folder, config=CONFIG, dtype=ml_dtypes.bfloat16, shard_bytes=60_000, **changes):
    """A folder with an index and several shards; `changes` are of single tensors, None for none."""
    folder.mkdir(exist_ok=True)
    raw = config_json.raw_config(config, 512, np.dtype(dtype).name)
    (folder / "config.json").write_text(json.dumps(raw))
    tensors = {slot.name: stored_values(slot, dtype) for slot in loading.slots(config)} | changes
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    shards = [{}]
    for name, tensor in tensors.items():
        if sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    placed = {}
    for number, shard in enumerate(shards):
        file = f"shard-{number}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        placed |= dict.fromkeys(shard, file)
    (folder / model_folder.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return folder


def tensors_of(folder):
    """All tensors of a folder as bytes, with what they are."""
    found = {}
    for name, stored in model_folder.stored_tensors(folder).items():
        with safe_open(stored.file, framework="numpy") as file:
            tensor = file.get_tensor(name)
        found[name] = (tensor.dtype.name, tensor.shape, tensor.tobytes())
    return found
