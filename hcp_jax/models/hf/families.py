"""List the supported model families, and what each reads from and writes into config.json."""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from hcp_jax.base.terminal import printable
from hcp_jax.models.config import ModelConfig
from hcp_jax.models.hf import rope_json
from hcp_jax.models.hf.json_fields import Fields
from hcp_jax.models.moe_config import MoEConfig
from hcp_jax.models.pattern import LayerConfig
from hcp_jax.models.specs import AttentionSpec

_SLIDING, _FULL = "sliding_attention", "full_attention"


class Usual(NamedTuple):
    """Values of missing settings, as `transformers` has them.

    Attributes:
        kv_heads: number of kv heads; None if the setting must be there, 0 for as many as heads.
        head_dim: head size; None for hidden size over heads.
        tied: whether the output head is the embedding.
        epsilon: of RMSNorm.
    """

    kv_heads: int | None = None
    head_dim: int | None = None
    tied: bool = False
    epsilon: float = 1e-6


class ActivationKey(NamedTuple):
    """Key of the MLP's activation, and the values that mean the family's own."""

    key: str = "hidden_act"
    names: tuple[str, ...] = ("silu", "swish")


class Family(NamedTuple):
    """One supported family.

    Attributes:
        architecture: class in `transformers`.
        title: name for people.
        usual: values of missing settings.
        activation: of the MLP.
        read: returns fields of `ModelConfig` from the file and the number of layers.
        write: writes the same fields into a config.json.
        renamed: name in its folders of each module or tensor of a mixture of experts that has
            another name there.
    """

    architecture: str
    title: str
    usual: Usual
    activation: ActivationKey
    read: Callable[[Fields, int], dict[str, Any]]
    write: Callable[[dict[str, Any], ModelConfig], None]
    renamed: Mapping[str, str] = MappingProxyType({"correction": "e_score_correction_bias"})


def family_of(model: ModelConfig) -> str:
    """Return the family whose parameters and layers are most like the model's."""
    if model.moe is not None:
        return "qwen3_moe" if model.qk_norm else "mixtral"
    if model.norms != "before" or model.norm_shifted:
        return "gemma3_text" if model.norms == "both" or model.norm_shifted else "olmo2"
    mixers = _attention(model)
    if any(mixer.rotary is None for mixer in mixers):
        return "smollm3"
    if model.qk_norm or (model.qkv_bias and not model.o_bias):
        return "qwen3" if model.qk_norm else "qwen2"
    return "mistral" if any(mixer.window for mixer in mixers) else "llama"


def _attention(model: ModelConfig) -> list[AttentionSpec]:
    """Return the mixers of all layers; every supported family has attention alone."""
    return [layer.mixer for layer in model.specs if isinstance(layer.mixer, AttentionSpec)]


def _rope(fields: Fields, theta: float = 10_000.0) -> dict[str, Any]:
    theta, scaling = rope_json.read(fields, theta)
    return {"rope_theta": theta, "rope_scaling": scaling}


def _write_rope(raw: dict[str, Any], model: ModelConfig) -> None:
    rope_json.write(raw, model.rope_theta, model.rope_scaling)


def _biases(fields: Fields) -> dict[str, Any]:
    bias = fields.flag("attention_bias", False)
    return {"qkv_bias": bias, "o_bias": bias}


def _read_llama(fields: Fields, num_layers: int) -> dict[str, Any]:
    return _rope(fields) | _biases(fields) | {"mlp_bias": fields.flag("mlp_bias", False)}


def _write_llama(raw: dict[str, Any], model: ModelConfig) -> None:
    _write_rope(raw, model)
    raw["attention_bias"], raw["mlp_bias"] = model.o_bias, model.mlp_bias


def _read_mistral(fields: Fields, num_layers: int) -> dict[str, Any]:
    given = "sliding_window" in fields.values
    window = fields.whole_or_none("sliding_window") if given else 4096
    return _rope(fields) | {"sliding_window": window}


def _write_mistral(raw: dict[str, Any], model: ModelConfig) -> None:
    _write_rope(raw, model)
    raw["sliding_window"] = model.sliding_window


def _read_qwen2(fields: Fields, num_layers: int) -> dict[str, Any]:
    return _rope(fields) | {"qkv_bias": True} | _qwen_windows(fields, num_layers)


def _read_qwen3(fields: Fields, num_layers: int) -> dict[str, Any]:
    return _rope(fields) | _biases(fields) | {"qk_norm": True} | _qwen_windows(fields, num_layers)


def _qwen_windows(fields: Fields, num_layers: int) -> dict[str, Any]:
    """Return the windows of Qwen: on layers from max_window_layers on, or by layer_types."""
    if not fields.flag("use_sliding_window", False):
        if any(_sliding(fields, [False] * num_layers)):
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
    sliding = _sliding(fields, [i >= first for i in range(num_layers)])
    if window is None or not any(sliding):
        return {}
    if all(sliding):
        return {"sliding_window": window}
    letters = "".join("W" if slides else "A" for slides in sliding)
    return {"sliding_window": window, "layers": _period(letters)}


def _write_qwen(raw: dict[str, Any], model: ModelConfig) -> None:
    _write_rope(raw, model)
    if raw["model_type"].startswith("qwen3"):
        raw["attention_bias"] = model.o_bias
    windows = [mixer.window for mixer in _attention(model)]
    window = next((w for w in windows if w is not None), None)
    raw["use_sliding_window"], raw["sliding_window"] = window is not None, window
    raw["max_window_layers"] = windows.index(window) if window else model.num_layers
    raw["layer_types"] = [_FULL if w is None else _SLIDING for w in windows]


def _read_mixtral(fields: Fields, num_layers: int) -> dict[str, Any]:
    if fields.number_or_none("router_jitter_noise", 0, 1):
        raise NotImplementedError(
            f"{fields.place}: router_jitter_noise={fields.values['router_jitter_noise']} is not "
            "supported; routers have no noise here. Set it to 0."
        )
    moe = MoEConfig(
        num_experts=_whole_or("num_local_experts", 8, fields),
        num_experts_per_tok=_whole_or("num_experts_per_tok", 2, fields),
        moe_intermediate_size=fields.size("intermediate_size"),
        router_aux_loss_coef=_balance(fields),
    )
    window = fields.whole_or_none("sliding_window")
    return _rope(fields, 1_000_000.0) | {"sliding_window": window, "moe": moe}


def _write_mixtral(raw: dict[str, Any], model: ModelConfig) -> None:
    _write_mistral(raw, model)
    if model.moe is not None:
        raw["num_local_experts"] = model.moe.num_experts
        raw["intermediate_size"] = model.moe.moe_intermediate_size
        raw["num_experts_per_tok"] = model.moe.num_experts_per_tok
        raw["router_aux_loss_coef"] = model.moe.router_aux_loss_coef


def _read_qwen3_moe(fields: Fields, num_layers: int) -> dict[str, Any]:
    if fields.flag("use_sliding_window", False):
        raise NotImplementedError(
            f"{fields.place}: use_sliding_window of qwen3_moe is not supported; set it to false."
        )
    dense = fields.values.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise fields.wrong("mlp_only_layers", "a list of layers")
    if dense != list(range(len(dense))):
        raise NotImplementedError(
            f"{fields.place}: mlp_only_layers={printable(repr(dense), 80)} is not supported; only "
            "the first layers may have an MLP alone: 0, 1, 2 and so on."
        )
    number = "num_experts" if "num_experts" in fields.values else "num_local_experts"
    moe = MoEConfig(
        num_experts=_whole_or(number, 128, fields),
        num_experts_per_tok=_whole_or("num_experts_per_tok", 8, fields),
        moe_intermediate_size=_whole_or("moe_intermediate_size", 768, fields),
        norm_topk_prob=fields.flag("norm_topk_prob", False),
        router_aux_loss_coef=_balance(fields),
        first_k_dense_replace=len(dense),
        decoder_sparse_step=_whole_or("decoder_sparse_step", 1, fields),
    )
    return _rope(fields) | _biases(fields) | {"qk_norm": True, "moe": moe}


def _write_qwen3_moe(raw: dict[str, Any], model: ModelConfig) -> None:
    _write_rope(raw, model)
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


def _whole_or(key: str, usual: int, fields: Fields) -> int:
    return fields.whole(key, 2**22) if key in fields.values else usual


def _balance(fields: Fields) -> float:
    found = fields.number_or_none("router_aux_loss_coef", 0, 1e6)
    return 1e-3 if found is None else found


def _read_olmo2(fields: Fields, num_layers: int) -> dict[str, Any]:
    own = {"norms": "after", "qk_norm": True, "qk_norm_over": "heads"}
    return _rope(fields) | _biases(fields) | own


def _write_olmo2(raw: dict[str, Any], model: ModelConfig) -> None:
    _write_rope(raw, model)
    raw["attention_bias"] = model.o_bias


def _read_smollm3(fields: Fields, num_layers: int) -> dict[str, Any]:
    if fields.flag("use_sliding_window", False) or any(_sliding(fields, [False] * num_layers)):
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
        own["layers"] = tuple(LayerConfig(rotary=None if r else False) for r in _period(rotary))
    return _rope(fields, 2_000_000.0) | _biases(fields) | own


def _write_smollm3(raw: dict[str, Any], model: ModelConfig) -> None:
    rotary = [mixer.rotary is not None for mixer in _attention(model)]
    _write_llama(raw, model)
    raw["no_rope_layers"] = [int(r) for r in rotary]
    raw.setdefault("pad_token_id", None)  # the usual one may be past a smaller vocabulary
    raw["use_sliding_window"], raw["layer_types"] = False, [_FULL] * model.num_layers


def _read_gemma3(fields: Fields, num_layers: int) -> dict[str, Any]:
    every = 6
    for key in ("sliding_window_pattern", "_sliding_window_pattern"):
        if fields.values.get(key) is not None:
            every = fields.whole(key)
    sliding = _sliding(fields, [(i + 1) % every != 0 for i in range(num_layers)])
    given = "sliding_window" in fields.values
    window = fields.whole("sliding_window") if given else 4096
    (theta, scaling), (local_theta, local_scaling) = _gemma_ropes(fields)
    near = LayerConfig(sliding_window=window, rope_theta=local_theta, rope_scaling=local_scaling)
    far = LayerConfig(rope_scaling=scaling)
    scalar = 256
    if "query_pre_attn_scalar" in fields.values:
        scalar = fields.whole("query_pre_attn_scalar")
    return _biases(fields) | {
        "rope_theta": theta,
        "layers": tuple(near if slides else far for slides in _period(sliding)),
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
    if not set(both.values) <= {_FULL, _SLIDING}:
        raise NotImplementedError(
            f"{fields.place}: rope_parameters={printable(repr(both.values), 80)} is not supported "
            f"for gemma3_text; it needs the parts {_FULL} and {_SLIDING}."
        )
    far, near = both.mapping(_FULL), both.mapping(_SLIDING)
    far = Fields({**far.values, **fields.mapping("rope_scaling").values}, far.place)
    for part in (far, near):
        rope_json.require_whole_heads(part)
    theta = fields.number_or_none("rope_theta", *rope_json.THETA) or 1_000_000.0
    local = fields.number_or_none("rope_local_base_freq", *rope_json.THETA) or 10_000.0
    return rope_json.read_part(far, fields, theta), rope_json.read_part(near, fields, local)


def _write_gemma3(raw: dict[str, Any], model: ModelConfig) -> None:
    mixers = _attention(model)
    near = next((m for m in mixers if m.window is not None), mixers[0])
    far = next((m for m in mixers if m.window is None), mixers[0])
    for key, rope in (("rope_local_base_freq", near.rotary), ("rope_theta", far.rotary)):
        if rope is not None:
            rope_json.write(raw, rope.theta, rope.scaling)
            raw[key] = rope.theta
    raw["sliding_window"] = near.window or 4096
    raw["layer_types"] = [_FULL if m.window is None else _SLIDING for m in mixers]
    raw["query_pre_attn_scalar"] = round((far.scale or far.head_size**-0.5) ** -2)
    raw["final_logit_softcapping"] = model.final_soft_cap
    raw["attention_bias"] = model.o_bias


def _sliding(fields: Fields, usual: list[bool]) -> list[bool]:
    """Return whether each layer has the window: by layer_types, or as usual if there is none."""
    kinds = fields.values.get("layer_types")
    if kinds is None:
        return usual
    known = isinstance(kinds, list) and all(kind in (_SLIDING, _FULL) for kind in kinds)
    if not known or len(kinds) != len(usual):
        raise fields.wrong("layer_types", f"a list of {len(usual)} times {_SLIDING} or {_FULL}")
    return [kind == _SLIDING for kind in kinds]


def _period(layers: Sequence[Any]) -> Any:
    """Return the shortest pattern that gives `layers` where it is repeated and cut off."""
    number = len(layers)
    return layers[: next(p for p in range(1, number + 1) if layers[p:] == layers[: number - p])]


_SWIGLU = ActivationKey()
FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        "Llama 2, 3, 3.1 and others of their shape",
        Usual(kv_heads=0),
        _SWIGLU,
        _read_llama,
        _write_llama,
    ),
    "mistral": Family(
        "MistralForCausalLM",
        "Mistral 7B and others of its shape",
        Usual(),
        _SWIGLU,
        _read_mistral,
        _write_mistral,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        "Qwen2 and Qwen2.5, dense",
        Usual(),
        _SWIGLU,
        _read_qwen2,
        _write_qwen,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        "Qwen3, dense",
        Usual(head_dim=128),
        _SWIGLU,
        _read_qwen3,
        _write_qwen,
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        "Mixtral 8x7B, 8x22B and others of their shape",
        Usual(kv_heads=8, epsilon=1e-5),
        _SWIGLU,
        _read_mixtral,
        _write_mixtral,
        {"mlp": "block_sparse_moe", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        "Qwen3 with experts: 30B-A3B, 235B-A22B and others of their shape",
        Usual(kv_heads=4),
        _SWIGLU,
        _read_qwen3_moe,
        _write_qwen3_moe,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        "Gemma 3, text",
        Usual(kv_heads=4, head_dim=256, tied=True),
        ActivationKey("hidden_activation", ("gelu_pytorch_tanh",)),
        _read_gemma3,
        _write_gemma3,
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        "OLMo 2",
        Usual(kv_heads=0, epsilon=1e-5),
        _SWIGLU,
        _read_olmo2,
        _write_olmo2,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        "SmolLM3",
        Usual(kv_heads=4, tied=True),
        _SWIGLU,
        _read_smollm3,
        _write_smollm3,
    ),
}
"""Supported families by model_type."""
