"""Shard arrays and masks in natural order over the devices of a context, and bring them back.

These functions implement methods of `ContextParallel`: `context.py` decides, this module moves
data. With groups, streams are not reordered: see `microbatch.py`.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from hcp_jax.base import checks
from hcp_jax.parallel import spmd
from hcp_jax.parallel.roles import MeshRoles
from hcp_jax.parallel.roll import roll_local
from hcp_jax.sequence import placed_mask
from hcp_jax.sequence.layout import runs_per_device
from hcp_jax.sequence.mask import Mask
from hcp_jax.sequence.placed_mask import PlacedMask
from hcp_jax.sequence.terms import Given

_log = logging.getLogger("hcp_jax")


class Gathered(NamedTuple):
    """A host array that is read lazily: a device gets `read` of its own part of `places`.

    Attributes:
        places: integers that say what to read; 0 for padding.
        read: function from places to values, elementwise.
    """

    places: np.ndarray
    read: Callable[[np.ndarray], np.ndarray]

    def whole(self) -> np.ndarray:
        """Return the whole array."""
        return self.read(self.places)


def shard(cp: MeshRoles, x: Array | np.ndarray | Gathered, dim: int) -> jax.Array:
    """See `ContextParallel.shard`."""
    _require_whole_streams(cp, "shard")
    x, read = x if isinstance(x, Gathered) else (x, None)
    dim = checks.dimension("dim", dim, x.ndim)
    length = x.shape[dim]
    padding = cp.padded_length(length) - length
    if padding:
        _note_padding(cp, length, padding)
    if dim != 0:
        _require_batch(cp, x.shape[0], f"an array of shape {tuple(x.shape)}")
    if isinstance(x, jax.Array):
        return _reorder(x, cp, dim, cp.padded_length(length))
    widths = [(0, padding if d == dim else 0) for d in range(x.ndim)]
    host = cp.placement.to_layout(np.pad(x, widths), dim)

    def part(index: Any) -> np.ndarray:
        return host[index] if read is None else read(host[index])

    return jax.make_array_from_callback(host.shape, cp.sharding(x.ndim, dim), part)


def unshard(cp: MeshRoles, x: jax.Array, dim: int, length: int | None) -> jax.Array:
    """See `ContextParallel.unshard`."""
    _require_whole_streams(cp, "unshard")
    dim = checks.dimension("dim", dim, x.ndim)
    if length is not None:
        length = checks.integer("length", length, least=0, most=x.shape[dim])
    y = _restore(x, cp, dim)
    return y if length is None else jax.lax.slice_in_dim(y, 0, length, axis=dim)


def shard_batch(cp: MeshRoles, batch: Mapping[str, Any]) -> dict[str, Any]:
    """See `ContextParallel.shard_batch`."""
    arrays = {n: x.places if isinstance(x, Gathered) else x for n, x in batch.items()}
    lengths = {
        name: x.shape[1]
        for name, x in arrays.items()
        if not isinstance(x, Mask | PlacedMask) and np.ndim(x) >= 2
    }
    if len(set(lengths.values())) != 1:
        raise ValueError(
            f"shard_batch needs arrays [B, T, ...] of one length T, got {lengths or 'none'}."
        )
    length = next(iter(lengths.values()))
    return {name: _shard_entry(cp, name, x, length) for name, x in batch.items()}


class MaskLengthError(ValueError):
    """A mask was written for fewer queries than there are, and padding does not explain it."""


def require_ids_of_all_tokens(cp: MeshRoles | None, mask: Mask, length: int) -> None:
    """Refuse a mask that was written for fewer queries than there are.

    Args:
        cp: the context that may have padded the queries; None for one device.
        mask: in natural order.
        length: T.

    Raises:
        MaskLengthError: unless T is what `cp.shard` pads the mask's own queries to.
    """
    written = mask.length
    if written is None or written >= length:
        return
    expected = written if cp is None else cp.padded_length(written)
    if length != expected:
        padded = "" if cp is None else f", which cp.shard pads to {expected}"
        raise MaskLengthError(
            f"the mask was written for {written} queries{padded}, but there are {length}. Make it "
            f"from ids of all {length} tokens (padding has an id of its own: "
            "hcp.documents(ids, padding_id=...)), or give the tokens that the mask is for."
        )


def place_mask(
    cp: MeshRoles, mask: Mask | PlacedMask, length: int, key_length: int | None = None
) -> PlacedMask:
    """See `ContextParallel.place`."""
    if not isinstance(mask, Mask):
        raise ValueError(
            f"mask must be a hcp_jax.Mask in natural order, got {type(mask).__name__}"
            + (": this mask has been placed already." if isinstance(mask, PlacedMask) else ".")
        )
    length = checks.integer("length", length, least=0)
    key_length = length if key_length is None else checks.integer("key_length", key_length, least=0)
    require_ids_of_all_tokens(cp, mask, length)
    padded = Mask((Given(*mask.intervals(length, key_length)),))
    placed = placed_mask.place(padded, cp.placement, cp.padded_length(length), key_length)
    rows = cp.dp if placed.intervals.start.shape[0] > 1 else None
    if rows is not None:
        _require_batch(
            cp, placed.intervals.start.shape[0], f"a mask of {len(placed.intervals.start)} rows"
        )
    spec = PartitionSpec(rows, None)
    return jax.tree.map(lambda x: _from_host(x, cp, spec), placed)


def positions(cp: MeshRoles, length: int) -> jax.Array:
    """See `ContextParallel.positions`."""
    index = cp.placement.global_index(cp.padded_length(length))[None]
    if cp.on_device:
        device = jax.lax.axis_index(cp.cp_axes)
        return jnp.asarray(index.reshape(cp.size, 1, -1))[device]
    if spmd.inside_shard_map():
        return jnp.asarray(index)
    sharding = NamedSharding(cp.mesh, PartitionSpec(None, cp.cp_axes or None))
    return jax.make_array_from_callback(index.shape, sharding, index.__getitem__)


def roll(cp: MeshRoles, x: jax.Array, shift: int, dim: int) -> jax.Array:
    """See `ContextParallel.roll`."""
    dim %= x.ndim
    length = x.shape[dim] * (cp.size if cp.on_device else 1)
    if length != cp.padded_length(length):
        raise ValueError(
            f"dim {dim} has {x.shape[dim]} tokens, which is not a whole layout over "
            f"{cp.size} devices; put it there with cp.shard first."
        )
    return _roll(x, cp, int(shift), dim)


def _shard_entry(cp: MeshRoles, name: str, x: Any, length: int) -> Any:
    if isinstance(x, Mask | PlacedMask):
        return place_mask(cp, x, length)
    if isinstance(x, Gathered):
        return shard(cp, x, dim=1)
    x = np.asarray(x)
    if x.ndim >= 2:
        return shard(cp, x, dim=1)
    if x.ndim == 1:
        _require_batch(cp, x.shape[0], f"{name} of shape {x.shape}")
    return _from_host(x, cp, PartitionSpec(cp.dp) if x.ndim else PartitionSpec())


def _from_host(x: np.ndarray, cp: MeshRoles, spec: PartitionSpec) -> jax.Array:
    return jax.make_array_from_callback(x.shape, NamedSharding(cp.mesh, spec), x.__getitem__)


def _require_batch(cp: MeshRoles, rows: int, what: str) -> None:
    if rows % cp.axis_size(cp.dp):
        raise ValueError(
            f"{what} has a batch of {rows}, which dp={cp.axis_size(cp.dp)} does not "
            "divide; change the batch size or dp."
        )


def _note_padding(cp: MeshRoles, length: int, padding: int) -> None:
    if not cp.padded_streams.add(length, length + padding):
        return
    _log.info(
        "padded %d tokens with %d: a %s layout over %d devices needs a multiple of %d. The padding "
        "is never seen under a causal mask; join others with hcp.lengths(%d).",
        length,
        padding,
        cp.layout,
        cp.size,
        runs_per_device(cp.layout) * cp.size,
        length,
    )


def _require_whole_streams(cp: MeshRoles, what: str) -> None:
    if cp.on_device:
        raise ValueError(
            f"cp.{what} was called inside a shard_map over {', '.join(cp.cp_axes)}, where arrays "
            f"are one device's own part of a stream. Call cp.{what} outside of it."
        )


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _reorder(x: jax.Array, cp: MeshRoles, dim: int, padded: int) -> Any:
    widths = [(0, padded - x.shape[dim] if d == dim else 0) for d in range(x.ndim)]
    spec = cp.spec(x.ndim, dim)

    def reorder(x: Any) -> Any:
        y = cp.placement.to_layout(jnp.pad(x, widths), dim)
        return spmd.constrain(y, cp.mesh, cp.axes, spec)

    return spmd.run(cp.mesh, cp.axes, reorder, spec, x)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _restore(x: jax.Array, cp: MeshRoles, dim: int) -> Any:
    def restore(x: Any) -> Any:
        return cp.placement.from_layout(x, dim)

    # With Explicit axes the result is replicated along `dim`: after cutting to the original
    # length, `dim` need not be divisible.
    spec = PartitionSpec(*(None if d == dim else s for d, s in enumerate(cp.spec(x.ndim, dim))))
    return spmd.run(cp.mesh, cp.axes, restore, spec, x)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _roll(x: jax.Array, cp: MeshRoles, shift: int, dim: int) -> Any:
    spec = cp.spec(x.ndim, dim)
    local = functools.partial(
        roll_local, axes=cp.cp_axes, cp_size=cp.size, layout=cp.layout, shift=shift, dim=dim
    )
    rolled = spmd.shard_map(cp.mesh, cp.axes, local, in_specs=spec, out_specs=spec)
    return spmd.run(cp.mesh, cp.axes, rolled, spec, x)
