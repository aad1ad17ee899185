"""Gather K and V over a mesh axis, attend once; backward, gather again and scatter the gradients.

Simpler than a ring and with nothing to hide behind: the fewest, largest transfers, for short
sequences or for fast links. What is saved for the gradient is the local K and V alone. dk and dv
are summed in float32. (Dubey et al., The Llama 3 Herd of Models, 2024, section 3.3.2.)
"""

import jax
from jaxtyping import Array, Float

from hcp_jax.attention.ring import KV, Attend, AttendGrads, Rings
from hcp_jax.kernels.merge import Partial
from hcp_jax.sequence.layout import KeyRuns


def forward(attend: Attend, kv: KV, runs: KeyRuns, rings: Rings) -> Partial:
    """Attention of this device's queries against the keys of all devices of its ring.

    Args:
        attend: the core, for this device's queries.
        kv: this device's own keys and values.
        runs: `layout.ring_runs` for a ring of one: the runs of all keys, device by device.
        rings: one ring; what would go round it is gathered over its axes.
    """
    return attend(_gather(kv, rings.axes), KeyRuns(runs.starts[0], runs.offsets))


def backward(
    attend_grads: AttendGrads, kv: KV, runs: KeyRuns, rings: Rings
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
    """The gradients of this device's queries, keys and values; arguments as in `forward`."""
    axes, runs = rings.axes, KeyRuns(runs.starts[0], runs.offsets)
    dq, *dkv = attend_grads(_gather(kv, axes), runs)
    with jax.named_scope("gather_kv"):
        dk, dv = (jax.lax.psum_scatter(x, axes, scatter_dimension=1, tiled=True) for x in dkv)
    return dq, dk, dv


def _gather(kv: KV, axes: tuple[str, ...]) -> KV:
    with jax.named_scope("gather_kv"):
        k, v = (jax.lax.all_gather(x, axes, axis=1, tiled=True) for x in kv)
    return k, v
