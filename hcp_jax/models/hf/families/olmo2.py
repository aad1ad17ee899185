"""OLMo 2: norms after attention and MLP."""

from typing import Any

from hcp_jax.models.config import ModelConfig
from hcp_jax.models.hf.families.family import (
    Family,
    Usual,
    biases,
    rope,
    write_rope,
)
from hcp_jax.models.hf.json_fields import Fields


def _read_olmo2(fields: Fields, num_layers: int) -> dict[str, Any]:
    own = {"norms": "after", "qk_norm": True, "qk_norm_over": "heads"}
    return rope(fields) | biases(fields) | own


def _write_olmo2(raw: dict[str, Any], model: ModelConfig) -> None:
    write_rope(raw, model)
    raw["attention_bias"] = model.o_bias


OLMO2 = Family(
    "Olmo2ForCausalLM",
    "OLMo 2",
    Usual(kv_heads=0, epsilon=1e-5),
    _read_olmo2,
    _write_olmo2,
    fits=lambda model: model.norms == "after",
)
