"""Gather K and V over devices and attend once; in backward, gather again, scatter the gradients.

This is simpler than a ring. Its transfers are few and large and are not hidden behind compute, so
it suits short sequences and fast links. Only the local K and V are saved for the gradient. dk and
dv are summed in float32. (Dubey et al., The Llama 3 Herd of Models, 2024, section 3.3.2.)
"""

from typing import Any, NamedTuple

import jax

from hcp_jax.attention.movers import KV, Attend, AttendGrads, source_row
from hcp_jax.cost import traffic
from hcp_jax.kernels.merge import Partial
from hcp_jax.parallel.peers import Peers
from hcp_jax.sequence.layout import KeyRuns


class Gather(NamedTuple):
    """A mover that gathers the keys of all peers; see `movers.Mover`.

    Attributes:
        peers: the devices whose keys are gathered.
    """

    peers: Peers = Peers()

    @property
    def sources(self) -> int:
        """One: all keys are there at once."""
        return 1

    def block(self) -> Any:
        """See `Mover.block`."""
        return self.peers.block()

    def forward(self, attend: Attend, kv: KV, runs: KeyRuns) -> Partial:
        """See `Mover.forward`."""
        return attend(self._gather(kv), source_row(runs, 0))

    def backward(self, attend_grads: AttendGrads, kv: KV, runs: KeyRuns) -> tuple[Any, Any, Any]:
        """See `Mover.backward`."""
        dq, *dkv = attend_grads(self._gather(kv), source_row(runs, 0))
        sets: dict[str, Any] = {"axis_index_groups": self.peers.index_groups, "tiled": True}
        with jax.named_scope(traffic.GATHER_KV):
            dk, dv = (
                jax.lax.psum_scatter(x, self.peers.axes, scatter_dimension=1, **sets) for x in dkv
            )
        return dq, dk, dv

    def traffic(
        self, kv_bytes: int, grad_bytes: int, remat: traffic.Remat
    ) -> list[traffic.Traffic]:
        """See `Mover.traffic`."""
        return traffic.gather(self.peers.axes, self.peers.size, kv_bytes, grad_bytes, remat)

    def _gather(self, kv: KV) -> KV:
        sets: dict[str, Any] = {"axis_index_groups": self.peers.index_groups, "tiled": True}
        with jax.named_scope(traffic.GATHER_KV):
            k, v = (jax.lax.all_gather(x, self.peers.axes, axis=1, **sets) for x in kv)
        return k, v
