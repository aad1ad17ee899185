"""Qwen3-Next: gated delta nets, every fourth layer gated attention, experts in all layers."""

from typing import Any

from hcp_jax.models.config import ModelConfig
from hcp_jax.models.hf import rope_json
from hcp_jax.models.hf.families.family import (
    FULL,
    Family,
    Usual,
    balance,
    biases,
    dense_layers,
    kinds,
    period,
    rope,
    whole_or,
    write_rope,
    write_share,
)
from hcp_jax.models.hf.json_fields import Fields
from hcp_jax.models.hf.parts import Part, rows
from hcp_jax.models.moe_config import MoEConfig
from hcp_jax.models.recurrent_specs import GatedDeltaConfig, GatedDeltaSpec
from hcp_jax.models.specs import AttentionSpec, LayerSpec

_LINEAR = "linear_attention"
_SIZES = {
    "num_key_heads": ("linear_num_key_heads", 16),
    "num_value_heads": ("linear_num_value_heads", 32),
    "key_size": ("linear_key_head_dim", 128),
    "value_size": ("linear_value_head_dim", 128),
    "conv_size": ("linear_conv_kernel_dim", 4),
}


def _read_qwen3_next(fields: Fields, num_layers: int) -> dict[str, Any]:
    every = whole_or("full_attention_interval", 4, fields)
    usual = [FULL if (i + 1) % every == 0 else _LINEAR for i in range(num_layers)]
    mixers = kinds(fields, usual, (_LINEAR, FULL))
    own: dict[str, Any] = {}
    if _LINEAR in mixers:
        sizes = {ours: whole_or(key, size, fields) for ours, (key, size) in _SIZES.items()}
        own["gated_delta"] = GatedDeltaConfig(**sizes)
        own["layers"] = period("".join("A" if kind == FULL else "G" for kind in mixers))
    moe = MoEConfig(
        num_experts=whole_or("num_experts", 512, fields),
        num_experts_per_tok=whole_or("num_experts_per_tok", 10, fields),
        moe_intermediate_size=whole_or("moe_intermediate_size", 512, fields),
        norm_topk_prob=fields.flag("norm_topk_prob", True),
        shared_expert_intermediate_size=whole_or("shared_expert_intermediate_size", 512, fields),
        shared_expert_gate=True,
        router_aux_loss_coef=balance(fields),
        first_k_dense_replace=dense_layers(fields),
        decoder_sparse_step=whole_or("decoder_sparse_step", 1, fields),
    )
    return (
        rope(fields)
        | biases(fields)
        | own
        | {
            "qk_norm": True,
            "norm_shifted": True,
            "output_gate": True,
            "rotary_share": rope_json.read_share(fields, 0.25),
            "moe": moe,
        }
    )


def _write_qwen3_next(raw: dict[str, Any], model: ModelConfig) -> None:
    write_rope(raw, model)
    write_share(raw, model)
    raw["attention_bias"] = model.o_bias
    raw["layer_types"] = [
        FULL if isinstance(layer.mixer, AttentionSpec) else _LINEAR for layer in model.specs
    ]
    if model.gated_delta is not None:
        for ours, (theirs, _) in _SIZES.items():
            raw[theirs] = getattr(model.gated_delta, ours)
    moe = model.moe
    if moe is not None:
        raw["num_experts"] = moe.num_experts
        raw["mlp_only_layers"] = list(range(moe.first_k_dense_replace))
        for name in ("num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"):
            raw[name] = getattr(moe, name)
        for name in ("router_aux_loss_coef", "decoder_sparse_step"):
            raw[name] = getattr(moe, name)
        raw["shared_expert_intermediate_size"] = moe.shared_expert_intermediate_size


def _part(spec: LayerSpec, path: tuple[str, ...], expert: int | None) -> Part | None:
    if isinstance(spec.mixer, AttentionSpec) and path[0] == "self_attn":
        return _query_or_gate(spec.mixer, path)
    if isinstance(spec.mixer, GatedDeltaSpec) and path[0] == "linear_attn":
        return _delta_net(spec.mixer, path[1])
    return None


def _query_or_gate(mixer: AttentionSpec, path: tuple[str, ...]) -> Part | None:
    """Return the part of q_proj, in which each head has the rows of its query, then its gate."""
    if path[1] not in ("q_proj", "gate_proj"):
        return None
    heads, size = mixer.num_heads, mixer.head_size
    own = slice(0, size) if path[1] == "q_proj" else slice(size, 2 * size)
    others = (mixer.hidden_size,) if path[2] == "kernel" else ()
    name = f"self_attn.q_proj.{'weight' if others else 'bias'}"
    return _by_head(name, heads, 2 * size, own, others)


def _delta_net(mixer: GatedDeltaSpec, name: str) -> Part | None:
    """Return the part of the projections, in which each key head has its rows, or of the conv."""
    keys, share = mixer.num_key_heads, mixer.num_value_heads // mixer.num_key_heads
    values = share * mixer.value_size
    k, width = mixer.key_size, (mixer.hidden_size,)
    qkvz = {
        "q_proj": slice(0, k),
        "k_proj": slice(k, 2 * k),
        "v_proj": slice(2 * k, 2 * k + values),
        "z_proj": slice(2 * k + values, 2 * (k + values)),
    }
    if name in qkvz:
        stored = "linear_attn.in_proj_qkvz.weight"
        return _by_head(stored, keys, 2 * (k + values), qkvz[name], width)
    ba = {"b_proj": slice(0, share), "a_proj": slice(share, 2 * share)}
    if name in ba:
        return _by_head("linear_attn.in_proj_ba.weight", keys, 2 * share, ba[name], width)
    convs = ("q_conv", "k_conv", "v_conv")
    if name in convs:
        sizes = [keys * k, keys * k, keys * values]
        others = (1, mixer.conv_size)
        return rows("linear_attn.conv1d.weight", sizes, convs.index(name), others)
    return None


def _by_head(name: str, heads: int, each: int, own: slice, others: tuple[int, ...]) -> Part:
    """Return the rows `own` of every head's `each` rows."""
    inside = (slice(None), own)
    axes = (2, 0, 1) if others else (0, 1)
    return Part(name, (heads * each, *others), slice(None), (heads, each, *others), inside, axes)


QWEN3_NEXT = Family(
    "Qwen3NextForCausalLM",
    "Qwen3-Next, without depths of multi-token prediction",
    Usual(kv_heads=2, head_dim=256),
    _read_qwen3_next,
    _write_qwen3_next,
    fits=lambda model: model.moe is not None and model.output_gate,
    partial_rotary=True,
    mixers=("attention", "gated_delta"),
    renamed={"shared_experts": "shared_expert"},
    part=_part,
)
