"""Bring the tokens of groups into stream order: exchange heads in a block, then sort the tokens.

Under groups (dynamic context parallelism) the order of tokens over devices is data: every document
is cut zigzag by itself, and a device holds pieces of many. What follows a stream (a recurrence, a
convolution) therefore exchanges heads for tokens among the devices of a block, all-to-all. Then a
device holds all tokens of its block for its share of the heads, and sorts them by global index:

    device 0   a0 a1 a4 b0          all-to-all, sort          a0 a1 a2 a3 a4 b0 b1 b2   heads 0, 1
    device 1   a2 a3 b1 b2          --------------->          a0 a1 a2 a3 a4 b0 b1 b2   heads 2, 3

Documents do not mix, because each begins with position 0. One program serves all groupings up to
its widest group, whose block it is. The bytes grow with the tokens: passing states instead, as for
streams, would need a map for every piece of a document.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from hcp_jax.cost.traffic import EXCHANGE_HEADS
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.parallel.peers import Peers
from hcp_jax.sequence.placement import Groups

_GATHER_ORDER = "gather_order"


def block_of(cp: ContextParallel | None, order: Any) -> Peers | None:
    """Return the devices that share a block of the widest group; None if there are no groups.

    Args:
        cp: context; None for one device.
        order: what tells the order of the tokens.

    Raises:
        ValueError: if there are groups but no order, or an order but no groups.
    """
    grouped = cp is not None and isinstance(cp.placement, Groups)
    if grouped and order is None:
        raise ValueError(
            "with groups, the order of the tokens is data of the batch: give order="
            "mask.intervals.end, from the mask that hcp.place_microbatch returns."
        )
    if not grouped and order is not None:
        raise ValueError("order is for contexts with groups; leave it out for streams.")
    if cp is None or not isinstance(cp.placement, Groups):
        return None
    return Peers(cp.flat_axes, cp.placement.num_devices, cp.placement.widest)


class BlockOrder(NamedTuple):
    """The stream order of a block's tokens; inside `shard_map`.

    Attributes:
        block: devices of a block.
        positions: positions of the block's tokens, in stream order.
        sorting: the slot of the block, device by device, that holds each token in stream order.
    """

    block: Peers
    positions: Int32[Array, "1 T"]
    sorting: Int32[Array, "1 T"]

    def to_stream(self, x: Array) -> Array:
        """Exchange all heads `[1, t, N, …]` for a share of the block's tokens, in stream order."""
        return _take(self._exchange(x, split=2, concat=1), self.sorting)

    def from_stream(self, x: Array) -> Array:
        """Undo `to_stream`."""
        return self._exchange(_take(x, jnp.argsort(self.sorting, axis=1)), split=1, concat=2)

    def own(self, x: Array, axis: int) -> Array:
        """Return this device's share of a dim of heads."""
        part = x.shape[axis] // self.block.size
        return jax.lax.dynamic_slice_in_dim(x, self.block.rank() * part, part, axis)

    def _exchange(self, x: Array, split: int, concat: int) -> Array:
        if self.block.size == 1:
            return x
        with jax.named_scope(EXCHANGE_HEADS):
            exchanged: Array = jax.lax.all_to_all(
                x,
                self.block.axes,
                split_axis=split,
                concat_axis=concat,
                axis_index_groups=self.block.index_groups,
                tiled=True,
            )
            return exchanged


def block_order(
    block: Peers, order: Int32[Array, "1 nt"], positions: Int32[Array, "1 t"]
) -> BlockOrder:
    """Return the stream order of a block's tokens, from `order` and `positions` of one device's.

    `order` may be that of several devices of one row, as masks inside a `shard_map` have it.
    """
    own = positions.shape[1]
    if order.shape[1] != own:
        part = jax.lax.axis_index(block.axes) % (order.shape[1] // own)
        order = jax.lax.dynamic_slice_in_dim(order, part * own, own, axis=1)
    # Empty slots (0) come last. There a document of one token begins in every slot.
    keys = jnp.where(order == 0, np.iinfo(np.int32).max, order)
    both = jnp.stack([keys, positions])
    if block.size > 1:
        with jax.named_scope(_GATHER_ORDER):
            both = jax.lax.all_gather(
                both, block.axes, axis=2, axis_index_groups=block.index_groups, tiled=True
            )
    sorting = jnp.argsort(both[0], axis=1)
    return BlockOrder(block, jnp.take_along_axis(both[1], sorting, axis=1), sorting)


def shares(heads: int, columns: int, devices: int) -> tuple[int, int]:
    """Return in how many parts the columns of a head's state are cut, and how wide a part is.

    Heads alone are shared out if `devices` divides them; otherwise also the columns of a head,
    which do not mix, with zeros as the last ones.

    >>> shares(4, 6, 8), shares(3, 6, 2)
    ((2, 3), (2, 3))
    """
    parts = devices // int(np.gcd(devices, heads))
    return parts, -(-columns // parts)


def whole_groups(groups: int, heads: int, devices: int) -> int:
    """Return how often to repeat `groups` shared heads so that `devices` cut them like `heads`."""
    return next(m for m in range(1, heads // groups + 1) if groups * m % devices == 0)


def padded(x: Array, axis: int, size: int) -> Array:
    """Return an array with zeros at the end of a dim."""
    widths: Sequence[tuple[int, int]] = [
        (0, size - n if dim == axis else 0) for dim, n in enumerate(x.shape)
    ]
    return jnp.pad(x, widths)


def _take(x: Array, slots: Int32[Array, "1 T"]) -> Array:
    taken: Array = jnp.take(x, slots[0], axis=1, unique_indices=True, mode="clip")
    return taken
