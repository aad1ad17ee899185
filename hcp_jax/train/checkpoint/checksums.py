"""Compute checksums of arrays that do not depend on the mesh or on how the arrays are cut.

Each element's bits are mixed with the element's number, and the results are summed modulo 2³². The
order of an integer sum does not matter, so every device sums its own part. A change of one element
is always noticed; any other change, such as two elements or blocks that were swapped, is missed
with a probability of 2⁻³².
"""

import math
from typing import Any

import jax
import jax.numpy as jnp


def sum_arrays(state: Any) -> dict[str, int]:
    """Return the checksum of each array; all processes must call this.

    Args:
        state: a pytree of arrays, on devices or in pinned host memory.

    Returns:
        Checksums by the array's path in the tree, such as "params.norm.scale".

    >>> import jax.numpy as jnp
    >>> sums = sum_arrays({"a": jnp.array([1.0, 2.0]), "b": jnp.array([2.0, 1.0])})
    >>> sums["a"] == sums["b"]
    False
    """
    leaves = jax.tree.leaves_with_path(state)
    # All arrays of one program must be on the same devices.
    groups: dict[Any, list[tuple[str, jax.Array]]] = {}
    for i, (path, x) in enumerate(leaves):
        # Arrays in host memory may not all fit on the devices together: fetch them one by one.
        on_host = x.sharding.memory_kind == "pinned_host"
        key = i if on_host else frozenset(x.sharding.device_set)
        groups.setdefault(key, []).append((dotted(path), x))
    sums: dict[str, int] = {}
    for group in groups.values():
        found = jax.device_get(_sums([x for _, x in group]))
        sums |= {name: int(total) for (name, _), total in zip(group, found, strict=True)}
    return sums


def dotted(path: tuple[Any, ...]) -> str:
    """Return a path in a tree as one name, whichever kinds of container it goes through."""
    return ".".join(map(_name, path))


def _name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    raise TypeError(f"unknown kind of path {key!r}")


@jax.jit
def _sums(arrays: list[jax.Array]) -> list[jax.Array]:
    return [_sum(jax.device_put(x, jax.memory.Space.Device)) for x in arrays]


def _sum(x: jax.Array) -> jax.Array:
    if jnp.issubdtype(x.dtype, jnp.floating):
        x = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    number = jnp.zeros(x.shape, jnp.uint32)
    for dim in range(x.ndim):
        stride = math.prod(x.shape[dim + 1 :]) % 2**32
        number += jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim) * jnp.uint32(stride)
    return jnp.sum(_mix(x.astype(jnp.uint32) ^ _mix(number)), dtype=jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """Spread every bit over all 32, one to one (the end of MurmurHash3, A. Appleby, 2011)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
