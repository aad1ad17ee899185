"""Checksums of arrays that do not depend on how they are cut: the same on every mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils


def of_arrays(state: Any) -> dict[str, int]:
    """Of each array, the sum of its bits taken as unsigned integers, modulo 2³².

    The order of an integer sum does not matter. All processes must call this.

    Args:
        state: a pytree of arrays.

    Returns:
        By the array's path in the tree, with points between its parts.
    """
    leaves = jax.tree.leaves_with_path(state)
    names = [".".join(name(key) for key in path) for path, _ in leaves]
    # One program can only have the arrays of the same devices.
    together: dict[Any, list[int]] = {}
    for i, (_, x) in enumerate(leaves):
        on_host = x.sharding.memory_kind == "pinned_host"
        key = "host" if on_host else frozenset(x.sharding.device_set)
        together.setdefault(key, []).append(i)
    sums: dict[str, int] = {}
    for key, indices in together.items():
        arrays = [leaves[i][1] for i in indices]
        found = _sums_on_host(arrays) if key == "host" else jax.device_get(_sums_of_bits(arrays))
        sums |= {names[i]: int(total) for i, total in zip(indices, found, strict=True)}
    return sums


def name(key: Any) -> str:
    """The plain name of a path's part, whichever kind of container it goes into."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    raise TypeError(f"unknown kind of path {key!r}")


@jax.jit
def _sums_of_bits(arrays: list[jax.Array]) -> list[jax.Array]:
    return [_sum_of_bits(x) for x in arrays]


def _sum_of_bits(x: jax.Array) -> jax.Array:
    if jnp.issubdtype(x.dtype, jnp.floating):
        x = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    return jnp.sum(x.astype(jnp.uint32), dtype=jnp.uint32)


def _sums_on_host(arrays: list[jax.Array]) -> list[int]:
    """The same of arrays in the host's memory, of which the devices may not have room for all."""
    of_shards = [
        [
            np.sum(np.asarray(shard.data).view(f"uint{8 * x.dtype.itemsize}"), dtype=np.uint32)
            for shard in x.addressable_shards
            if shard.replica_id == 0
        ]
        for x in arrays
    ]
    # An array's sum wraps around; that of two scalars would warn of it.
    sums = np.array([np.sum(np.array(x, np.uint32), dtype=np.uint32) for x in of_shards])
    if jax.process_count() > 1:
        of_all = np.asarray(multihost_utils.process_allgather(sums))
        return of_all.sum(axis=0, dtype=np.uint32).tolist()
    return sums.tolist()
