"""Compute attention under a grouping: each group of devices attends to its own documents.

    groups (4, 2, 2), hosts of 4 devices, exchange of heads in pairs (A = 2)

    devices    0  1 | 2  3 || 4  5 || 6  7      a pair is one member of a ring: it holds the
    members      0  |   1  ||   2  ||   3       buffers of both, one after the other, for half
    rings       0 → 1 → 0       2       3       of the heads

The strategy is the usual composition: an exchange of heads inside equal sets of A neighbouring
devices, and rings of any sizes side by side. Only one thing differs: the intervals of a device's
queries and the key runs of its ring depend on the documents, so they come with the batch.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hcp_jax.attention.heads import Exchange
from hcp_jax.attention.local import LocalSpec, attention
from hcp_jax.attention.ring import Rings
from hcp_jax.kernels.core import CoreSpec
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.sequence.layout import PADDING, KeyRuns
from hcp_jax.sequence.mask import Intervals


def exchange_size(cp: ContextParallel, heads: int) -> int:
    """Return A, the number of devices that exchange heads with each other.

    A is the largest number that divides the heads, all group sizes and cp_inner, so that the
    devices of an exchange are always in one group and on one host.

    Raises:
        NotImplementedError: if the comm type is a2a and some group is not of size A.
    """
    assert cp.groups is not None
    if not cp.strategy.exchange:
        return 1
    inside = cp.axis_size(cp.cp_inner)
    size = math.gcd(*cp.groups, inside, heads)
    if not cp.strategy.move and set(cp.groups) != {size}:
        raise NotImplementedError(
            f"comm_type='a2a' with groups {cp.groups} needs groups of one size that divides the "
            f"{heads} heads of a device and cp_inner={inside}. Use 'a2a+p2p' or 'p2p', which take "
            "any."
        )
    return size


def local_spec(cp: ContextParallel, core: CoreSpec, heads: int, key_length: int) -> LocalSpec:
    """Return the static parameters of attention on one device under a grouping.

    Args:
        cp: a context with groups.
        core: how one device computes.
        heads: number of query heads of a device, after tp.
        key_length: slots of a row, over all its devices.
    """
    assert cp.groups is not None
    size = exchange_size(cp, heads)
    return LocalSpec(
        core=core,
        key_length=key_length,
        exchange=Exchange(cp.flat_axes, size, sum(cp.groups)),
        rings=Rings(cp.flat_axes, tuple(group // size for group in cp.groups), size),
        head_groups=cp.head_groups,
    )


def group_attention(
    spec: LocalSpec,
    q: Float[Array, "1 t N H"],
    k: Float[Array, "1 t K H"],
    v: Float[Array, "1 t K Hv"],
    intervals: Intervals,
    sinks: Float[Array, "N"] | None,
    runs: KeyRuns,
    *,
    return_residual: bool,
) -> tuple[Float[Array, "1 t N Hv"], Float[Array, "1 t N"] | None]:
    """Compute `local.attention` of a device's queries against the keys of its group.

    Args:
        spec: from `local_spec`.
        q: this device's queries.
        k: its keys.
        v: its values.
        intervals: intervals of the queries of all devices along cp_inner.
        sinks: as in `local.attention`.
        runs: key runs of all devices, as stacked rows.
        return_residual: as in `local.attention`.
    """
    slots, size = q.shape[1], spec.exchange.size
    members = intervals.start.shape[1] // (size * slots)  # along cp_inner
    first = spec.rings.member() % members * size * slots
    own = (jax.lax.dynamic_slice_in_dim(x, first, size * slots, axis=1) for x in intervals)
    return attention(
        spec,
        *(q, k, v, Intervals(*own), sinks, member_runs(runs, size, slots)),
        return_residual=return_residual,
    )


def member_runs(runs: KeyRuns, size: int, slots: int) -> KeyRuns:
    """Return the key runs of ring members of `size` devices each, from the runs of the devices.

    A member's keys are the buffers of its devices, one after the other. The padding at the end of
    each buffer becomes a separate run.
    """
    if size == 1:
        return runs
    starts, offsets = (jnp.asarray(x) for x in runs)
    members = starts.shape[0] // size
    begin = slots * jnp.arange(size, dtype=jnp.int32)[None, :, None]
    offsets = (offsets.reshape(members, size, -1) + begin).reshape(members, -1)
    return KeyRuns(
        jnp.pad(starts, ((0, 0), (0, 1)), constant_values=PADDING).reshape(members, -1),
        jnp.pad(offsets, ((0, 0), (0, 1)), constant_values=size * slots),
    )
