"""Gather K and V over mesh axes and attend once; in backward, gather again, scatter the gradients.

This is simpler than a ring. Its transfers are few and large and are not hidden behind compute, so
it suits short sequences and fast links. Only the local K and V are saved for the gradient. dk and
dv are summed in float32. (Dubey et al., The Llama 3 Herd of Models, 2024, section 3.3.2.)
"""

import jax
from jaxtyping import Array, Float

from hcp_jax.attention.ring import KV, Attend, AttendGrads, Rings
from hcp_jax.kernels.merge import Partial
from hcp_jax.sequence.layout import KeyRuns


def forward(attend: Attend, kv: KV, runs: KeyRuns, rings: Rings) -> Partial:
    """Compute attention of this device's queries against the keys of all devices of its ring.

    Args:
        attend: the core, bound to this device's queries.
        kv: this device's own keys and values.
        runs: `layout.ring_runs` with ring_size 1: the runs of all keys, device by device.
        rings: one ring; K and V are gathered over its axes.
    """
    return attend(_gather(kv, rings.axes), KeyRuns(runs.starts[0], runs.offsets))


def backward(
    attend_grads: AttendGrads, kv: KV, runs: KeyRuns, rings: Rings
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
    """Return the gradients of this device's queries, keys and values; arguments as in `forward`."""
    axes, runs = rings.axes, KeyRuns(runs.starts[0], runs.offsets)
    dq, *dkv = attend_grads(_gather(kv, axes), runs)
    with jax.named_scope("gather_kv"):
        dk, dv = (jax.lax.psum_scatter(x, axes, scatter_dimension=1, tiled=True) for x in dkv)
    return dq, dk, dv


def _gather(kv: KV, axes: tuple[str, ...]) -> KV:
    with jax.named_scope("gather_kv"):
        k, v = (jax.lax.all_gather(x, axes, axis=1, tiled=True) for x in kv)
    return k, v
