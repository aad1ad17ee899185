"""Put the rows of tokens in the order of their experts, and back."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32


class Order(NamedTuple):
    """The (token, choice) pairs of n tokens with k experts each, sorted by expert.

    Padding comes last, behind the rows of all experts.

    Attributes:
        pair: the pair of each row: token · k + choice.
        row: the row of each pair.
        sizes: number of rows of each expert.
    """

    pair: Int32[Array, "nk"]
    row: Int32[Array, "nk"]
    sizes: Int32[Array, "E"]


def by_expert(expert: Int32[Array, "n k"], real: Bool[Array, "n"], num_experts: int) -> Order:
    """Sort the pairs of all tokens that are `real` by expert, the others last.

    >>> by_expert(jnp.array([[1], [0], [1]]), jnp.array([True, True, False]), 2).sizes.tolist()
    [1, 1]
    """
    flat = jnp.where(real[:, None], expert, num_experts).reshape(-1)
    pair = jnp.argsort(flat, stable=True).astype(jnp.int32)
    row = jnp.zeros_like(pair).at[pair].set(jnp.arange(pair.size, dtype=jnp.int32))
    sizes = jnp.sum(flat[:, None] == jnp.arange(num_experts)[None], axis=0, dtype=jnp.int32)
    return Order(pair, row, sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def spread(k: int, x: Float[Array, "n D"], order: Order) -> Float[Array, "nk D"]:
    """Return each token's row once for each of its k experts, in order.

    The gradient is `collect`, not a scatter, so sums always have the same order.
    """
    return x[order.pair // k]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def collect(k: int, rows: Float[Array, "nk D"], order: Order) -> Float[Array, "n D"]:
    """Return the sum of each token's k rows, added in float32; the inverse way of `spread`."""
    own = rows[order.row].reshape(-1, k, rows.shape[-1])
    return jnp.sum(own, axis=1, dtype=jnp.promote_types(rows.dtype, jnp.float32)).astype(rows.dtype)


def _forward(function, k, x, order):
    return function(k, x, order), order


def _backward(transposed, k, order, cotangent):
    return transposed(k, cotangent, order), None


spread.defvjp(functools.partial(_forward, spread), functools.partial(_backward, collect))
collect.defvjp(functools.partial(_forward, collect), functools.partial(_backward, spread))
