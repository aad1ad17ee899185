"""Bring K and V straight from their owners, so that one program serves every grouping.

At hop h, member r takes the K and V of member r ⊖ h: the digits of h are subtracted from those of
r, each modulo its radix. With radices of two that is r XOR h. Members of an aligned block exchange
with members of that block only while h is less than its size:

    radices 2, 2, 2       hop 1  0↔1 2↔3 4↔5 6↔7     inside pairs
                          hop 2  0↔2 1↔3 4↔6 5↔7     inside fours
                          hop 3  0↔3 1↔2 4↔7 5↔6
                          hop 4  0↔4 1↔5 2↔6 3↔7 …   all eight

So a group of 2 has all its keys after hop 1, and then pairs only with groups that are done as well:
no group waits for another one. Which devices form groups is data (intervals and key runs); only
the widest group is compiled in. dk and dv go home by the same way back, in the next hop, hidden
behind its kernels.

`Nested` walks over the blocks of a host's members and, for each, over the members of that block, so
that K and V cross the network once per block instead of once per member.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hcp_jax.attention.movers import KV, Attend, AttendGrads, Mover, add, source_row
from hcp_jax.cost import traffic
from hcp_jax.kernels.merge import Partial, merge
from hcp_jax.parallel.peers import Peers
from hcp_jax.sequence.groupings import source_members
from hcp_jax.sequence.layout import KeyRuns


class Walk(NamedTuple):
    """A mover whose members take K and V straight from each other; see `movers.Mover`.

    Attributes:
        peers: the members of a block, lane by lane.
        radices: the digits of a member's rank, the fastest first; their product is `peers.size`.
    """

    peers: Peers
    radices: tuple[int, ...]

    @property
    def sources(self) -> int:
        """The members of a block."""
        return self.peers.size

    def block(self) -> Any:
        """See `Mover.block`."""
        return self.peers.block()

    def forward(self, attend: Attend, kv: KV, runs: KeyRuns) -> Partial:
        """See `Mover.forward`."""
        arriving = self._fetch(kv, 1)
        partial = attend(kv, self._visiting(runs, 0))
        for hop in range(1, self.sources):
            # The next move waits for the kernel before it; see `Ring.forward`.
            kv, here, partial = jax.lax.optimization_barrier((kv, arriving, partial))
            arriving = self._fetch(kv, hop + 1)
            partial = merge(partial, attend(here, self._visiting(runs, hop)))
        return partial

    def backward(self, attend_grads: AttendGrads, kv: KV, runs: KeyRuns) -> tuple[Any, Any, Any]:
        """See `Mover.backward`."""
        arriving = self._fetch(kv, 1)
        dq, *home = attend_grads(kv, self._visiting(runs, 0))
        leaving: Any = None
        for hop in range(1, self.sources):
            kv, here, dq, home, leaving = jax.lax.optimization_barrier(
                (kv, arriving, dq, home, leaving)
            )
            arriving = self._fetch(kv, hop + 1)
            returned = None if leaving is None else self._return(leaving, hop - 1)
            dq_hop, *leaving = attend_grads(here, self._visiting(runs, hop))
            dq = dq + dq_hop
            if returned is not None:
                home = add(home, returned)
        if leaving is not None:
            # Tie dq to the last move, so that the move is hidden behind dq's kernel.
            returned = self._return(leaving, self.sources - 1)
            dq, returned = jax.lax.optimization_barrier((dq, returned))
            home = add(home, returned)
        dk, dv = home
        return dq, dk, dv

    def traffic(
        self, kv_bytes: int, grad_bytes: int, remat: traffic.Remat
    ) -> list[traffic.Traffic]:
        """See `Mover.traffic`."""
        return traffic.hops(self.peers.axes, self.sources, kv_bytes, grad_bytes, remat)

    def _visiting(self, runs: KeyRuns, hop: int) -> KeyRuns:
        source = jnp.asarray(source_members(self.radices, hop))
        return source_row(runs, source[self.peers.rank()])

    def _fetch(self, kv: KV, hop: int) -> Any:
        """Return the K and V of this hop's source; None after the last hop."""
        if hop >= self.sources:
            return None
        return self.peers.permute(kv, source_members(self.radices, hop), traffic.RING_HOP)

    def _return(self, dkv: Any, hop: int) -> Any:
        """Send the gradients of visiting keys to their owner; return those of this device's own."""
        inverse = np.argsort(source_members(self.radices, hop))
        return self.peers.permute(dkv, inverse, traffic.RING_HOP)


class Nested(NamedTuple):
    """A mover over blocks (`outer`), with a mover over the members of each (`inner`).

    Attributes:
        outer: brings the K and V of this device's counterpart in each block.
        inner: brings those of all members of a block, from whoever holds them at the time.
    """

    outer: Mover
    inner: Mover

    @property
    def sources(self) -> int:
        """The members of all blocks."""
        return self.outer.sources * self.inner.sources

    def block(self) -> Any:
        """See `Mover.block`."""
        return self.outer.block()

    def forward(self, attend: Attend, kv: KV, runs: KeyRuns) -> Partial:
        """See `Mover.forward`."""
        inner = functools.partial(self.inner.forward, attend)
        return self.outer.forward(inner, kv, self._by_block(runs))

    def backward(self, attend_grads: AttendGrads, kv: KV, runs: KeyRuns) -> tuple[Any, Any, Any]:
        """See `Mover.backward`."""
        inner = functools.partial(self.inner.backward, attend_grads)
        return self.outer.backward(inner, kv, self._by_block(runs))

    def traffic(
        self, kv_bytes: int, grad_bytes: int, remat: traffic.Remat
    ) -> list[traffic.Traffic]:
        """See `Mover.traffic`."""
        found = self.outer.traffic(kv_bytes, grad_bytes, remat)
        inside = self.inner.traffic(kv_bytes, grad_bytes, remat)
        return [
            *found,
            *(dataclasses.replace(t, count=t.count * self.outer.sources) for t in inside),
        ]

    def _by_block(self, runs: KeyRuns) -> KeyRuns:
        shape = self.outer.sources, self.inner.sources
        return KeyRuns(*(x.reshape(*shape, -1) for x in runs))
