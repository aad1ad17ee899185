"""Shift a stream across device borders: one device's part, inside shard_map.

    natural      0 | 1 | 2 | 3 | 4 | 5 | 6 | 7      roll by -1: every chunk loses its first token
    zigzag       0   7 | 1   6 | 2   5 | 3   4      and gets that of the next chunk, which is on
                 dev 0   dev 1   dev 2   dev 3      the next device (0 -> 1), on the one before
                                                    (7 -> 6 reversed), or on the same (3 -> 4)

Only borders are sent: one ppermute per chunk that a device holds.
"""

import jax
import jax.numpy as jnp
import numpy as np

from hcp_jax.parallel import spmd
from hcp_jax.sequence.layout import chunk_order, runs_per_device


def roll_local(
    x: jax.Array, *, axes: tuple[str, ...], cp_size: int, layout: str, shift: int, dim: int
) -> jax.Array:
    """Return one device's part of `ContextParallel.roll`.

    Args:
        x: this device's chunks.
        axes: the mesh axes that `dim` is cut over.
        cp_size: number of devices along `axes`.
        layout: the layout of `dim`.
        shift: number of tokens to shift by, as in `jnp.roll`.
        dim: the sequence dim.
    """
    length = x.shape[dim] * cp_size
    chunk = x.shape[dim] // runs_per_device(layout)
    shift = (shift + length // 2) % length - length // 2
    while shift:  # at most one chunk length per step
        step = max(-chunk, min(chunk, shift))
        x = _roll_step(x, axes, cp_size, layout, step, dim)
        shift -= step
    return x


def _roll_step(
    x: jax.Array, axes: tuple[str, ...], cp_size: int, layout: str, step: int, dim: int
) -> jax.Array:
    """Shift by |step| <= one chunk: every chunk takes the border of its neighbour in the stream.

    Take the first (or second) chunk of all devices: their neighbours are on different devices, so
    one ppermute serves them all. At the turning points of the zigzag a device holds both chunks,
    and nothing is sent.
    """
    order = chunk_order(cp_size, layout)
    runs = runs_per_device(layout)
    chunk_position = np.argsort(order)
    chunks = jnp.split(x, runs, axis=dim)
    size = chunks[0].shape[dim]
    edge, rest = (
        ((0, -step), (-step, size)) if step < 0 else ((size - step, size), (0, size - step))
    )
    borders = jnp.stack([jax.lax.slice_in_dim(chunk, *edge, axis=dim) for chunk in chunks])
    device = jax.lax.axis_index(axes) if axes else 0

    rolled = []
    for slot, chunk in enumerate(chunks):
        neighbour = (order.reshape(-1, runs)[:, slot] + (1 if step < 0 else -1)) % order.size
        source, source_slot = np.divmod(chunk_position[neighbour], runs)  # by receiving device
        at_home = source == np.arange(cp_size)
        own = borders[jnp.asarray(source_slot)[device]]
        sent = np.zeros(cp_size, np.int32)
        sent[source[~at_home]] = source_slot[~at_home]
        pairs = [(int(source[d]), d) for d in range(cp_size) if not at_home[d]]
        arrived = own
        if pairs:
            visiting = spmd.ppermute(borders[jnp.asarray(sent)[device]], axes, pairs)
            arrived = jnp.where(jnp.asarray(at_home)[device], own, visiting)
        kept = jax.lax.slice_in_dim(chunk, *rest, axis=dim)
        rolled.append(jnp.concatenate([kept, arrived] if step < 0 else [arrived, kept], axis=dim))
    return jnp.concatenate(rolled, axis=dim)
