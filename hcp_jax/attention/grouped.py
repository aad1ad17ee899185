"""Attention under a group layout: each group of devices attends to documents of its own.

    groups (4, 2, 2), hosts of 4 devices, exchange of heads in pairs (A = 2)

    devices    0  1 | 2  3 || 4  5 || 6  7      a pair is one member of a ring: it holds the
    members      0  |   1  ||   2  ||   3       buffers of both, one behind the other, for half
    rings       0 → 1 → 0       2       3       of the heads

It is the same composition as ever, of an exchange inside equal pairs, triples … of devices and of
rings of any sizes side by side. All that is new is where a device finds its queries' intervals and
its ring's key runs; both come with the batch, since they depend on its documents.
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
    """A, the devices that exchange heads with each other, given the heads that they share out.

    The most that are inside one group wherever they stand, and inside one row of cp_inner (a host),
    and divide the heads.

    Raises:
        NotImplementedError: if the comm type is a2a and that is not every whole group.
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


def spec_of(cp: ContextParallel, core: CoreSpec, heads: int, key_length: int) -> LocalSpec:
    """The static facts of attention on one device of a group layout.

    Args:
        cp: has groups.
        core: how a device computes.
        heads: query heads of a device (of its tp part).
        key_length: places of a row, of all its devices together.
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


def attention_of_group(
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
    """`local.attention` of a device's queries against the keys of its group.

    Args:
        spec: from `spec_of`.
        q: this device's queries.
        k: its keys.
        v: its values.
        intervals: of the queries of all devices along cp_inner.
        sinks: as in `local.attention`.
        runs: of the keys of all devices, as stacked rows.
        return_residual: as in `local.attention`.
    """
    places, size = q.shape[1], spec.exchange.size
    number = intervals.start.shape[1] // (size * places)  # of members along cp_inner
    here = spec.rings.member() % number * size * places
    own = (jax.lax.dynamic_slice_in_dim(x, here, size * places, axis=1) for x in intervals)
    return attention(
        spec,
        *(q, k, v, Intervals(*own), sinks, members_runs(runs, size, places)),
        return_residual=return_residual,
    )


def members_runs(runs: KeyRuns, size: int, places: int) -> KeyRuns:
    """The key runs of members of `size` devices, from those of the devices.

    A member's keys are the buffers of its devices, one behind the other, so that what is padding at
    the end of each buffer becomes a run of its own.
    """
    if size == 1:
        return runs
    starts, offsets = (jnp.asarray(x) for x in runs)
    members = starts.shape[0] // size
    begin = places * jnp.arange(size, dtype=jnp.int32)[None, :, None]
    offsets = (offsets.reshape(members, size, -1) + begin).reshape(members, -1)
    return KeyRuns(
        jnp.pad(starts, ((0, 0), (0, 1)), constant_values=PADDING).reshape(members, -1),
        jnp.pad(offsets, ((0, 0), (0, 1)), constant_values=size * places),
    )
