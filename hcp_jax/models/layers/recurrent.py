"""Parts that the recurrent mixers (Mamba-2, gated delta net, KDA) share."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from hcp_jax.models.specs import Mixer
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.parallel.halo import short_conv
from hcp_jax.sequence.mask import Mask
from hcp_jax.sequence.placed_mask import PlacedMask
from hcp_jax.sequence.placement import Groups


class Tokens(NamedTuple):
    """What all recurrent layers share.

    Attributes:
        positions: number of tokens of the same document before each token.
        order: with groups, one past each token's global index; None for streams.
    """

    positions: Int32[Array, "B1 T"]
    order: Int32[Array, "B1 T"] | None = None


def share(
    spec: Mixer, positions: Int32[Array, "B1 T"], mask: Mask | PlacedMask, widest: int | None
) -> Tokens:
    """Return what recurrent layers share; arguments as in `Attention.share`.

    Of the mask they need nothing but the order of the tokens of groups: positions tell where
    documents begin.
    """
    if isinstance(mask, PlacedMask) and isinstance(mask.placement, Groups):
        return Tokens(positions, jnp.asarray(mask.intervals.end))
    return Tokens(positions)


def convolved(
    mixer: nnx.Module,
    names: tuple[str, ...],
    x: Float[Array, "B T D"],
    tokens: Tokens,
    cp: ContextParallel | None,
) -> list[Float[Array, "B T G K"]]:
    """Return silu(short convolution of a projection of `x`), for each name.

    Args:
        mixer: has `NAME_proj`, `NAME_conv` and, if it convolves with biases, `NAME_conv_bias`.
        names: of the projections.
        x: hidden states.
        tokens: what `share` returned.
        cp: context; None for one device.
    """
    biased = hasattr(mixer, f"{names[0]}_conv_bias")
    found = short_conv(
        [getattr(mixer, f"{name}_proj")(x) for name in names],
        [getattr(mixer, f"{name}_conv")[...] for name in names],
        tokens.positions,
        cp=cp,
        order=tokens.order,
        biases=[getattr(mixer, f"{name}_conv_bias")[...] for name in names] if biased else None,
    )
    return [jax.nn.silu(y) for y in found]


class HeadNorm(nnx.Module):
    """RMSNorm of the outputs of heads, in float32, over each head or over groups of heads.

    Args:
        heads: H.
        size: V, of one head.
        groups: heads are normalised together in this many groups; H if None.
        eps: epsilon.
    """

    def __init__(self, heads: int, size: int, *, groups: int | None, eps: float):
        self.groups, self.eps = groups, eps
        self.scale = nnx.Param(jnp.ones((size,) if groups is None else (heads, size), jnp.float32))

    def __call__(self, x: Float[Array, "B T H V"]) -> Float[Array, "B T H V"]:
        """Normalise `x`; the result is float32."""
        groups = x.shape[2] if self.groups is None else self.groups
        grouped = x.astype(jnp.float32).reshape(*x.shape[:2], groups, -1)
        mean = jnp.mean(jnp.square(grouped), axis=-1, keepdims=True)
        scale = self.scale[...].reshape(1, 1, -1, x.shape[3])
        return (grouped * jax.lax.rsqrt(mean + self.eps)).reshape(x.shape) * scale


def unit_length(x: Float[Array, "B T G K"], scale: float = 1.0) -> Float[Array, "B T G K"]:
    """Return vectors of length `scale` (a little less for very short ones), in the dtype of `x`."""
    y = x.astype(jnp.float32)
    squares = jnp.sum(jnp.square(y), axis=-1, keepdims=True)
    return (y * (scale * jax.lax.rsqrt(squares + 1e-6))).astype(x.dtype)


def project(
    inputs: int, outputs: int | tuple[int, int], dtype: str, rngs: nnx.Rngs
) -> nnx.LinearGeneral:
    """Return a projection of hidden states to heads `(H, K)`, or to one number per head."""
    return nnx.LinearGeneral(
        inputs,
        outputs,
        use_bias=False,
        kernel_init=nnx.initializers.variance_scaling(1.0, "fan_in", "normal"),
        dtype=dtype,
        rngs=rngs,
    )


def project_out(
    heads: int, size: int, outputs: int, gain: float, dtype: str, rngs: nnx.Rngs
) -> nnx.LinearGeneral:
    """Return the projection of the heads' outputs back to hidden states."""
    return nnx.LinearGeneral(
        (heads, size),
        outputs,
        axis=(-2, -1),
        use_bias=False,
        kernel_init=nnx.initializers.variance_scaling(gain, "fan_in", "normal"),
        dtype=dtype,
        rngs=rngs,
    )


def conv_weight(width: int, heads: int, size: int, rngs: nnx.Rngs) -> nnx.Param:
    """Return new weights of a short convolution, uniform in ±1 / sqrt(width)."""
    bound = width**-0.5
    shape = (width, heads, size)
    return nnx.Param(jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound))


def decay_rates(least: float, most: float, heads: int, rngs: nnx.Rngs) -> nnx.Param:
    """Return new logarithms of decay rates, which are uniform between `least` and `most`."""
    rates = jax.random.uniform(rngs.params(), (heads,), jnp.float32, least, most)
    return nnx.Param(jnp.log(rates))


def step_biases(least: float, most: float, shape: tuple[int, ...], rngs: nnx.Rngs) -> nnx.Param:
    """Return new biases whose softplus is log-uniform between `least` and `most`."""
    low, high = jnp.log(least), jnp.log(most)
    steps = jnp.exp(jax.random.uniform(rngs.params(), shape, jnp.float32, low, high))
    return nnx.Param(steps + jnp.log(-jnp.expm1(-steps)))
