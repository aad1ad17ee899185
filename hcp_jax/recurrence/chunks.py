"""Cut a device's runs into chunks, and compute what happens inside a chunk with matrix products.

Both kinds of recurrence have one form. Inside a chunk of L tokens, with S the state before it,

    outputs = local + read S          state after it = A S + B

and everything but S is computed from the chunk alone. `scan.py` provides S.

Packed documents: a pair of tokens counts only inside one document, the state S reaches only tokens
before the first start in the chunk, and only tokens after the last start reach the next chunk. All
of it is masks, so no decay is ever infinite. Sums of log decays add numbers of one sign and are
never differences of large ones, which in float32 would lose the small decays beside the large.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Einsum = Callable[..., Any]


class Documents(NamedTuple):
    """Which tokens of a chunk count for what, because of document starts.

    Attributes:
        visible: the token of a row sees that of a column: same document, and not later.
        entered: the state before the chunk reaches the token.
        leaves: the token reaches the state after the chunk.
        passes: the state before the chunk reaches the state after it.
    """

    visible: Bool[Array, "*c L L"]
    entered: Bool[Array, "*c L 1"]
    leaves: Bool[Array, "*c L 1"]
    passes: Bool[Array, "*c 1 1"]


def split(x: Float[Array, "B t *H"], runs: int, chunk: int, fill: Any = 0) -> Array:
    """Cut a device's tokens into chunks inside its runs: `[n, R, B, *H, L, …]`.

    The last dim of `x` stays last; other dims after the tokens move before L. A run is padded at
    its end to a multiple of `chunk` with `fill`.
    """
    rows, tokens, *rest = x.shape
    length = tokens // runs
    x = x.reshape(rows, runs, length, *rest)
    x = jnp.pad(
        x, [(0, 0), (0, 0), (0, -length % chunk)] + [(0, 0)] * len(rest), constant_values=fill
    )
    x = x.reshape(rows, runs, -1, chunk, *rest).transpose(2, 1, 0, 3, *range(4, 4 + len(rest)))
    return jnp.moveaxis(x, 3, -2) if rest else x


def join(y: Float[Array, "n R B *H L V"], tokens: int) -> Float[Array, "B t *H V"]:
    """Undo `split`, without the padding, for `tokens` tokens on the device."""
    y = jnp.moveaxis(y, -2, 3)
    n, runs, rows, chunk, *rest = y.shape
    y = y.transpose(2, 1, 0, 3, *range(4, y.ndim)).reshape(rows, runs, n * chunk, *rest)
    return y[:, :, : tokens // runs].reshape(rows, tokens, *rest)


def documents(starts: Bool[Array, "*c L"]) -> Documents:
    """Return the masks of chunks whose documents start where `starts` says."""
    document = jnp.cumsum(starts, axis=-1)
    order = jnp.arange(starts.shape[-1])
    earlier = (order[:, None] >= order[None]).reshape((1,) * (starts.ndim - 1) + (order.size,) * 2)
    last = document[..., -1:]
    return Documents(
        (document[..., :, None] == document[..., None, :]) & earlier,
        (document == 0)[..., None],
        (document == last)[..., None],
        (last == 0)[..., None],
    )


class Decays(NamedTuple):
    """Products of decays inside a chunk; a last dim of 1 is one decay for all channels.

    Attributes:
        entered: from the chunk's beginning to the token, the token's own decay included.
        leaves: from after the token to the chunk's end.
        passes: of the whole chunk.
    """

    entered: Float[Array, "*c L D"]
    leaves: Float[Array, "*c L D"]
    passes: Float[Array, "*c 1 D"]


def decays(log_decay: Float[Array, "*c L D"], docs: Documents) -> Decays:
    """Return the decays between tokens and the two ends of their chunk; 0 across documents."""
    before = jnp.cumsum(log_decay, axis=-2)
    after = jnp.cumsum(log_decay[..., ::-1, :], axis=-2)[..., ::-1, :]
    after = jnp.concatenate([after[..., 1:, :], jnp.zeros_like(after[..., :1, :])], axis=-2)
    whole = jnp.sum(log_decay, axis=-2, keepdims=True)
    return Decays(
        jnp.where(docs.entered, jnp.exp(before), 0),
        jnp.where(docs.leaves, jnp.exp(after), 0),
        jnp.where(docs.passes, jnp.exp(whole), 0),
    )


def pair_decays(log_decay: Float[Array, "*c L 1"], docs: Documents) -> Float[Array, "*c L L"]:
    """Return the decay from the token of a column to that of a row; 0 if it does not see it."""
    order = jnp.arange(log_decay.shape[-2])
    later = (order[:, None] > order[None]).reshape((1,) * (log_decay.ndim - 2) + (order.size,) * 2)
    summed = jnp.cumsum(jnp.where(later, log_decay, 0), axis=-2)
    return jnp.where(docs.visible, jnp.exp(summed), 0)


def decayed_products(
    q: Float[Array, "*c L K"],
    k: Float[Array, "*c L K"],
    log_decay: Float[Array, "*c L K"],
    einsum: Einsum,
) -> Float[Array, "*c L L"]:
    """Return Σ_c q[i, c] k[j, c] exp(Σ_{j < s <= i} log_decay[s, c]) for j <= i, and 0 for j > i.

    A product per channel would need arrays [L, L, K], and factors exp(±Σ) overflow for strong
    decays. Instead, halve the chunk: between the two halves the decay is the product of two factors
    that end and begin at the middle, each at most 1. Then halve the halves. L is a power of two.
    """
    length, lead = q.shape[-2], q.shape[:-2]
    products = jnp.sum(q * k, axis=-1).reshape(*lead, length, 1, 1)
    size = 1
    while size < length:
        halves = (*lead, length // (2 * size), 2, size, q.shape[-1])
        decay = log_decay.reshape(halves)
        to_end = jnp.cumsum(decay[..., 0, ::-1, :], axis=-2)[..., ::-1, :]
        to_end = jnp.concatenate([to_end[..., 1:, :], jnp.zeros_like(to_end[..., :1, :])], axis=-2)
        from_begin = jnp.cumsum(decay[..., 1, :, :], axis=-2)
        later = q.reshape(halves)[..., 1, :, :] * jnp.exp(from_begin)
        earlier = k.reshape(halves)[..., 0, :, :] * jnp.exp(to_end)
        products = _merge_blocks(products, einsum("...ik,...jk->...ij", later, earlier))
        size *= 2
    return products.reshape(*lead, length, length)


@jax.custom_vjp
def invert(m: Float[Array, "*c L L"]) -> Float[Array, "*c L L"]:
    """Return (1 + m)⁻¹ for a strictly lower triangular m, by halving; L is a power of two.

    The inverse of [[P, 0], [C, Q]] is [[P⁻¹, 0], [-Q⁻¹ C P⁻¹, Q⁻¹]]: only matrix products, and
    unlike the series 1 - m + m² … no powers of m, which become large and cancel.
    """
    length, lead = m.shape[-1], m.shape[:-2]
    inverse = jnp.ones((*lead, length, 1, 1), m.dtype)
    size = 1
    while size < length:
        count = length // (2 * size)
        blocks = m.reshape(*lead, count, 2, size, count, 2, size)
        blocks = jnp.swapaxes(blocks[..., 1, :, :, 0, :], -3, -2)  # [count, count, size, size]
        corner = jnp.moveaxis(jnp.diagonal(blocks, axis1=-4, axis2=-3), -1, -3)
        pairs = inverse.reshape(*lead, count, 2, size, size)
        left = _matmul(pairs[..., 1, :, :], corner)
        inverse = _merge_blocks(inverse, -_matmul(left, pairs[..., 0, :, :]))
        size *= 2
    return inverse.reshape(*lead, length, length)


def _invert_forward(m: Array) -> tuple[Array, Array]:
    inverse = invert(m)
    return inverse, inverse


def _invert_backward(inverse: Array, cotangent: Array) -> tuple[Array]:
    turned = jnp.swapaxes(inverse, -1, -2)
    return (-_matmul(_matmul(turned, cotangent), turned),)


invert.defvjp(_invert_forward, _invert_backward)


def _merge_blocks(diagonal: Float[Array, "*c n s s"], corner: Float[Array, "*c h s s"]) -> Array:
    """Join neighbouring diagonal blocks, with `corner` below the first and beside the second."""
    size = diagonal.shape[-1]
    pairs = diagonal.reshape(*corner.shape[:-2], 2, size, size)
    upper = jnp.concatenate([pairs[..., 0, :, :], jnp.zeros_like(corner)], axis=-1)
    return jnp.concatenate(
        [upper, jnp.concatenate([corner, pairs[..., 1, :, :]], axis=-1)], axis=-2
    )


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")
