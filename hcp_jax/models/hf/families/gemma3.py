"""Gemma 3, text: two rotations, four norms."""

import math
from typing import Any

from hcp_jax.base.terminal import printable
from hcp_jax.models.config import ModelConfig
from hcp_jax.models.hf import rope_json
from hcp_jax.models.hf.families.family import (
    FULL,
    SLIDING,
    ActivationKey,
    Family,
    Usual,
    attention,
    biases,
    period,
    sliding_layers,
)
from hcp_jax.models.hf.json_fields import Fields
from hcp_jax.models.pattern import LayerConfig


def _read_gemma3(fields: Fields, num_layers: int) -> dict[str, Any]:
    every = 6
    for key in ("sliding_window_pattern", "_sliding_window_pattern"):
        if fields.values.get(key) is not None:
            every = fields.whole(key)
    sliding = sliding_layers(fields, [(i + 1) % every != 0 for i in range(num_layers)])
    given = "sliding_window" in fields.values
    window = fields.whole("sliding_window") if given else 4096
    (theta, scaling), (local_theta, local_scaling) = _gemma_ropes(fields)
    near = LayerConfig(sliding_window=window, rope_theta=local_theta, rope_scaling=local_scaling)
    far = LayerConfig(rope_scaling=scaling)
    scalar = 256
    if "query_pre_attn_scalar" in fields.values:
        scalar = fields.whole("query_pre_attn_scalar")
    return biases(fields) | {
        "rope_theta": theta,
        "layers": tuple(near if slides else far for slides in period(sliding)),
        "qk_norm": True,
        "attention_scale": scalar**-0.5,
        "final_soft_cap": fields.number_or_none("final_logit_softcapping", 1e-6, 1e9),
        "embedding_scale": math.sqrt(fields.size("hidden_size")),
        "norms": "both",
        "norm_shifted": True,
        "activation": "gelu_tanh",
    }


def _gemma_ropes(fields: Fields) -> tuple[rope_json.Rope, rope_json.Rope]:
    """Return the rotation of full and of sliding layers, from either form of the file."""
    both = fields.mapping("rope_parameters")
    if not set(both.values) <= {FULL, SLIDING}:
        raise NotImplementedError(
            f"{fields.place}: rope_parameters={printable(repr(both.values), 80)} is not supported "
            f"for gemma3_text; it needs the parts {FULL} and {SLIDING}."
        )
    far, near = both.mapping(FULL), both.mapping(SLIDING)
    far = Fields({**far.values, **fields.mapping("rope_scaling").values}, far.place)
    for part in (far, near):
        rope_json.require_whole_heads(part)
    theta = fields.number_or_none("rope_theta", *rope_json.THETA) or 1_000_000.0
    local = fields.number_or_none("rope_local_base_freq", *rope_json.THETA) or 10_000.0
    return rope_json.read_part(far, fields, theta), rope_json.read_part(near, fields, local)


def _write_gemma3(raw: dict[str, Any], model: ModelConfig) -> None:
    mixers = attention(model)
    near = next((m for m in mixers if m.window is not None), mixers[0])
    far = next((m for m in mixers if m.window is None), mixers[0])
    for key, rope in (("rope_local_base_freq", near.rotary), ("rope_theta", far.rotary)):
        if rope is not None:
            rope_json.write(raw, rope.theta, rope.scaling)
            raw[key] = rope.theta
    raw["sliding_window"] = near.window or 4096
    raw["layer_types"] = [FULL if m.window is None else SLIDING for m in mixers]
    raw["query_pre_attn_scalar"] = round((far.scale or far.head_size**-0.5) ** -2)
    raw["final_logit_softcapping"] = model.final_soft_cap
    raw["attention_bias"] = model.o_bias


GEMMA3_TEXT = Family(
    "Gemma3ForCausalLM",
    "Gemma 3, text",
    Usual(kv_heads=4, head_dim=256, tied=True),
    _read_gemma3,
    _write_gemma3,
    fits=lambda model: model.norms == "both" or model.norm_shifted,
    activation=ActivationKey("hidden_activation", ("gelu_pytorch_tanh",)),
)
