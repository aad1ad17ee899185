"""The smallest model and text that train: the config of runs in processes of their own."""

import pathlib
from typing import Any

import yaml

CONFIG = {
    "name": "tiny",
    "batch_size": 2,
    "seq_len": 32,
    "model": {
        "vocab_size": 264,
        "num_layers": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "num_kv_heads": 2,
        "compute_dtype": "float32",
        "remat": "none",
    },
    "optimizer": {"warmup_steps": 2},
    "log": {"every": 1, "tensorboard": False},
}


def write_config(place: pathlib.Path, most_words: int = 17, **changes: Any) -> pathlib.Path:
    """A config file in `place`, beside its 300 documents of 1 to so many words and a number."""
    text = place / "text.jsonl"
    lines = ("abc " * (1 + i % most_words) + f"{i}" for i in range(300))
    text.write_text("\n".join(f'{{"text": "{line}"}}' for line in lines))
    path = place / "tiny.yaml"
    path.write_text(yaml.safe_dump(CONFIG | {"data": {"path": str(text)}} | changes))
    return path
