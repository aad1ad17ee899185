"""Streams onto the devices and back: arrays and masks in natural order, cut as a context says.

It stands apart from `context.py`, whose methods these are, because that one decides and this one
moves. Under groups there is no one stream to reorder: see `microbatch.py`.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from hcp_jax import checks
from hcp_jax.layout import from_layout, runs_per_device, to_layout
from hcp_jax.mask import Mask, intervals

if TYPE_CHECKING:
    from hcp_jax.context import ContextParallel

_log = logging.getLogger("hcp_jax")


class Gathered(NamedTuple):
    """A host array that is read where it is needed: a device has `read` of its part of `places`.

    Attributes:
        places: integers, 0 where there is nothing (padding).
        read: makes values of places, elementwise.
    """

    places: np.ndarray
    read: Callable[[np.ndarray], np.ndarray]

    def whole(self) -> np.ndarray:
        """All of it."""
        return self.read(self.places)


def shard(cp: "ContextParallel", x: Array | np.ndarray | Gathered, dim: int) -> jax.Array:
    """See `ContextParallel.shard`."""
    x, read = x if isinstance(x, Gathered) else (x, None)
    dim = checks.dimension("dim", dim, x.ndim)
    length = x.shape[dim]
    padding = cp.padded_length(length) - length
    if padding:
        _tell_padding(length, padding, cp.size, cp.layout)
    if dim != 0:
        _require_batch(cp, x.shape[0], f"an array of shape {tuple(x.shape)}")
    sharding = cp.sharding(x.ndim, dim)
    if isinstance(x, jax.Array):
        return _reorder(x, cp, dim, cp.padded_length(length), sharding)
    widths = [(0, padding if d == dim else 0) for d in range(x.ndim)]
    host = to_layout(np.pad(x, widths), cp.size, cp.layout, dim)

    def part(index: Any) -> np.ndarray:
        return host[index] if read is None else read(host[index])

    return jax.make_array_from_callback(host.shape, sharding, part)


def unshard(cp: "ContextParallel", x: jax.Array, dim: int, length: int | None) -> jax.Array:
    """See `ContextParallel.unshard`."""
    dim = checks.dimension("dim", dim, x.ndim)
    if length is not None:
        length = checks.integer("length", length, least=0, most=x.shape[dim])
    y = _restore(x, cp, dim)
    return y if length is None else jax.lax.slice_in_dim(y, 0, length, axis=dim)


def shard_batch(cp: "ContextParallel", batch: dict[str, Any]) -> dict[str, Any]:
    """See `ContextParallel.shard_batch`."""
    arrays = {n: x.places if isinstance(x, Gathered) else x for n, x in batch.items()}
    lengths = {
        name: x.shape[1]
        for name, x in arrays.items()
        if not isinstance(x, Mask) and np.ndim(x) >= 2
    }
    if len(set(lengths.values())) != 1:
        raise ValueError(
            f"shard_batch needs arrays [B, T, ...] of one length T, got {lengths or 'none'}."
        )
    length = next(iter(lengths.values()))
    return {name: _shard_entry(cp, name, x, length) for name, x in batch.items()}


def place_mask(cp: "ContextParallel", mask: Mask, length: int) -> Mask:
    """See `ContextParallel.place`."""
    if mask.placement is not None:
        raise ValueError("this mask has been placed already.")
    padded = cp.padded_length(length)
    placed = []
    for x in mask.intervals(length):
        host = np.pad(np.asarray(x), ((0, 0), (0, padded - length)))
        host = to_layout(host, cp.size, cp.layout, 1)
        rows = cp.dp if host.shape[0] > 1 else None
        if rows is not None:
            _require_batch(cp, host.shape[0], f"a mask of {host.shape[0]} rows")
        placed.append(_from_host(host, cp, PartitionSpec(rows, None)))
    return dataclasses.replace(intervals(*placed), placement=cp.placement)


def _shard_entry(cp: "ContextParallel", name: str, x: Any, length: int) -> Any:
    if isinstance(x, Mask):
        return place_mask(cp, x, length)
    if isinstance(x, Gathered):
        return shard(cp, x, dim=1)
    x = np.asarray(x)
    if x.ndim >= 2:
        return shard(cp, x, dim=1)
    if x.ndim == 1:
        _require_batch(cp, x.shape[0], f"{name} of shape {x.shape}")
    return _from_host(x, cp, PartitionSpec(cp.dp) if x.ndim else PartitionSpec())


def _from_host(x: np.ndarray, cp: "ContextParallel", spec: PartitionSpec) -> jax.Array:
    return jax.make_array_from_callback(x.shape, NamedSharding(cp.mesh, spec), x.__getitem__)


def _require_batch(cp: "ContextParallel", rows: int, what: str) -> None:
    if rows % cp.axis_size(cp.dp):
        raise ValueError(
            f"{what} has a batch of {rows}, which dp={cp.axis_size(cp.dp)} does not "
            "divide; change the batch size or dp."
        )


@functools.lru_cache(maxsize=1024)
def _tell_padding(length: int, padding: int, size: int, layout: str) -> None:
    # The cache makes it one line per shape, not one per step.
    _log.info(
        "padded %d tokens with %d: a %s layout over %d devices needs a multiple of %d. The padding "
        "is never seen under a causal mask; join others with hcp.lengths(%d).",
        length,
        padding,
        layout,
        size,
        runs_per_device(layout) * size,
        length,
    )


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _reorder(x, cp: "ContextParallel", dim: int, padded: int, sharding: NamedSharding):
    widths = [(0, padded - x.shape[dim] if d == dim else 0) for d in range(x.ndim)]
    y = to_layout(jnp.pad(x, widths), cp.size, cp.layout, dim)
    return jax.lax.with_sharding_constraint(y, sharding)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _restore(x, cp: "ContextParallel", dim: int):
    return from_layout(x, cp.size, cp.layout, dim)
