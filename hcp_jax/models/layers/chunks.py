"""Split a device's tokens into chunks, so that temporary memory is needed for one chunk only.

Each chunk lies inside the device's own part of the stream, so no token moves. The loss and the MLP,
which treat each token separately, are computed this way (`jax.lax.map` over the chunks, each
recomputed in backward).
"""

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Shaped


def split(x: Shaped[Array, "B T ..."], chunk: int) -> Shaped[Array, "n B t ..."]:
    """Split `[B, T]` along the sequence into n equal blocks of at most `chunk` tokens in all rows.

    n divides T if that does not make blocks smaller than half of `chunk`. Otherwise the last block
    is padded with zeros, which copies the whole array.

    >>> split(jnp.arange(10).reshape(2, 5), chunk=4).shape
    (5, 2, 1)
    """
    rows, length = x.shape[:2]
    least = math.ceil(length / max(1, chunk // rows))
    number = next((n for n in range(least, 2 * least + 1) if length % n == 0), least)
    step = math.ceil(length / number)
    tail = [(0, 0), (0, number * step - length)] + [(0, 0)] * (x.ndim - 2)
    blocks: Any = jnp.pad(x, tail).reshape(rows, number, step, *x.shape[2:])
    return blocks.swapaxes(0, 1)


def join(blocks: Shaped[Array, "n B t ..."], length: int) -> Shaped[Array, "B T ..."]:
    """Invert `split`, for a sequence of `length` tokens.

    >>> x = jnp.arange(10).reshape(2, 5)
    >>> bool((join(split(x, chunk=4), 5) == x).all())
    True
    """
    number, rows, step = blocks.shape[:3]
    whole = blocks.swapaxes(0, 1).reshape(rows, number * step, *blocks.shape[3:])
    return whole[:, :length]
