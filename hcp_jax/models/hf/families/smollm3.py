"""SmolLM3: layers without positions."""

from typing import Any

from hcp_jax.models.config import ModelConfig
from hcp_jax.models.hf.families.family import (
    FULL,
    Family,
    Usual,
    attention,
    biases,
    period,
    rope,
    sliding_layers,
)
from hcp_jax.models.hf.families.llama import write_llama
from hcp_jax.models.hf.json_fields import Fields
from hcp_jax.models.pattern import LayerConfig


def _read_smollm3(fields: Fields, num_layers: int) -> dict[str, Any]:
    if fields.flag("use_sliding_window", False) or any(
        sliding_layers(fields, [False] * num_layers)
    ):
        raise NotImplementedError(
            f"{fields.place}: use_sliding_window of smollm3 is not supported; set it to false, and "
            "layer_types to null."
        )
    if fields.values.get("no_rope_layers") is None:
        every = 4
        if "no_rope_layer_interval" in fields.values:
            every = fields.whole("no_rope_layer_interval")
        rotary = [(i + 1) % every != 0 for i in range(num_layers)]
    else:
        flags = fields.values["no_rope_layers"]
        if not isinstance(flags, list) or len(flags) < num_layers or not set(flags) <= {0, 1}:
            raise fields.wrong("no_rope_layers", f"a list of {num_layers} numbers, 0 or 1")
        rotary = [bool(flag) for flag in flags[:num_layers]]
    own: dict[str, Any] = {"mlp_bias": fields.flag("mlp_bias", False)}
    if not any(rotary):
        own["rotary"] = False
    elif not all(rotary):
        own["layers"] = tuple(LayerConfig(rotary=None if r else False) for r in period(rotary))
    return rope(fields, 2_000_000.0) | biases(fields) | own


def _write_smollm3(raw: dict[str, Any], model: ModelConfig) -> None:
    rotary = [mixer.rotary is not None for mixer in attention(model)]
    write_llama(raw, model)
    raw["no_rope_layers"] = [int(r) for r in rotary]
    raw.setdefault("pad_token_id", None)  # the usual one may be past a smaller vocabulary
    raw["use_sliding_window"], raw["layer_types"] = False, [FULL] * model.num_layers


SMOLLM3 = Family(
    "SmolLM3ForCausalLM",
    "SmolLM3",
    Usual(kv_heads=4, tied=True),
    _read_smollm3,
    _write_smollm3,
    fits=lambda model: any(mixer.rotary is None for mixer in attention(model)),
)
