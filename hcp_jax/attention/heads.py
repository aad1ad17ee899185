"""Exchange heads for sequence with the all-to-all of DeepSpeed-Ulysses.

    before: every device has t tokens of all N heads      after: A·t tokens of N/A heads

            tokens                                                tokens
    heads   a0 | a1 | a2 | a3                             heads   aaaaaaaaaaaaaaaa   device 0
            a0 | a1 | a2 | a3        all_to_all                   bbbbbbbbbbbbbbbb   device 1
            ...                      --------->                   ...

The tokens arrive device by device in the order of the axis, so they are contiguous in the layout.
(Jacobs et al., DeepSpeed Ulysses, 2023.)
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hcp_jax.cost.traffic import EXCHANGE_HEADS
from hcp_jax.parallel.peers import Peers


def to_sequence(x: Float[Array, "B t N *H"], lanes: Peers) -> Float[Array, "B At nA *H"]:
    """Exchange all heads of t tokens for a share of the heads of A·t tokens."""
    return _all_to_all(x, lanes, split=2, concat=1)


def to_heads(x: Float[Array, "B At nA *H"], lanes: Peers) -> Float[Array, "B t N *H"]:
    """Exchange back: the inverse of `to_sequence`."""
    return _all_to_all(x, lanes, split=1, concat=2)


def own_part(x: Float[Array, "N"], lanes: Peers) -> Float[Array, "nA"]:
    """Select, from one number per head, those of the heads that this device has after exchange."""
    if lanes.size == 1:
        return x
    part = x.shape[0] // lanes.size
    return jax.lax.dynamic_slice_in_dim(x, lanes.rank() * part, part)


def replicate_kv(x: Float[Array, "B t K H"], size: int) -> Float[Array, "B t rK H"]:
    """Repeat kv heads as few times as needed to divide them evenly among `size` devices.

    Each is repeated r = size / gcd(K, size) times. Since both K and `size` divide N, so does their
    least common multiple r·K, and query head n still reads kv head n // (N / rK). The transpose of
    the repeat sums the gradients of the copies.
    """
    times = size // math.gcd(x.shape[2], size)
    return x if times == 1 else jnp.repeat(x, times, axis=2)


def _all_to_all(x: Any, lanes: Peers, split: int, concat: int) -> Any:
    if lanes.size == 1:
        return x
    with jax.named_scope(EXCHANGE_HEADS):
        return jax.lax.all_to_all(
            x,
            lanes.axes,
            split_axis=split,
            concat_axis=concat,
            axis_index_groups=lanes.index_groups,
            tiled=True,
        )
