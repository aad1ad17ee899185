"""GLM-4.5: partial rotation, first layers dense, a router of sigmoids with a shared expert."""

from typing import Any

from hcp_jax.models.config import ModelConfig
from hcp_jax.models.hf import rope_json
from hcp_jax.models.hf.families.family import (
    Family,
    Usual,
    rope,
    whole_or,
    write_rope,
    write_share,
)
from hcp_jax.models.hf.json_fields import Fields
from hcp_jax.models.moe_config import MoEConfig


def read_deepseek_router(fields: Fields) -> MoEConfig:
    """Return the experts of a file with DeepSeek-V3's names; all of it that is usual for GLM-4.5.

    The load is balanced by the correction of scores alone.
    """
    width = whole_or("moe_intermediate_size", 1408, fields)
    scaling = fields.number_or_none("routed_scaling_factor", 1e-6, 1e6)
    return MoEConfig(
        num_experts=whole_or("n_routed_experts", 128, fields),
        num_experts_per_tok=whole_or("num_experts_per_tok", 8, fields),
        moe_intermediate_size=width,
        router="sigmoid",
        norm_topk_prob=fields.flag("norm_topk_prob", True),
        routed_scaling_factor=1.0 if scaling is None else scaling,
        n_group=whole_or("n_group", 1, fields),
        topk_group=whole_or("topk_group", 1, fields),
        score_correction=True,
        shared_expert_intermediate_size=width * _shared(fields),
        router_aux_loss_coef=0.0,
        first_k_dense_replace=_least_zero("first_k_dense_replace", fields),
    )


def _least_zero(key: str, fields: Fields) -> int:
    return fields.whole(key, 2**22, least=0) if key in fields.values else 1


def _shared(fields: Fields) -> int:
    return _least_zero("n_shared_experts", fields)


def _read_glm4_moe(fields: Fields, num_layers: int) -> dict[str, Any]:
    return rope(fields) | {
        "qkv_bias": fields.flag("attention_bias", False),
        "qk_norm": fields.flag("use_qk_norm", False),
        "rotary_share": rope_json.read_share(fields, 0.5),
        "moe": read_deepseek_router(fields),
    }


def _write_glm4_moe(raw: dict[str, Any], model: ModelConfig) -> None:
    write_rope(raw, model)
    write_share(raw, model)
    raw["attention_bias"], raw["use_qk_norm"] = model.qkv_bias, model.qk_norm
    raw["num_nextn_predict_layers"] = 0
    moe = model.moe
    if moe is not None:
        shared = moe.shared_expert_intermediate_size
        raw["n_routed_experts"] = moe.num_experts
        raw["n_shared_experts"] = shared // moe.moe_intermediate_size
        for name in ("num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"):
            raw[name] = getattr(moe, name)
        for name in ("routed_scaling_factor", "n_group", "topk_group", "first_k_dense_replace"):
            raw[name] = getattr(moe, name)


GLM4_MOE = Family(
    "Glm4MoeForCausalLM",
    "GLM-4.5, 4.6 and others of their shape, without depths of multi-token prediction",
    Usual(kv_heads=8, epsilon=1e-5),
    _read_glm4_moe,
    _write_glm4_moe,
    fits=lambda model: model.moe is not None and model.moe.router == "sigmoid",
    partial_rotary=True,
    renamed={"mlp.gate.correction": "mlp.gate.e_score_correction_bias"},
)
