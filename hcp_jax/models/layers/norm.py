"""Normalise activations by their root mean square (Zhang and Sennrich, RMSNorm, 2019)."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from hcp_jax.models.specs import NormSpec


class ShiftedRMSNorm(nnx.Module):
    """RMSNorm whose parameter is the scale minus 1, so that weight 0 changes nothing (Gemma)."""

    def __init__(self, size: int, epsilon: float, dtype: str):
        self.epsilon, self.dtype = epsilon, dtype
        self.scale = nnx.Param(jnp.zeros(size, jnp.float32))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalise the last dim in float32; return the module's dtype."""
        exact = x.astype(jnp.float32)
        square = jnp.mean(jnp.square(exact), axis=-1, keepdims=True)
        scale = jnp.expand_dims(1 + self.scale[...], tuple(range(x.ndim - 1)))
        return (exact * jnp.reciprocal(jnp.sqrt(square + self.epsilon)) * scale).astype(self.dtype)


def make_norm(spec: NormSpec, size: int, rngs: nnx.Rngs) -> nnx.RMSNorm | ShiftedRMSNorm:
    """Return an RMSNorm of the last dim, which has `size` entries."""
    if spec.shifted:
        return ShiftedRMSNorm(size, spec.epsilon, spec.dtype)
    return nnx.RMSNorm(size, epsilon=spec.epsilon, dtype=spec.dtype, rngs=rngs)
