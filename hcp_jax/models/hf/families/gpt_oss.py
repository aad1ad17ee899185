"""gpt-oss: sinks, a window on every other layer, biases everywhere, clamped experts."""

from typing import Any

from hcp_jax.models.config import ModelConfig
from hcp_jax.models.hf import rope_json
from hcp_jax.models.hf.families.family import (
    FULL,
    SLIDING,
    Family,
    Usual,
    attention,
    balance,
    period,
    sliding_layers,
    whole_or,
    write_rope,
)
from hcp_jax.models.hf.json_fields import Fields
from hcp_jax.models.hf.parts import Part
from hcp_jax.models.layers.rope_scaling import RopeScaling
from hcp_jax.models.moe_config import MoEConfig
from hcp_jax.models.specs import LayerSpec, MoESpec

_ROPE = RopeScaling("yarn", 32.0, 4096, truncate=False)


def _read_gpt_oss(fields: Fields, num_layers: int) -> dict[str, Any]:
    for key, only in (("swiglu_alpha", 1.702), ("swiglu_limit", 7.0)):
        value = fields.number_or_none(key, 0, 1e6)
        if value is not None and value != only:
            raise NotImplementedError(
                f"{fields.place}: {key}={value} is not supported; experts have {only} here."
            )
    given = "sliding_window" in fields.values
    window = fields.whole("sliding_window") if given else 128
    sliding = sliding_layers(fields, [i % 2 == 0 for i in range(num_layers)])
    layers = period("".join("W" if slides else "A" for slides in sliding))
    theta, scaling = rope_json.read(fields, 150_000.0)
    if not fields.mapping("rope_scaling").values and not fields.mapping("rope_parameters").values:
        scaling = _ROPE
    bias = fields.flag("attention_bias", True)
    return {
        "rope_theta": theta,
        "rope_scaling": scaling,
        "sliding_window": window if "W" in layers else None,
        "layers": None if set(layers) == {"W"} or set(layers) == {"A"} else layers,
        "attention_sinks": True,
        "qkv_bias": bias,
        "o_bias": bias,
        "activation": "clamped_silu",
        "moe": MoEConfig(
            num_experts=whole_or(_number_key(fields), 128, fields),
            num_experts_per_tok=whole_or("num_experts_per_tok", 4, fields),
            moe_intermediate_size=fields.size("intermediate_size"),
            router_aux_loss_coef=balance(fields),
            bias=True,
        ),
    }


def _number_key(fields: Fields) -> str:
    return "num_local_experts" if "num_local_experts" in fields.values else "num_experts"


def _write_gpt_oss(raw: dict[str, Any], model: ModelConfig) -> None:
    write_rope(raw, model)
    if model.rope_scaling is None:
        raw["rope_scaling"] = {"rope_type": "default"}
    windows = [mixer.window for mixer in attention(model)]
    raw["sliding_window"] = next((w for w in windows if w is not None), 128)
    raw["layer_types"] = [FULL if w is None else SLIDING for w in windows]
    raw["attention_bias"] = model.o_bias
    moe = model.moe
    if moe is not None:
        raw.pop("num_experts", None)
        raw["num_local_experts"] = moe.num_experts
        raw["intermediate_size"] = moe.moe_intermediate_size
        raw["num_experts_per_tok"] = moe.num_experts_per_tok
        raw["router_aux_loss_coef"] = moe.router_aux_loss_coef


def _part(spec: LayerSpec, path: tuple[str, ...], expert: int | None) -> Part | None:
    """Return the part of the tensors of all experts, in which gate and up have columns in turns."""
    if not isinstance(spec.ffn, MoESpec) or expert is None:
        return None
    ffn, of = spec.ffn, slice(expert, expert + 1)
    inner, outer = ffn.intermediate_size, ffn.hidden_size
    which, kind = path[-1].split("_")
    rest = "_bias" if kind == "bias" else ""
    inputs = () if kind == "bias" else (outer if which != "down" else inner,)
    axes = tuple(range(1 + len(inputs)))
    if which == "down":
        shape = (ffn.num_experts, *inputs, outer)
        return Part(f"mlp.experts.down_proj{rest}", shape, of, shape[1:], (), axes)
    shape = (ffn.num_experts, *inputs, 2 * inner)
    turns: tuple[slice | int, ...] = (
        *[slice(None)] * (len(inputs) + 1),
        ("gate", "up").index(which),
    )
    name = f"mlp.experts.gate_up_proj{rest}"
    return Part(name, shape, of, (*inputs, inner, 2), turns, axes)


GPT_OSS = Family(
    "GptOssForCausalLM",
    "gpt-oss 20B and 120B, not in MXFP4",
    Usual(kv_heads=8, head_dim=64, epsilon=1e-5),
    _read_gpt_oss,
    _write_gpt_oss,
    fits=lambda model: model.moe is not None and model.moe.bias,
    renamed={"mlp.gate": "mlp.router"},
    part=_part,
)
