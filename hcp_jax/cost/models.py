"""List well-known models by name, with the sizes of their published configs."""

import dataclasses
import difflib
from typing import Any

from hcp_jax.cost.shape import ModelShape

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


MODELS: dict[str, dict[str, Any]] = {
    # The model of the benchmark that docs/dynamic.md compares with. Its MLP has no gate, so there
    # is no `ModelConfig` for it. The vocabulary size is assumed: the benchmark gives none.
    "gpt-12x2048": {"vocab_size": 50304, "mlp_products": 2} | _sizes(12, 2048, 8192, 16, 16),
    "llama2-7b": {"vocab_size": 32000} | _sizes(32, 4096, 11008, 32, 32),
    "llama3-8b": _LLAMA3 | _sizes(32, 4096, 14336, 32, 8),
    "llama3-70b": _LLAMA3 | _sizes(80, 8192, 28672, 64, 8),
    "qwen3-0.6b": _QWEN3 | {"tie_embeddings": True} | _sizes(28, 1024, 3072, 16, 8),
    "qwen3-8b": _QWEN3 | _sizes(36, 4096, 12288, 32, 8),
    "qwen3-32b": _QWEN3 | _sizes(64, 5120, 25600, 64, 8),
}
"""Fields of `ModelConfig` (and of `ModelShape`) by model."""


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
    fields = _find(model)
    known = {f.name for f in dataclasses.fields(ModelShape)}
    shape = {name: value for name, value in fields.items() if name in known}
    shape.setdefault("head_size", fields["hidden_size"] // fields["num_heads"])
    return ModelShape(**shape)


def model_fields(name: str) -> dict[str, Any]:
    """Return the `ModelConfig` fields of a named model.

    Raises:
        ValueError: if there is no model of that name; the error suggests the nearest one.
        NotImplementedError: if the library can estimate the model's cost but cannot train it.
    """
    fields = _find(name)
    if "mlp_products" in fields:
        raise NotImplementedError(
            f"{name} has no config: its MLP has no gate, which hcp_jax's models do not support. "
            f"Its cost can be planned; to write or compile a config, choose another model."
        )
    return dict(fields)


def _find(name: str) -> dict[str, Any]:
    if name.lower() in MODELS:
        return MODELS[name.lower()]
    near = difflib.get_close_matches(name.lower(), MODELS, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(
        f"unknown model {name!r}: {hint}there are {', '.join(MODELS)}. For another one, give the "
        "path of a config instead of a name."
    )
