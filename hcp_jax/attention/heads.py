"""Exchange heads for sequence: the all-to-all of DeepSpeed-Ulysses.

    before: every device has t tokens of all N heads      after: A·t tokens of N/A heads

            tokens                                                tokens
    heads   a0 | a1 | a2 | a3                             heads   aaaaaaaaaaaaaaaa   device 0
            a0 | a1 | a2 | a3        all_to_all                   bbbbbbbbbbbbbbbb   device 1
            ...                      --------->                   ...

The tokens arrive device by device in the order of the axis, that is, as one stretch of the layout.
(Jacobs et al., DeepSpeed Ulysses, 2023.)
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def to_sequence(x: Float[Array, "B t N *H"], axes: tuple[str, ...]) -> Float[Array, "B At nA *H"]:
    """From a part of the sequence with all heads to more of the sequence with a part of them."""
    if not axes:
        return x
    with jax.named_scope("exchange_heads"):
        return jax.lax.all_to_all(x, axes, split_axis=2, concat_axis=1, tiled=True)


def to_heads(x: Float[Array, "B At nA *H"], axes: tuple[str, ...]) -> Float[Array, "B t N *H"]:
    """The inverse of `to_sequence`."""
    if not axes:
        return x
    with jax.named_scope("exchange_heads"):
        return jax.lax.all_to_all(x, axes, split_axis=1, concat_axis=2, tiled=True)


def replicate_kv(x: Float[Array, "B t K H"], size: int) -> Float[Array, "B t rK H"]:
    """Repeat kv heads just often enough that `size` devices can share them out evenly.

    Each is repeated r = size / gcd(K, size) times. Since both K and `size` divide N, so does their
    least common multiple r·K, and query head n still reads kv head n // (N / rK). The transpose of
    the repeat sums the replicas' gradients.
    """
    times = size // math.gcd(x.shape[2], size)
    return x if times == 1 else jnp.repeat(x, times, axis=2)
