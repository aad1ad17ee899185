"""Qwen2 and Qwen3: dense, and with experts."""

from typing import Any

from hcp_jax.base.terminal import printable
from hcp_jax.models.config import ModelConfig
from hcp_jax.models.hf.families.family import (
    FULL,
    SLIDING,
    Family,
    Usual,
    attention,
    balance,
    biases,
    dense_layers,
    period,
    rope,
    sliding_layers,
    whole_or,
    write_rope,
)
from hcp_jax.models.hf.json_fields import Fields
from hcp_jax.models.moe_config import MoEConfig


def _read_qwen2(fields: Fields, num_layers: int) -> dict[str, Any]:
    return rope(fields) | {"qkv_bias": True} | _qwen_windows(fields, num_layers)


def _read_qwen3(fields: Fields, num_layers: int) -> dict[str, Any]:
    return rope(fields) | biases(fields) | {"qk_norm": True} | _qwen_windows(fields, num_layers)


def _qwen_windows(fields: Fields, num_layers: int) -> dict[str, Any]:
    """Return the windows of Qwen: on layers from max_window_layers on, or by layer_types."""
    if not fields.flag("use_sliding_window", False):
        if any(sliding_layers(fields, [False] * num_layers)):
            raise NotImplementedError(
                f"{fields.place}: layer_types={printable(repr(fields.values['layer_types']), 80)} "
                "with use_sliding_window=False is not supported; say whether there is a window."
            )
        return {}
    given = "sliding_window" in fields.values
    window = fields.whole_or_none("sliding_window") if given else 4096
    first = 28
    if fields.values.get("max_window_layers") is not None:
        first = fields.whole("max_window_layers", least=0)
    sliding = sliding_layers(fields, [i >= first for i in range(num_layers)])
    if window is None or not any(sliding):
        return {}
    if all(sliding):
        return {"sliding_window": window}
    letters = "".join("W" if slides else "A" for slides in sliding)
    return {"sliding_window": window, "layers": period(letters)}


def _write_qwen(raw: dict[str, Any], model: ModelConfig) -> None:
    write_rope(raw, model)
    if raw["model_type"].startswith("qwen3"):
        raw["attention_bias"] = model.o_bias
    windows = [mixer.window for mixer in attention(model)]
    window = next((w for w in windows if w is not None), None)
    raw["use_sliding_window"], raw["sliding_window"] = window is not None, window
    raw["max_window_layers"] = windows.index(window) if window else model.num_layers
    raw["layer_types"] = [FULL if w is None else SLIDING for w in windows]


def _read_qwen3_moe(fields: Fields, num_layers: int) -> dict[str, Any]:
    if fields.flag("use_sliding_window", False):
        raise NotImplementedError(
            f"{fields.place}: use_sliding_window of qwen3_moe is not supported; set it to false."
        )
    number = "num_experts" if "num_experts" in fields.values else "num_local_experts"
    moe = MoEConfig(
        num_experts=whole_or(number, 128, fields),
        num_experts_per_tok=whole_or("num_experts_per_tok", 8, fields),
        moe_intermediate_size=whole_or("moe_intermediate_size", 768, fields),
        norm_topk_prob=fields.flag("norm_topk_prob", False),
        router_aux_loss_coef=balance(fields),
        first_k_dense_replace=dense_layers(fields),
        decoder_sparse_step=whole_or("decoder_sparse_step", 1, fields),
    )
    return rope(fields) | biases(fields) | {"qk_norm": True, "moe": moe}


def _write_qwen3_moe(raw: dict[str, Any], model: ModelConfig) -> None:
    write_rope(raw, model)
    raw["attention_bias"] = model.o_bias
    raw["use_sliding_window"], raw["sliding_window"] = False, None
    moe = model.moe
    if moe is not None:
        raw.pop("num_local_experts", None)
        raw["num_experts"] = moe.num_experts
        raw["mlp_only_layers"] = list(range(moe.first_k_dense_replace))
        for name in ("num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"):
            raw[name] = getattr(moe, name)
        for name in ("router_aux_loss_coef", "decoder_sparse_step"):
            raw[name] = getattr(moe, name)


QWEN2 = Family(
    "Qwen2ForCausalLM",
    "Qwen2 and Qwen2.5, dense",
    Usual(),
    _read_qwen2,
    _write_qwen,
    fits=lambda model: model.qkv_bias and not model.o_bias,
)

QWEN3 = Family(
    "Qwen3ForCausalLM",
    "Qwen3, dense",
    Usual(head_dim=128),
    _read_qwen3,
    _write_qwen,
    fits=lambda model: model.qk_norm,
)

QWEN3_MOE = Family(
    "Qwen3MoeForCausalLM",
    "Qwen3 with experts: 30B-A3B, 235B-A22B and others of their shape",
    Usual(kv_heads=4),
    _read_qwen3_moe,
    _write_qwen3_moe,
    fits=lambda model: model.moe is not None and model.qk_norm,
)
