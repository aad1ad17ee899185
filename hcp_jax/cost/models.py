"""List well-known models by name, with the sizes of their published configs."""

import collections
import copy
import dataclasses
import difflib
import math
from typing import Any

from hcp_jax.cost.experts import Experts
from hcp_jax.cost.shape import LayerKind, ModelShape

_LLAMA3: dict[str, Any] = {"vocab_size": 128256, "rope_theta": 500_000.0}
_QWEN3: dict[str, Any] = {
    "vocab_size": 151936,
    "num_kv_heads": 8,
    "head_size": 128,
    "rope_theta": 1_000_000.0,
    "norm_eps": 1e-6,
    "qk_norm": True,
}


def _sizes(
    layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int
) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
    }


def _experts(number: int, per_token: int, intermediate: int) -> dict[str, Any]:
    sizes = {"num_experts": number, "num_experts_per_tok": per_token}
    return {"moe": sizes | {"moe_intermediate_size": intermediate}}


_GPT_OSS: dict[str, Any] = {
    "vocab_size": 201088,
    "head_size": 64,
    "rope_theta": 150_000.0,
    "attention_sinks": True,
    "layers": [{"sliding_window": 128}, {}],
}
_GEMMA3_WINDOW: dict[str, Any] = {"sliding_window": 1024, "rope_theta": 10_000.0}

MODELS: dict[str, dict[str, Any]] = {
    # The model of the benchmark that docs/dynamic.md compares with. Its MLP has no gate, so there
    # is no `ModelConfig` for it. The vocabulary size is assumed: the benchmark gives none.
    "gpt-12x2048": {"vocab_size": 50304, "mlp_products": 2} | _sizes(12, 2048, 8192, 16, 16),
    "llama2-7b": {"vocab_size": 32000} | _sizes(32, 4096, 11008, 32, 32),
    "llama3-8b": _LLAMA3 | _sizes(32, 4096, 14336, 32, 8),
    "llama3-70b": _LLAMA3 | _sizes(80, 8192, 28672, 64, 8),
    "llama3-405b": _LLAMA3 | _sizes(126, 16384, 53248, 128, 8),
    "qwen3-0.6b": _QWEN3 | {"tie_embeddings": True} | _sizes(28, 1024, 3072, 16, 8),
    "qwen3-8b": _QWEN3 | _sizes(36, 4096, 12288, 32, 8),
    "qwen3-32b": _QWEN3 | _sizes(64, 5120, 25600, 64, 8),
    "qwen3-30b-a3b": _QWEN3 | _sizes(48, 2048, 6144, 32, 4) | _experts(128, 8, 768),
    "mixtral-8x7b": {"vocab_size": 32000, "rope_theta": 1_000_000.0}
    | _sizes(32, 4096, 14336, 32, 8)
    | _experts(8, 2, 14336),
    "gpt-oss-20b": _GPT_OSS | _sizes(24, 2880, 2880, 64, 8) | _experts(32, 4, 2880),
    "gpt-oss-120b": _GPT_OSS | _sizes(36, 2880, 2880, 64, 8) | _experts(128, 4, 2880),
    "gemma3-27b": _sizes(62, 5376, 21504, 32, 16)
    | {
        "vocab_size": 262208,
        "head_size": 128,
        "rope_theta": 1_000_000.0,
        "norm_eps": 1e-6,
        "qk_norm": True,
        "tie_embeddings": True,
        "layers": [*[_GEMMA3_WINDOW] * 5, {"rope_scaling": {"kind": "linear", "factor": 8.0}}],
        "attention_scale": 168**-0.5,
        "embedding_scale": math.sqrt(5376),
        "norms": "both",
        "norm_shifted": True,
        "activation": "gelu_tanh",
    },
    # As published for the run at 262K tokens (marin issues 8435 and 8754): 384 experts that work on
    # half the hidden size. Here they have the whole hidden size and half the width, which has the
    # same weights and FLOPs but sends rows of twice the bytes; the projections to and from the half
    # size are counted with the shared experts.
    "marin-535b-a23b": {"vocab_size": 128256, "head_size": 128}
    | _sizes(48, 6144, 6144, 48, 12)
    | {"moe": _experts(384, 8, 1536)["moe"] | {"shared_expert_intermediate_size": 8192}}
    | {"layers": [*[{"sliding_window": 512}] * 5, {"rotary": False}]},
}
"""Fields of `ModelConfig` by model, as plain data; `mlp_products` is of `ModelShape`."""

_WITHOUT_CONFIG = {
    "gpt-12x2048": "its MLP has no gate",
    "gpt-oss-20b": "its experts have biases and a clamped gate",
    "gpt-oss-120b": "its experts have biases and a clamped gate",
    "marin-535b-a23b": "its experts work on half the hidden size",
}
"""Models whose cost can be counted but that hcp_jax's models do not compute, and why."""


def model_shape(model: "str | ModelShape | Any") -> ModelShape:
    """Return the shape of a named model or of a `ModelConfig`.

    Raises:
        ValueError: if there is no model of that name; the error suggests the nearest one.

    >>> model_shape("llama3-8b").params
    8030261248
    """
    if isinstance(model, ModelShape):
        return model
    if not isinstance(model, str):
        return ModelShape.from_config(model)
    return _shape(_find(model))


def _shape(fields: dict[str, Any]) -> ModelShape:
    """Return the shape that `ModelShape.from_config` makes of a config with these fields."""
    known = {f.name for f in dataclasses.fields(ModelShape)}
    shape = {name: value for name, value in fields.items() if name in known}
    shape.setdefault("head_size", fields["hidden_size"] // fields["num_heads"])
    if (moe := fields.get("moe")) is not None:
        shape["experts"] = Experts(
            moe["num_experts"], moe["num_experts_per_tok"], moe["moe_intermediate_size"]
        )
        shared = moe.get("shared_expert_intermediate_size", 0)
        routed = moe["num_experts_per_tok"] * moe["moe_intermediate_size"]
        shape["intermediate_size"] = routed + shared
    pattern = fields.get("layers", [{}])
    layers, period = fields["num_layers"], len(pattern)
    windows = collections.Counter(
        pattern[i % period].get("sliding_window", fields.get("sliding_window"))
        for i in range(layers)
    )
    one = ModelShape(**shape | {"sliding_window": next(iter(windows))})
    if len(windows) == 1:
        return one
    once = collections.Counter(
        p.get("sliding_window", fields.get("sliding_window")) for p in pattern
    )
    kinds = (
        LayerKind(
            *(count, one.intermediate_size, one.head_size, window, None, one.experts),
            in_period=once[window],
        )
        for window, count in windows.items()
    )
    return dataclasses.replace(one, kinds=tuple(kinds), period=period)


def model_fields(name: str) -> dict[str, Any]:
    """Return the `ModelConfig` fields of a named model, as `models.config.from_fields` reads them.

    Raises:
        ValueError: if there is no model of that name; the error suggests the nearest one.
        NotImplementedError: if the library can estimate the model's cost but cannot train it.
    """
    fields = _find(name)
    if (why := _WITHOUT_CONFIG.get(name.lower())) is not None:
        raise NotImplementedError(
            f"{name} has no config: {why}, which hcp_jax's models do not support. Its cost can be "
            "planned; to write or compile a config, choose another model."
        )
    return copy.deepcopy(fields)


def _find(name: str) -> dict[str, Any]:
    if name.lower() in MODELS:
        return MODELS[name.lower()]
    near = difflib.get_close_matches(name.lower(), MODELS, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(
        f"unknown model {name!r}: {hint}there are {', '.join(MODELS)}. For another one, give the "
        "path of a config instead of a name."
    )
