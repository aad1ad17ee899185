"""Define the config of stretched rotary frequencies; separate from `rope.py`, without jax."""

import dataclasses
from dataclasses import field
from typing import Literal

from hcp_jax.base.settings import MOST, check, numbers

_FACTORS = numbers(above=0, most=1e6)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Change of the frequencies for contexts longer than those of the first training.

    Attributes:
        kind: "linear": all are divided by `factor` (Chen et al., Position Interpolation, 2023);
            "llama3": the slow ones are, by wavelength (Llama 3.1's config); "yarn": the slow ones
            are, by their turns in the original context, and attention is sharpened (Peng et al.,
            2023); "longrope": each pair has its own divisor (Ding et al., LongRoPE, 2024).
        factor: ratio of the new context length to the original one.
        original_max_position_embeddings: context of the first training, in tokens (all but linear).
        low_freq_factor: llama3: wavelengths longer than original / low_freq_factor are stretched.
        high_freq_factor: llama3: those shorter than original / high_freq_factor are kept.
        beta_fast: yarn: those that make more turns than this in the original context are kept.
        beta_slow: yarn: those that make fewer turns than this are stretched.
        attention_factor: yarn and longrope: factor that multiplies q and k; None for yarn's
            0.1 ln(factor) + 1, or longrope's sqrt(1 + ln(factor) / ln(original context)).
        truncate: yarn: round the borders between kept and stretched pairs to whole pairs.
        short_factor: longrope: divisor of each pair's frequency while no document of a microbatch
            is longer than the original context.
        long_factor: longrope: the same for all documents of other microbatches.
    """

    kind: Literal["linear", "llama3", "yarn", "longrope"] = field(metadata=numbers())
    factor: float = field(metadata=numbers(least=1, most=1e9))
    original_max_position_embeddings: int | None = field(
        default=None, metadata=numbers(least=0, most=MOST)
    )
    low_freq_factor: float = field(default=1.0, metadata=numbers(above=0, most=1e9))
    high_freq_factor: float = field(default=4.0, metadata=numbers(above=0, most=1e9))
    beta_fast: float = field(default=32.0, metadata=numbers(above=0, most=1e9))
    beta_slow: float = field(default=1.0, metadata=numbers(above=0, most=1e9))
    attention_factor: float | None = field(default=None, metadata=numbers(above=0, most=1e9))
    truncate: bool = field(default=True, metadata=numbers())
    short_factor: tuple[float, ...] | None = field(default=None, metadata=_FACTORS)
    long_factor: tuple[float, ...] | None = field(default=None, metadata=_FACTORS)

    def __post_init__(self):
        check(self, "rope_scaling.")
        if self.kind not in ("linear", "llama3", "yarn", "longrope"):
            raise ValueError(
                f"rope_scaling.kind must be linear, llama3, yarn or longrope, got {self.kind!r}."
            )
        for name in ("short_factor", "long_factor"):
            if (getattr(self, name) is not None) != (self.kind == "longrope"):
                raise ValueError(
                    f"rope_scaling.{name} goes with rope_scaling.kind='longrope', which needs it; "
                    f"got kind={self.kind!r} and {name}={getattr(self, name)}."
                )
        if self.kind != "linear" and not self.original_max_position_embeddings:
            raise ValueError(
                f"rope_scaling.kind={self.kind!r} needs original_max_position_embeddings, the "
                "context length of the model's first training, in tokens."
            )
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope_scaling needs high_freq_factor > low_freq_factor, got "
                f"{self.high_freq_factor} and {self.low_freq_factor}."
            )
