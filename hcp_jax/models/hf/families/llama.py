"""Llama, and what has its shape: Mistral is a Llama with a window."""

from typing import Any

from hcp_jax.models.config import ModelConfig
from hcp_jax.models.hf.families.family import (
    Family,
    Usual,
    attention,
    biases,
    rope,
    write_rope,
)
from hcp_jax.models.hf.json_fields import Fields


def _read_llama(fields: Fields, num_layers: int) -> dict[str, Any]:
    return rope(fields) | biases(fields) | {"mlp_bias": fields.flag("mlp_bias", False)}


def write_llama(raw: dict[str, Any], model: ModelConfig) -> None:
    """Write rotary settings and biases."""
    write_rope(raw, model)
    raw["attention_bias"], raw["mlp_bias"] = model.o_bias, model.mlp_bias


def _read_mistral(fields: Fields, num_layers: int) -> dict[str, Any]:
    given = "sliding_window" in fields.values
    window = fields.whole_or_none("sliding_window") if given else 4096
    return rope(fields) | {"sliding_window": window}


def write_mistral(raw: dict[str, Any], model: ModelConfig) -> None:
    """Write rotary settings and the window of all layers."""
    write_rope(raw, model)
    raw["sliding_window"] = model.sliding_window


LLAMA = Family(
    "LlamaForCausalLM",
    "Llama 2, 3, 3.1 and others of their shape",
    Usual(kv_heads=0),
    _read_llama,
    write_llama,
    fits=lambda model: True,
)

MISTRAL = Family(
    "MistralForCausalLM",
    "Mistral 7B and others of its shape",
    Usual(),
    _read_mistral,
    write_mistral,
    fits=lambda model: any(mixer.window for mixer in attention(model)),
)
