"""Compose the strategy of a call: which lanes exchange heads, and which mover brings K and V.

This is the only place that turns a comm type into collectives.
"""

import dataclasses
import itertools
import math
from typing import NamedTuple

from hcp_jax.attention.gather import Gather
from hcp_jax.attention.movers import Mover
from hcp_jax.attention.ring import Ring
from hcp_jax.attention.walk import Nested, Walk
from hcp_jax.cost import traffic
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.parallel.mesh import as_tuple
from hcp_jax.parallel.one_device import OneDevice
from hcp_jax.parallel.peers import Peers
from hcp_jax.sequence import groupings
from hcp_jax.sequence.placement import Groups, Streams

# A walk's hops are all unrolled, which costs compile time. Over more members than this, a ring of
# blocks (one loop body) moves K and V between blocks of at most `_BLOCK` members.
_MOST_UNROLLED, _BLOCK = 32, 8


class Composition(NamedTuple):
    """Exchange heads over `lanes`, then attend while `mover` brings K and V; static.

    Attributes:
        lanes: the devices that exchange heads with each other.
        mover: brings the keys and values of other devices.
    """

    lanes: Peers
    mover: Mover

    def traffic(
        self,
        *,
        tokens: int,
        heads: int,
        kv_heads: int,
        head_size: int,
        item_bytes: int,
        remat: traffic.Remat = "none",
    ) -> list[traffic.Traffic]:
        """List the collectives of one layer's attention; arguments as in `layer_traffic`."""
        lanes = self.lanes.size
        kv_items = 2 * tokens * traffic.kv_heads_exchanged(kv_heads, lanes) * head_size
        q_bytes, kv_bytes = tokens * heads * head_size * item_bytes, kv_items * item_bytes
        found: list[traffic.Traffic] = []
        if lanes > 1:
            found += traffic.exchange(self.lanes.axes, lanes, q_bytes, kv_bytes, remat)
        return found + self.mover.traffic(kv_bytes, kv_items * traffic.GRADIENT_BYTES, remat)


def compose(cp: ContextParallel | OneDevice, heads: int) -> Composition:
    """Return how attention of a device's `heads` query heads communicates in this context.

    Raises:
        ValueError: if the exchange does not divide the heads.
        NotImplementedError: if a2a cannot reach all devices of the widest group.
    """
    if isinstance(cp, OneDevice) or isinstance(cp.placement, Streams):
        return _over_streams(cp, heads)
    return _over_groups(cp, cp.placement, heads)


def _over_streams(cp: ContextParallel | OneDevice, heads: int) -> Composition:
    exchange, move, by = cp.strategy
    size, members = cp.axis_size(exchange), cp.axis_size(move)
    if heads % size:
        tp = cp.axis_size(cp.tp)
        after_tp = f" after tp={tp}" if tp > 1 else ""
        sizes = [str(n) for n in range(1, heads + 1) if heads % n == 0]
        raise ValueError(
            f"q has N={heads} heads{after_tp}; {cp.comm_type} over {' x '.join(exchange)}={size} "
            f"needs N % {size} == 0. Use comm_type='p2p', or one of {', '.join(sizes)} for "
            f"{' x '.join(exchange)}."
        )
    peers = Peers(move, members, members)
    mover: Mover = Gather(peers) if by == "gather" else Ring(peers)
    return Composition(Peers(exchange, size, size), mover)


def _over_groups(cp: ContextParallel, placement: Groups, heads: int) -> Composition:
    move, by = cp.strategy.move, cp.strategy.by
    axes, devices, widest = cp.flat_axes, placement.num_devices, placement.widest
    size = lanes_for(cp, heads)
    members = widest // size
    lanes = Peers(axes, devices, size)
    peers = Peers(axes, devices, members, stride=size)
    if not move and members > 1:
        raise NotImplementedError(
            f"comm_type='a2a' keeps a document on devices that exchange heads, here at most {size} "
            f"({heads} heads of a device, {cp.size} devices of a sequence), but widest_group="
            f"{widest}. Use 'a2a+p2p' or 'p2p', or groups of at most {size}."
        )
    if by == "gather":
        return Composition(lanes, Gather(peers))
    return Composition(lanes, _walk(peers, cp.axis_size(cp.cp_inner)))


def lanes_for(cp: ContextParallel, heads: int) -> int:
    """Return A under groups: how many devices exchange heads with each other.

    It is the largest number that divides the heads, the widest group, and the devices of the axes
    that the comm type exchanges heads over.
    """
    exchange = cp.strategy.exchange
    if not exchange:
        return 1
    return math.gcd(cp.placement.reach, cp.axis_size(exchange), heads)


def microbatch_lanes(cp: ContextParallel, num_heads: int) -> int:
    """Return the lanes to schedule and pack microbatches for: those of the widest groups.

    With one comm type per layer, they are lanes that every layer has.

    Args:
        cp: a context, with groups or without.
        num_heads: query heads of the model, before tp.
    """
    whole = dataclasses.replace(cp, widest_group=cp.axis_size(cp.flat_axes))
    heads = num_heads // cp.axis_size(cp.tp)
    layers = as_tuple(cp.comm_type)
    return math.gcd(*(lanes_for(whole.for_layer(i), heads) for i in range(len(layers))))


def _walk(peers: Peers, devices_per_host: int) -> Mover:
    """Return the walk over a block's members; in two levels where it crosses hosts or is long."""
    size, lanes = peers.size, peers.stride
    sizes = groupings.chain(peers.devices, devices_per_host, lanes)
    chain = [n // lanes for n in sizes if n < size * lanes and size * lanes % n == 0] + [size]
    radices = tuple(b // a for a, b in itertools.pairwise(chain))
    in_host = max((n for n in chain if n * lanes <= devices_per_host), default=1)
    inside = in_host
    if in_host == 1 and size > _MOST_UNROLLED:
        inside = max(n for n in chain if n <= _BLOCK)
    if inside in (1, size):
        return Walk(peers, radices)
    split = chain.index(inside)
    inner = Walk(peers._replace(size=inside), radices[:split])
    outer_peers = peers._replace(size=size // inside, stride=lanes * inside)
    outer = Ring(outer_peers) if size > _MOST_UNROLLED else Walk(outer_peers, radices[split:])
    return Nested(outer, inner)
