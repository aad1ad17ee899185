"""Read the pattern of a model's layers: what each layer has that others have not."""

import dataclasses
from collections.abc import Mapping
from dataclasses import field
from typing import Any, Literal

from hcp_jax.base.settings import MOST, check, fixed, numbers
from hcp_jax.models.layers.rope_scaling import RopeScaling
from hcp_jax.models.specs import Activation, Norms

MixerKind = Literal["attention", "mamba2", "gated_delta", "kda"]


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """One layer of a pattern; each setting replaces the model's setting of the same name.

    None means as the model has it. So for windows on some layers, leave `sliding_window` of the
    model at None and give it to these layers.

    Attributes:
        intermediate_size: as in `ModelConfig`, like all others.
        head_size: likewise.
        sliding_window: likewise.
        rotary: likewise.
        rotary_share: likewise.
        rope_theta: likewise.
        rope_scaling: likewise.
        attention_scale: likewise.
        logits_soft_cap: likewise.
        attention_sinks: likewise.
        qk_norm: likewise.
        qkv_bias: likewise.
        o_bias: likewise.
        activation: likewise.
        mlp_bias: likewise.
        norms: likewise.
        mixer: likewise.
    """

    intermediate_size: int | None = field(default=None, metadata=fixed(above=0, most=MOST))
    head_size: int | None = field(default=None, metadata=fixed(above=0, most=MOST))
    sliding_window: int | None = field(default=None, metadata=numbers(above=0, most=MOST))
    rotary: bool | None = field(default=None, metadata=numbers())
    rotary_share: float | None = field(default=None, metadata=numbers(above=0, most=1.0))
    rope_theta: float | None = field(default=None, metadata=numbers(above=1, most=1e15))
    rope_scaling: RopeScaling | None = field(default=None, metadata=numbers())
    attention_scale: float | None = field(default=None, metadata=numbers(above=0, most=1e9))
    logits_soft_cap: float | None = field(default=None, metadata=numbers(above=0, most=1e9))
    attention_sinks: bool | None = field(default=None, metadata=fixed())
    qk_norm: bool | None = field(default=None, metadata=fixed())
    qkv_bias: bool | None = field(default=None, metadata=fixed())
    o_bias: bool | None = field(default=None, metadata=fixed())
    activation: Activation | None = field(default=None, metadata=numbers())
    mlp_bias: bool | None = field(default=None, metadata=fixed())
    norms: Norms | None = field(default=None, metadata=fixed())
    mixer: MixerKind | None = field(default=None, metadata=fixed())

    def __post_init__(self) -> None:
        check(self, "model.layers: ")

    @property
    def given(self) -> dict[str, Any]:
        """The settings that this layer replaces."""
        pairs = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        return {name: value for name, value in pairs if value is not None}


Layers = str | tuple[LayerConfig, ...] | None
"""A pattern: letters, or settings by layer; None if all layers are as the model's config says."""

LETTERS: dict[str, dict[str, Any]] = {
    "A": {"mixer": "attention", "sliding_window": None},
    "W": {"mixer": "attention"},
    "M": {"mixer": "mamba2"},
    "G": {"mixer": "gated_delta"},
    "K": {"mixer": "kda"},
}
"""Settings that a letter replaces: A is attention without a window, W is attention with it."""

ATTENTION_SETTINGS = {
    "head_size",
    "sliding_window",
    "rotary",
    "rotary_share",
    "rope_theta",
    "rope_scaling",
    "attention_scale",
    "logits_soft_cap",
    "attention_sinks",
    "qk_norm",
    "qkv_bias",
    "o_bias",
}
"""Settings that only attention has."""


def overrides(layers: Layers, num_layers: int, window: int | None) -> list[Mapping[str, Any]]:
    """Return the settings that each layer replaces; the pattern repeats, and may be cut off.

    Args:
        layers: the pattern.
        num_layers: L.
        window: `sliding_window` of the model.

    Raises:
        ValueError: for an empty pattern, one longer than the model, or unknown letters; or if a
            pattern of letters and `sliding_window` do not go together.

    >>> overrides("MMA", 4, None)[2:]
    [{'mixer': 'attention', 'sliding_window': None}, {'mixer': 'mamba2'}]
    """
    if layers is None:
        return [{}] * num_layers
    if not 1 <= len(layers) <= num_layers:
        raise ValueError(
            f"model.layers has {len(layers)} layers, and the model has num_layers={num_layers}: "
            "give one period of the pattern, which repeats, or one entry per layer."
        )
    period: list[Mapping[str, Any]]
    if isinstance(layers, str):
        _check_letters(layers, window)
        period = [LETTERS[letter] for letter in layers]
    else:
        period = [layer.given for layer in layers]
    return [period[i % len(period)] for i in range(num_layers)]


def _check_letters(layers: str, window: int | None) -> None:
    unknown = sorted(set(layers) - set(LETTERS))
    if unknown:
        raise ValueError(
            f"model.layers={layers!r} has the unknown letters {', '.join(unknown)}; known are A "
            "(attention), W (attention with sliding_window), M (Mamba-2), G (gated delta net) and "
            "K (KDA). For other differences, give a list "
            "with the settings of each layer."
        )
    if "W" in layers and window is None:
        raise ValueError(
            f"model.layers={layers!r} has W, attention with a window, but model.sliding_window is "
            "null; give its number of tokens."
        )
    if "W" not in layers and window is not None:
        raise ValueError(
            f"model.layers={layers!r} has no W, so no layer would use model.sliding_window="
            f"{window}; use W for layers with the window, or leave sliding_window out."
        )
