"""Compute ring attention: K and V move around a ring, and each device merges its partials.

    hop 0        hop 1        hop 2        hop 3
    p: its own   p: p-1's     p: p-2's     p: p-3's      keys and values at device p of P = 4

A hop first sends the K and V that it holds and then computes with them, so that the transfer for
the next hop is hidden behind attention. The first and the last hop are outside the loop, because
the first needs no merge and the last sends nothing: K and V make exactly P - 1 moves.

In backward, K and V move around again, and the gradients of visiting keys travel with them. These
gradients arrive *before* this hop's part is added, so that their transfer too is hidden behind the
kernels. The gradients of a device's own keys from hop 0 stay on that device; the sum from the
other devices returns in one last move. So dk and dv make P - 1 moves, in float32.

The layout determines the work of a hop. With zigzag and a causal mask, all devices have the same
work at every hop. (Liu, Zaharia and Abbeel, Ring Attention with Blockwise Transformers, 2023;
zigzag: Brandon et al., Striped Attention, 2023, and Zhu, ring-flash-attention, 2024.)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hcp_jax.attention.movers import KV, Attend, AttendGrads, add, source_row
from hcp_jax.cost import traffic
from hcp_jax.kernels.merge import Partial, merge
from hcp_jax.parallel.peers import Peers
from hcp_jax.sequence.layout import KeyRuns


class Ring(NamedTuple):
    """A mover that sends K and V from each peer to the next; see `movers.Mover`.

    Attributes:
        peers: the devices of a ring.
    """

    peers: Peers = Peers()

    @property
    def sources(self) -> int:
        """The members of a ring."""
        return self.peers.size

    def block(self) -> Any:
        """See `Mover.block`."""
        return self.peers.block()

    def forward(self, attend: Attend, kv: KV, runs: KeyRuns) -> Partial:
        """See `Mover.forward`."""
        last, visiting = self.sources - 1, self._visiting(runs)
        if last == 0:
            return attend(kv, visiting(0))

        arriving = self._send_on(kv)
        partial = attend(kv, visiting(0))
        # The next move waits for this kernel. Otherwise XLA would start two sends in a row, and
        # the second would not be hidden.
        carry = jax.lax.optimization_barrier((arriving, partial))

        def middle(carry: Any, hop: Any) -> Any:
            kv, partial = carry
            arriving = self._send_on(kv)
            partial = merge(partial, attend(kv, visiting(hop)))
            return jax.lax.optimization_barrier((arriving, partial)), None

        kv, partial = _scan_by_twos(middle, carry, range(1, last))
        return merge(partial, attend(kv, visiting(last)))

    def backward(self, attend_grads: AttendGrads, kv: KV, runs: KeyRuns) -> tuple[Any, Any, Any]:
        """See `Mover.backward`."""
        last, visiting = self.sources - 1, self._visiting(runs)
        if last == 0:
            return attend_grads(kv, visiting(0))

        arriving = self._send_on(kv)
        dq, *home = attend_grads(kv, visiting(0))
        kv, dq, home = jax.lax.optimization_barrier((arriving, dq, home))
        if last > 1:
            arriving = self._send_on(kv)
        dq_hop, *dkv = attend_grads(kv, visiting(1))
        dq += dq_hop

        def hop_with(arriving: Any, carry: Any, hop: Any) -> Any:
            kv, dkv, dq = carry
            dkv = self._send_on(dkv)
            dq_hop, *dkv_hop = attend_grads(kv, visiting(hop))
            return arriving, add(dkv, dkv_hop), dq + dq_hop

        def middle(carry: Any, hop: Any) -> Any:
            carry = hop_with(self._send_on(carry[0]), carry, hop)
            return jax.lax.optimization_barrier(carry), None

        if last > 1:
            carry = jax.lax.optimization_barrier((arriving, dkv, dq))
            carry = _scan_by_twos(middle, carry, range(2, last))
            # No barrier after the last hop: dk and dv return while its last kernels still run.
            _, dkv, dq = hop_with(None, carry, last)
        # Tie dq to the last move of dk and dv, so that the move is hidden behind dq's kernel.
        dq, dkv = jax.lax.optimization_barrier((dq, self._send_on(dkv)))
        dk, dv = add(home, dkv)
        return dq, dk, dv

    def traffic(
        self, kv_bytes: int, grad_bytes: int, remat: traffic.Remat
    ) -> list[traffic.Traffic]:
        """See `Mover.traffic`."""
        return traffic.hops(self.peers.axes, self.sources, kv_bytes, grad_bytes, remat)

    def _visiting(self, runs: KeyRuns) -> Callable[[Any], KeyRuns]:
        """Return a function from a hop to the runs of the keys on this device at that hop."""
        rank = self.peers.rank()
        return lambda hop: source_row(runs, (rank - hop) % self.sources)

    def _send_on(self, tree: Any) -> Any:
        """Send arrays to the next peer; return those of the one before."""
        source = [(rank - 1) % self.sources for rank in range(self.sources)]
        return self.peers.permute(tree, source, traffic.RING_HOP)


def _scan_by_twos(hop: Callable[..., Any], carry: Any, hops: range) -> Any:
    """Scan over hops that end in a barrier, two hops per loop body.

    K and V arrive in a second buffer while kernels read the first. After two hops they are in the
    first buffer again, so the loop's carry keeps its address; with one hop per body, XLA would copy
    K and V at each hop. The barriers make sure that a move overwrites a buffer only after the
    kernels that read it are done.
    """
    if not hops:
        return carry
    return jax.lax.scan(hop, carry, jnp.arange(hops.start, hops.stop), unroll=2)[0]
