"""MiniMax M2: partial rotation, q and k normalised over all heads, a router of sigmoids."""

from typing import Any

from hcp_jax.models.config import ModelConfig
from hcp_jax.models.hf import rope_json
from hcp_jax.models.hf.families.family import (
    EXPERTS_W123,
    Family,
    Usual,
    balance,
    refuse_jitter,
    rope,
    whole_or,
    write_rope,
    write_share,
)
from hcp_jax.models.hf.json_fields import Fields
from hcp_jax.models.moe_config import MoEConfig


def _read_minimax_m2(fields: Fields, num_layers: int) -> dict[str, Any]:
    refuse_jitter(fields)
    share = 1.0
    if fields.values.get("rotary_dim") is not None:
        share = fields.whole("rotary_dim") / whole_or("head_dim", 128, fields)
    return rope(fields, 5_000_000.0) | {
        "qk_norm": True,
        "qk_norm_over": "heads",
        "rotary_share": rope_json.read_share(fields, share),
        "moe": MoEConfig(
            num_experts=whole_or("num_local_experts", 256, fields),
            num_experts_per_tok=whole_or("num_experts_per_tok", 8, fields),
            moe_intermediate_size=fields.size("intermediate_size"),
            router="sigmoid",
            score_correction=True,
            router_aux_loss_coef=balance(fields),
        ),
    }


def _write_minimax_m2(raw: dict[str, Any], model: ModelConfig) -> None:
    write_rope(raw, model)
    write_share(raw, model)
    raw.pop("rotary_dim", None)
    moe = model.moe
    if moe is not None:
        raw["num_local_experts"] = moe.num_experts
        raw["intermediate_size"] = moe.moe_intermediate_size
        raw["num_experts_per_tok"] = moe.num_experts_per_tok
        raw["router_aux_loss_coef"] = moe.router_aux_loss_coef


MINIMAX_M2 = Family(
    "MiniMaxM2ForCausalLM",
    "MiniMax M2, without depths of multi-token prediction",
    Usual(kv_heads=8, head_dim=128),
    _read_minimax_m2,
    _write_minimax_m2,
    fits=lambda model: (
        model.moe is not None and model.moe.router == "sigmoid" and model.qk_norm_over == "heads"
    ),
    partial_rotary=True,
    renamed={"mlp.gate.correction": "mlp.e_score_correction_bias"} | EXPERTS_W123,
)
