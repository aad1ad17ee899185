"""Convert the config.json of a Hugging Face folder to a `ModelConfig`, and back.

A setting that this model would compute in another way is refused, with its name and value. Settings
that do not change the result (zero dropout, caches, ids of special tokens) are ignored. A missing
setting has the default of the `transformers` package, version 5.
"""

import math
import pathlib
from collections.abc import Sequence
from typing import Any

from hcp_jax.base import reading
from hcp_jax.base.terminal import printable
from hcp_jax.models.config import ModelConfig
from hcp_jax.models.hf import json_fields, model_folder
from hcp_jax.models.hf.json_fields import Fields
from hcp_jax.models.hf.model_folder import CONFIG
from hcp_jax.models.layers.rope_scaling import RopeScaling

FAMILIES = {
    "llama": ("LlamaForCausalLM", "Llama 2, 3, 3.1 and others of their shape"),
    "mistral": ("MistralForCausalLM", "Mistral 7B and others of its shape"),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2 and Qwen2.5, dense"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3, dense"),
}
"""Supported families: model_type -> (architecture, name for people)."""

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
)
"""Fields that determine a model's parameters; weights fit only if all of them are equal."""

READINGS = ("rope_theta", "rope_scaling", "norm_eps", "sliding_window", "logits_soft_cap")
"""Fields that determine the computation; a run may change them, such as for longer contexts."""

_SIZES = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_heads": "num_attention_heads",
}

_HEADS = json_fields.SIZES["num_key_value_heads"]
_THETA = 1.5, 1e15  # bounds of the base of the frequencies
_LEAST, _MOST = 1e-6, 1e6  # bounds of RoPE's factors

_NO_MLP_BIAS = "the MLP has no biases here"
_NO_O_BIAS = "it adds a bias to o_proj, which has none here"


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
        known = "; ".join(f"{name} ({what})" for name, (_, what) in FAMILIES.items())
        raise NotImplementedError(
            f"{place}: model_type={printable(repr(family))} is not supported. Supported are "
            f"{known}."
        )
    _refuse_what_would_differ(raw, family, place)
    fields = Fields(raw, place)
    sizes: dict[str, Any] = {ours: fields.size(theirs) for ours, theirs in _SIZES.items()}
    # Only Llama's configs usually leave this out.
    optional = family == "llama" or "num_key_value_heads" in raw
    kv_heads = fields.whole_or_none("num_key_value_heads", _HEADS) if optional else None
    if not optional:
        fields.size("num_key_value_heads")
    head_dim = fields.whole_or_none("head_dim", json_fields.SIZES["head_dim"])
    if family == "qwen3" and "head_dim" not in raw:
        head_dim = 128
    usual = head_dim is not None and head_dim * sizes["num_heads"] == sizes["hidden_size"]
    theta, scaling = _rope(fields)
    epsilon = fields.number_or_none("rms_norm_eps", 1e-12, 0.1)
    return ModelConfig(
        **sizes,
        num_kv_heads=sizes["num_heads"] if kv_heads is None else kv_heads,
        head_size=None if usual else head_dim,
        rope_theta=theta,
        rope_scaling=scaling,
        qk_norm=family == "qwen3",
        qkv_bias=family == "qwen2",
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        norm_eps=1e-6 if epsilon is None else epsilon,
        sliding_window=_window(fields, family, sizes["num_layers"]),
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
    pairs = ((name, getattr(there, name), getattr(here, name)) for name in names)
    return [f"{name} {a!r} there and {b!r} here" for name, a, b in pairs if a != b]


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
    raw = _fresh(model) if like is None else dict(like)
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
    _put_rope(raw, model)
    _put_window(raw, model)
    written = model_config(raw)
    for name in SHAPES + READINGS:
        if getattr(written, name) != getattr(model, name):
            raise NotImplementedError(
                f"no supported family computes what this model does: as {raw['model_type']} it "
                f"cannot have {name}={getattr(model, name)!r}."
            )
    return raw


def _refuse_what_would_differ(raw: dict[str, Any], family: str, place: str) -> None:
    refused = {
        "hidden_act": (raw.get("hidden_act", "silu") in ("silu", "swish"), "the MLP is SwiGLU"),
        "mlp_bias": (family != "llama" or not raw.get("mlp_bias"), _NO_MLP_BIAS),
        "attention_bias": (
            family not in ("llama", "qwen3") or not raw.get("attention_bias"),
            _NO_O_BIAS,
        ),
        "attention_dropout": (not raw.get("attention_dropout"), "attention has no dropout here"),
        "quantization_config": (
            not raw.get("quantization_config"),
            "weights are read as float32, bfloat16 or float16; take the folder that was quantised",
        ),
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
    for part in (fields, fields.mapping("rope_scaling"), fields.mapping("rope_parameters")):
        share = part.values.get("partial_rotary_factor")
        if share not in (None, 1):
            raise NotImplementedError(
                f"{place}: partial_rotary_factor={printable(repr(share))} is not supported: heads "
                "are rotated whole."
            )


def _iterable(value: Any) -> Any:
    return value if isinstance(value, dict | list) else ()


def _window(fields: Fields, family: str, num_layers: int) -> int | None:
    """Return the sliding window, which is the same in all layers."""
    if family == "llama":
        return None
    given = "sliding_window" in fields.values
    window = fields.whole_or_none("sliding_window") if given else 4096
    if family == "mistral":
        return window
    if not fields.flag("use_sliding_window", False):
        return None
    first = 28
    if fields.values.get("max_window_layers") is not None:
        first = fields.whole("max_window_layers", least=0)
    kinds = fields.values.get("layer_types") or [
        "sliding_attention" if i >= first else "full_attention" for i in range(num_layers)
    ]
    same = isinstance(kinds, list) and all(kind == kinds[0] for kind in kinds)
    if not same or kinds[0] not in ("sliding_attention", "full_attention"):
        said = "layer_types" if fields.values.get("layer_types") else "max_window_layers"
        value = printable(repr(fields.values.get(said, first)))
        raise NotImplementedError(
            f"{fields.place}: use_sliding_window=True with {said}={value} is not "
            "supported: the sliding window is one for all layers here."
        )
    return window if kinds[0] == "sliding_attention" else None


def _rope(fields: Fields) -> tuple[float, RopeScaling | None]:
    """Return the base of the frequencies and their scaling, from either form of config.json."""
    of = fields.mapping("rope_scaling")
    if not of.values:
        of = fields.mapping("rope_parameters")
    if any(isinstance(value, dict) for value in of.values.values()):
        raise NotImplementedError(
            f"{fields.place}: rope_parameters={printable(repr(of.values))} is not supported: the "
            "rotation is one for all layers here."
        )
    longest = fields.whole_or_none("max_position_embeddings")
    theta = of.number_or_none("rope_theta", *_THETA) or fields.number_or_none("rope_theta", *_THETA)
    kind = of.values.get("rope_type") or of.values.get("type") or "default"
    if kind == "default":
        return theta or 10_000.0, None
    if kind not in ("linear", "llama3", "yarn"):
        raise NotImplementedError(
            f"{fields.place}: rope_type={printable(repr(kind))} is not supported; supported are "
            "default, linear, llama3 and yarn."
        )
    return theta or 10_000.0, _scaling(kind, of, fields, longest)


def _scaling(kind: str, of: Fields, fields: Fields, longest: int | None) -> RopeScaling:
    original = "original_max_position_embeddings"
    context = fields.whole_or_none(original) or of.whole_or_none(original) or longest
    needed: dict[str, Any] = {"factor": of.number_or_none("factor", 1, _MOST)}
    if kind != "linear":
        needed[original] = context
    if kind == "llama3":
        for name in ("low_freq_factor", "high_freq_factor"):
            needed[name] = of.number_or_none(name, _LEAST, _MOST)
    if kind == "yarn" and needed["factor"] is None and longest and context:
        needed["factor"] = longest / context
    missing = [name for name, value in needed.items() if value is None]
    if missing:
        raise ValueError(f"{fields.place}: rope_type={kind!r} needs {', '.join(missing)}, too.")
    options: dict[str, Any] = dict(needed)
    if kind == "yarn":
        options |= {
            "beta_fast": of.number_or_none("beta_fast", _LEAST, _MOST) or 32.0,
            "beta_slow": of.number_or_none("beta_slow", _LEAST, _MOST) or 1.0,
            "attention_factor": _attention_factor(of, options["factor"]),
            "truncate": of.flag("truncate", True),
        }
    return RopeScaling(kind, **options)  # type: ignore[arg-type]


def _attention_factor(of: Fields, factor: float) -> float | None:
    """Return yarn's attention factor; None if it follows from the context factor alone."""
    given = of.number_or_none("attention_factor", _LEAST, _MOST)
    if given is not None:
        return given
    one = of.number_or_none("mscale", 0, _MOST)
    all_dims = of.number_or_none("mscale_all_dim", 0, _MOST)
    if not (one and all_dims):
        return None
    growth = 0.1 * math.log(factor)
    return (one * growth + 1) / (all_dims * growth + 1)


def _fresh(model: ModelConfig) -> dict[str, Any]:
    """Return a config.json of the first family that has the model's parameters."""
    family = "mistral" if model.sliding_window else "llama"
    if model.qk_norm or model.qkv_bias:
        family = "qwen3" if model.qk_norm else "qwen2"
    raw = {"architectures": [FAMILIES[family][0]], "model_type": family, "hidden_act": "silu"}
    return raw | {
        **{theirs: getattr(model, ours) for ours, theirs in _SIZES.items()},
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "tie_word_embeddings": model.tie_embeddings,
    }


def _put_rope(raw: dict[str, Any], model: ModelConfig) -> None:
    """Write RoPE's settings in the form that versions 4 and 5 of transformers both read."""
    for key in ("rope_parameters", "original_max_position_embeddings"):
        raw.pop(key, None)
    scaling = model.rope_scaling
    raw["rope_theta"], raw["rope_scaling"] = model.rope_theta, None
    if scaling is None:
        return
    values: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        values["original_max_position_embeddings"] = scaling.original_max_position_embeddings
    names = {
        "linear": (),
        "llama3": ("low_freq_factor", "high_freq_factor"),
        "yarn": ("beta_fast", "beta_slow", "attention_factor", "truncate"),
    }[scaling.kind]
    values |= {name: getattr(scaling, name) for name in names}
    raw["rope_scaling"] = {name: value for name, value in values.items() if value is not None}


def _put_window(raw: dict[str, Any], model: ModelConfig) -> None:
    if raw["model_type"] == "mistral":
        raw["sliding_window"] = model.sliding_window
    elif raw["model_type"] in ("qwen2", "qwen3"):
        sliding = model.sliding_window is not None
        kind = "sliding_attention" if sliding else "full_attention"
        raw["use_sliding_window"], raw["sliding_window"] = sliding, model.sliding_window
        raw["max_window_layers"] = 0 if sliding else model.num_layers
        raw["layer_types"] = [kind] * model.num_layers
