"""Define what every mover of K and V is: one object that computes, and lists what it sends.

A mover brings the keys and values of other devices to a device's queries, one source after the
other, and brings dk and dv back. `ring.Ring`, `walk.Walk`, `walk.Nested` and `gather.Gather` are
movers. `strategy.compose` chooses one; nothing else depends on which it is.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float

from hcp_jax.cost.traffic import Remat, Traffic
from hcp_jax.kernels.merge import Partial
from hcp_jax.sequence.layout import KeyRuns

KV = tuple[Float[Array, "B S K H"], Float[Array, "B S K Hv"]]

# attend(kv, runs) -> partial, and attend_grads(kv, runs) -> (dq, dk, dv); other arguments bound.
Attend = Callable[[KV, KeyRuns], Partial]
AttendGrads = Callable[[KV, KeyRuns], tuple[Any, Any, Any]]


class Mover(Protocol):
    """Brings keys to queries; static and hashable."""

    @property
    def sources(self) -> int:
        """The number of parts that the keys come in, one after the other."""

    def block(self) -> Any:
        """Return which block of devices, that share their keys, this device is in."""

    def forward(self, attend: Attend, kv: KV, runs: KeyRuns) -> Partial:
        """Compute attention of this device's queries against the keys of all sources.

        Args:
            attend: the core, bound to this device's queries.
            kv: this device's own keys and values.
            runs: the key runs of every source, as stacked rows.
        """

    def backward(
        self, attend_grads: AttendGrads, kv: KV, runs: KeyRuns
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
        """Return the gradients of this device's queries, keys and values.

        Args:
            attend_grads: the core's gradient, bound to this device's queries and to the *global*
                lse and delta.
            kv: this device's own keys and values.
            runs: as in `forward`.
        """

    def traffic(self, kv_bytes: int, grad_bytes: int, remat: Remat) -> list[Traffic]:
        """List what it sends in a layer, forward and backward.

        Args:
            kv_bytes: bytes of a device's K and V.
            grad_bytes: bytes of their gradients.
            remat: what backward recomputes.
        """


def source_row(runs: KeyRuns, source: Any) -> KeyRuns:
    """Return the runs of one source; one row of offsets may serve all sources."""
    starts, offsets = jnp.asarray(runs.starts), jnp.asarray(runs.offsets)
    shared = offsets.ndim < starts.ndim
    return KeyRuns(starts[source], offsets if shared else offsets[source])


def add(a: Any, b: Any) -> list[Any]:
    """Add two lists of arrays."""
    return [x + y for x, y in zip(a, b, strict=True)]
