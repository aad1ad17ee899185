"""Convert the config.json of a Hugging Face folder to a `ModelConfig`, and back.

A setting that this model would compute in another way is refused, with its name and value. Settings
that do not change the result (zero dropout, caches, ids of special tokens) are ignored. A missing
setting has the default of the `transformers` package, version 5.
"""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from hcp_jax.base import reading
from hcp_jax.base.terminal import printable
from hcp_jax.models.config import ModelConfig
from hcp_jax.models.hf import json_fields, model_folder, rope_json
from hcp_jax.models.hf.families import FAMILIES, family_of
from hcp_jax.models.hf.json_fields import Fields
from hcp_jax.models.hf.model_folder import CONFIG
from hcp_jax.models.pattern import LayerConfig

SHAPES = (
    "vocab_size",
    "num_layers",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "qk_norm",
    "qkv_bias",
    "tie_embeddings",
    "attention_sinks",
    "qk_norm_over",
    "o_bias",
    "mlp_bias",
    "activation",
    "norms",
    "norm_shifted",
    "output_gate",
    "mixer",
    "mamba2",
    "gated_delta",
    "kda",
    "moe",
)
"""Fields that determine a model's parameters; weights fit only if all of them are equal."""

READINGS = (
    "rope_theta",
    "rope_scaling",
    "norm_eps",
    "sliding_window",
    "logits_soft_cap",
    "rotary",
    "rotary_share",
    "attention_scale",
    "embedding_scale",
    "final_soft_cap",
    "layers",
)
"""Fields that determine the computation; a run may change them, such as for longer contexts."""

_SIZES = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_heads": "num_attention_heads",
}

_HEADS = json_fields.SIZES["num_key_value_heads"]
# Settings that a pattern of layers may give by layer; the specs of all layers are compared instead.
_BY_LAYER = {field.name for field in dataclasses.fields(LayerConfig)} | {"layers", "moe"}


def read_raw(folder: pathlib.Path) -> dict[str, Any]:
    """Return the config.json of a folder, unchanged.

    Raises:
        ValueError: if there is none, or it is not a JSON object.
    """
    model_folder.require(folder)
    file = model_folder.member(folder, CONFIG)
    raw = reading.read_json(file)
    if not isinstance(raw, dict):
        raise ValueError(f"{file} must hold keys and values, got {type(raw).__name__}.")
    return raw


def model_config(raw: dict[str, Any], place: str = "config.json") -> ModelConfig:
    """Return the model that a config.json describes.

    Args:
        raw: contents of the file.
        place: name of the file in errors.

    Raises:
        NotImplementedError: for a family or an option that this model does not support; names the
            option and its value.
        ValueError: if something is missing or contradictory.
    """
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        known = "; ".join(f"{name} ({each.title})" for name, each in FAMILIES.items())
        raise NotImplementedError(
            f"{place}: model_type={printable(repr(family))} is not supported. Supported are "
            f"{known}."
        )
    _refuse_what_would_differ(raw, family, place)
    fields = Fields(raw, place)
    sizes: dict[str, Any] = {ours: fields.size(theirs) for ours, theirs in _SIZES.items()}
    usual = FAMILIES[family].usual
    if "num_key_value_heads" in raw:
        kv_heads = fields.whole_or_none("num_key_value_heads", _HEADS)
    elif usual.kv_heads is None:
        kv_heads = fields.size("num_key_value_heads")
    else:
        kv_heads = usual.kv_heads
    head_dim = fields.whole_or_none("head_dim", json_fields.SIZES["head_dim"])
    if "head_dim" not in raw:
        head_dim = usual.head_dim
    alike = head_dim is not None and head_dim * sizes["num_heads"] == sizes["hidden_size"]
    epsilon = fields.number_or_none("rms_norm_eps", 1e-12, 0.1)
    return ModelConfig(
        **sizes,
        num_kv_heads=kv_heads or sizes["num_heads"],
        head_size=None if alike else head_dim,
        tie_embeddings=fields.flag("tie_word_embeddings", usual.tied),
        norm_eps=usual.epsilon if epsilon is None else epsilon,
        **FAMILIES[family].read(fields, sizes["num_layers"]),
    )


def reach(raw: dict[str, Any], model: ModelConfig) -> int | None:
    """Return the context length of a model, with its scaling; None if the file does not say it.

    Args:
        raw: its config.json.
        model: the model of this file, with the scaling in use.
    """
    longest = Fields(raw, CONFIG).whole_or_none("max_position_embeddings")
    scaling = model.rope_scaling
    if longest is None or scaling is None:
        return longest
    original = scaling.original_max_position_embeddings or longest
    return max(longest, math.floor(original * scaling.factor))


def differences(names: Sequence[str], there: ModelConfig, here: ModelConfig) -> list[str]:
    """Return the fields of `names` that differ, in words: "num_layers 32 there and 16 here"."""
    return [
        f"{name} {getattr(there, name)!r} there and {getattr(here, name)!r} here"
        for name in _differing(names, there, here)
    ]


def _differing(names: Sequence[str], there: ModelConfig, here: ModelConfig) -> list[str]:
    there, here = _plain(there), _plain(here)
    if there.specs == here.specs:  # one model, however its pattern is written
        names = [name for name in names if name not in _BY_LAYER]
    return [name for name in names if getattr(there, name) != getattr(here, name)]


def _plain(model: ModelConfig) -> ModelConfig:
    """Return the model without what changes neither parameters nor results."""
    recurrent = {
        name: dataclasses.replace(getattr(model, name), chunk=64)
        for name in ("mamba2", "gated_delta", "kda")
        if getattr(model, name) is not None
    }
    return dataclasses.replace(
        model, compute_dtype="float32", mlp_chunk=None, implementation=None, **recurrent
    )


def refuse_depths(config: ModelConfig) -> None:
    """Refuse a model with multi-token prediction, whose depths have no tensors in a folder.

    Raises:
        NotImplementedError: if the model has depths.
    """
    if config.mtp_depths:
        raise NotImplementedError(
            f"model.mtp_depths={config.mtp_depths}: Hugging Face folders are neither read nor "
            "written with depths of multi-token prediction. Set model.mtp_depths=0 to start from "
            "such a folder; a run with depths keeps its weights in its checkpoints."
        )


def raw_config(
    model: ModelConfig, max_positions: int, dtype: str, like: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return a config.json that describes a model.

    Args:
        model: the model.
        max_positions: context length that it has been trained for, in tokens.
        dtype: dtype of its tensors.
        like: the config.json that the model came from; only changed settings are replaced.

    Raises:
        NotImplementedError: if no supported family can describe the model.
        ValueError: if the weights of `like` have other shapes.
    """
    refuse_depths(model)
    raw = _fresh(model) if like is None else dict(like)
    has = FAMILIES[raw["model_type"]].mixers
    for number, layer in enumerate(model.specs):
        if layer.mixer.kind not in has:
            raise NotImplementedError(
                f"layer {number} is {layer.mixer.kind}, which is recurrent, and no supported "
                "family of Hugging Face models has such layers beside the others; keep the model "
                "as a checkpoint of hcp."
            )
    came = Fields(raw, CONFIG).whole_or_none("max_position_embeddings")
    positions = max(max_positions, came or 0)
    raw["max_position_embeddings"] = positions
    raw.pop("dtype", None)
    raw["torch_dtype"] = dtype
    if like is not None:
        described = model_config(like)
        wrong = differences(SHAPES, described, model)
        if wrong:
            raise ValueError(f"the model is of another shape than its origin: {'; '.join(wrong)}.")
        if not differences(READINGS, described, model) and model_config(raw) == described:
            return raw
    raw["rms_norm_eps"] = model.norm_eps
    FAMILIES[raw["model_type"]].write(raw, model)
    for name in _differing(SHAPES + READINGS, model_config(raw), model):
        raise NotImplementedError(
            f"no supported family computes what this model does: as {raw['model_type']} it cannot "
            f"have {name}={getattr(model, name)!r}."
        )
    return raw


def _refuse_what_would_differ(raw: dict[str, Any], family: str, place: str) -> None:
    act = FAMILIES[family].activation
    refused = {
        act.key: (
            raw.get(act.key, act.names[0]) in act.names,
            f"the gate of the MLP is {act.names[0]} in {family}",
        ),
        "use_bidirectional_attention": (
            not raw.get("use_bidirectional_attention"),
            "models are causal here",
        ),
        "attn_logit_softcapping": (
            family != "gemma3_text" or raw.get("attn_logit_softcapping") is None,
            "transformers reads it for Gemma 3, but does not apply it",
        ),
        "attention_dropout": (not raw.get("attention_dropout"), "attention has no dropout here"),
        "quantization_config": (
            not raw.get("quantization_config"),
            "weights are read as float32, bfloat16 or float16; take the folder that was quantised",
        ),
        **{
            # GLM-4.5's files say 1 even without the depth; its tensors are refused, if there.
            key: (
                not raw.get(key) or family == "glm4_moe",
                "depths of multi-token prediction are not read",
            )
            for key in ("num_nextn_predict_layers", "mtp_num_hidden_layers")
        },
        "auto_map": (
            not any("Model" in str(name) for name in _iterable(raw.get("auto_map"))),
            "the model is code of the folder's own, which is never run",
        ),
    }
    for key, (fine, why) in refused.items():
        if not fine:
            shown = printable(repr(raw[key]))
            raise NotImplementedError(f"{place}: {key}={shown} is not supported: {why}.")
    fields = Fields(raw, place)
    if not FAMILIES[family].partial_rotary:
        for part in (fields, fields.mapping("rope_scaling"), fields.mapping("rope_parameters")):
            rope_json.require_whole_heads(part)


def _iterable(value: Any) -> Any:
    return value if isinstance(value, dict | list) else ()


def _fresh(model: ModelConfig) -> dict[str, Any]:
    """Return a config.json of the family that has the model's parameters and layers."""
    family = family_of(model)
    act = FAMILIES[family].activation
    raw = {
        "architectures": [FAMILIES[family].architecture],
        "model_type": family,
        act.key: act.names[0],
    }
    return raw | {
        **{theirs: getattr(model, ours) for ours, theirs in _SIZES.items()},
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "tie_word_embeddings": model.tie_embeddings,
    }
