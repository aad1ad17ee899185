"""Mixtral."""

from typing import Any

from hcp_jax.models.config import ModelConfig
from hcp_jax.models.hf.families.family import (
    EXPERTS_W123,
    Family,
    Usual,
    balance,
    refuse_jitter,
    rope,
    whole_or,
)
from hcp_jax.models.hf.families.llama import write_mistral
from hcp_jax.models.hf.json_fields import Fields
from hcp_jax.models.moe_config import MoEConfig


def _read_mixtral(fields: Fields, num_layers: int) -> dict[str, Any]:
    refuse_jitter(fields)
    moe = MoEConfig(
        num_experts=whole_or("num_local_experts", 8, fields),
        num_experts_per_tok=whole_or("num_experts_per_tok", 2, fields),
        moe_intermediate_size=fields.size("intermediate_size"),
        router_aux_loss_coef=balance(fields),
    )
    window = fields.whole_or_none("sliding_window")
    return rope(fields, 1_000_000.0) | {"sliding_window": window, "moe": moe}


def _write_mixtral(raw: dict[str, Any], model: ModelConfig) -> None:
    write_mistral(raw, model)
    if model.moe is not None:
        raw["num_local_experts"] = model.moe.num_experts
        raw["intermediate_size"] = model.moe.moe_intermediate_size
        raw["num_experts_per_tok"] = model.moe.num_experts_per_tok
        raw["router_aux_loss_coef"] = model.moe.router_aux_loss_coef


MIXTRAL = Family(
    "MixtralForCausalLM",
    "Mixtral 8x7B, 8x22B and others of their shape",
    Usual(kv_heads=8, epsilon=1e-5),
    _read_mixtral,
    _write_mixtral,
    fits=lambda model: model.moe is not None,
    renamed=EXPERTS_W123,
)
