"""Compute rotary position embeddings (Su et al., RoFormer, 2021), also for stretched contexts.

Pair i of a head, the dims i and i + H/2 (the half-split convention of Hugging Face's weights), is
rotated by the angle `position · frequency_i`. Each token has its own position, so streams that are
cut over devices or packed with documents need no special treatment.

Frequencies are computed in float64 on the host. Their product with the position needs care: in
float32, position 2²⁰ times a frequency is wrong by up to 0.06 radian. So the position is split,
p = 1024 h + l, and whole turns of 1024 · frequency are removed before rounding; the error of the
angle is then at most 4e-4 at a million tokens.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int32

from hcp_jax.models.layers.rope_scaling import RopeScaling
from hcp_jax.parallel import spmd

_SPLIT = 1024


class Rotation(NamedTuple):
    """Cosine and sine of each token's rotation angles; shared by layers."""

    cos: Float[Array, "B T 1 R/2"]
    sin: Float[Array, "B T 1 R/2"]


def rope_frequencies(
    head_size: int, theta: float, scaling: RopeScaling | None = None, long: bool = False
) -> Float64[np.ndarray, "H/2"]:
    """Return the rotation of each pair from one token to the next, in radians.

    Args:
        head_size: H, even.
        theta: base of the geometric series, theta^(-2i/H).
        scaling: None for the frequencies as they are.
        long: whether a document is longer than the original context; counts for longrope only.

    >>> rope_frequencies(4, 10_000.0).tolist()
    [1.0, 0.01]
    """
    frequency = theta ** (-np.arange(0, head_size, 2, dtype=np.float64) / head_size)
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    if scaling.kind == "longrope":
        return frequency / np.asarray(scaling.long_factor if long else scaling.short_factor)
    keep = (_llama3_share if scaling.kind == "llama3" else _yarn_share)(frequency, theta, scaling)
    return keep * frequency + (1 - keep) * frequency / scaling.factor


def rotation(
    positions: Int32[jax.Array, "B T"],
    head_size: int,
    theta: float,
    scaling: RopeScaling | None = None,
) -> Rotation:
    """Return the rotation of every token, in float32.

    Args:
        positions: position of each token in its document, in any order.
        head_size: as in `rope_frequencies`.
        theta: as in `rope_frequencies`.
        scaling: as in `rope_frequencies`; the result includes its attention factor. Under longrope
            the longest document of the whole batch decides, over all devices.

    Raises:
        NotImplementedError: for longrope inside a `shard_map`, where a device sees its own tokens
            only.
    """
    per_low, per_high = _per_token(rope_frequencies(head_size, theta, scaling))
    if scaling is not None and scaling.kind == "longrope":
        if spmd.inside_shard_map():
            raise NotImplementedError(
                "rope_scaling.kind='longrope' inside a shard_map (such as a pipeline's) is not "
                "supported: its frequencies depend on the longest document of all devices."
            )
        long = jnp.max(positions) >= jnp.asarray(scaling.original_max_position_embeddings)
        stretched = _per_token(rope_frequencies(head_size, theta, scaling, long=True))
        per_low, per_high = (
            jnp.where(long, a, b) for a, b in zip(stretched, (per_low, per_high), strict=True)
        )
    low, high = (
        x.astype(np.float32)[..., None, None] for x in (positions % _SPLIT, positions // _SPLIT)
    )
    angle = low * per_low + high * per_high
    factor = _attention_factor(scaling)
    return Rotation(factor * jnp.cos(angle), factor * jnp.sin(angle))


def _per_token(frequency: np.ndarray) -> tuple[Any, Any]:
    """Return the rotation of each pair per token, and per `_SPLIT` tokens less whole turns."""
    per_high = np.mod(_SPLIT * frequency, 2 * np.pi)
    low, high = (x.astype(np.float32)[None, None, None] for x in (frequency, per_high))
    return low, high


def rotate(x: Float[Array, "B T N H"], by: Rotation) -> Float[Array, "B T N H"]:
    """Rotate every pair (x_i, x_{i+R/2}) of the first R dims in float32; return the dtype of `x`.

    R is H, or less if only a share of each head is rotated; the other dims stay as they are.
    """
    dims = 2 * by.cos.shape[-1]
    if dims < x.shape[-1]:
        return jnp.concatenate([rotate(x[..., :dims], by), x[..., dims:]], axis=-1)
    first, second = jnp.split(x.astype(by.cos.dtype), 2, axis=-1)
    turned = [first * by.cos - second * by.sin, second * by.cos + first * by.sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _llama3_share(frequency, theta: float, scaling: RopeScaling):
    """Return the kept share of each frequency, by its wavelength in the original context."""
    assert scaling.original_max_position_embeddings is not None
    waves = scaling.original_max_position_embeddings * frequency / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return np.clip((waves - low) / (high - low), 0, 1)


def _yarn_share(frequency, theta: float, scaling: RopeScaling):
    """Return the share of each frequency that is kept, linear in the pair's number."""
    context = scaling.original_max_position_embeddings
    assert context is not None
    pairs = frequency.size

    def pair_that_turns(times: float) -> float:
        return pairs * math.log(context / (2 * math.pi * times)) / math.log(theta)

    first, last = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    return 1 - np.clip((np.arange(pairs) - first) / ((last - first) or 1e-3), 0, 1)


def _attention_factor(scaling: RopeScaling | None) -> float:
    if scaling is None or scaling.kind not in ("yarn", "longrope"):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.kind == "longrope":
        assert scaling.original_max_position_embeddings is not None
        return math.sqrt(
            1 + math.log(scaling.factor) / math.log(scaling.original_max_position_embeddings)
        )
    return 0.1 * math.log(scaling.factor) + 1.0
