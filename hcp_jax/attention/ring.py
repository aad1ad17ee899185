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

Rings of several sizes run side by side, for as many hops as the largest ring needs. Each move is
one ppermute over all rings that are not finished. A device whose ring is finished holds no keys, so
its kernels visit nothing; it keeps the gradients that have returned to it:

    rings of 4, 2, 1      hop 1  0→1→2→3→0  4→5→4  6      hops 2, 3  0→1→2→3→0  4  5  6

The layout determines the work of a hop. With zigzag and a causal mask, all devices have the same
work at every hop. (Liu, Zaharia and Abbeel, Ring Attention with Blockwise Transformers, 2023;
zigzag: Brandon et al., Striped Attention, 2023, and Zhu, ring-flash-attention, 2024.)
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hcp_jax.kernels.merge import Partial, merge
from hcp_jax.parallel import spmd
from hcp_jax.sequence import groupings
from hcp_jax.sequence.layout import KeyRuns

KV = tuple[Float[Array, "B S K H"], Float[Array, "B S K Hv"]]

# attend(kv, runs) -> partial, and attend_grads(kv, runs) -> (dq, dk, dv); other arguments bound.
Attend = Callable[[KV, KeyRuns], Partial]
AttendGrads = Callable[[KV, KeyRuns], tuple[Any, Any, Any]]


class Rings(NamedTuple):
    """The devices that K and V move over, in rings of any sizes side by side; static.

    Attributes:
        axes: the mesh axes of all rings together.
        sizes: members of each ring, in the order of the devices along `axes`.
        lanes: how many neighbouring devices make up one member. Each has its own heads, and sends
            to the same lane of the next member.
    """

    axes: tuple[str, ...] = ()
    sizes: tuple[int, ...] = (1,)
    lanes: int = 1

    @property
    def hops(self) -> int:
        """The number of hops of the largest ring; at hop 0 a member has its own keys."""
        return groupings.num_hops(self.sizes)

    def member(self) -> Any:
        """Return the index of the member that this device belongs to."""
        if sum(self.sizes) == 1:
            return 0
        device = jax.lax.axis_index(self.axes)
        return device if self.lanes == 1 else device // self.lanes

    def visiting(self, runs: KeyRuns) -> Callable[[Any], KeyRuns]:
        """Return a function from a hop to the runs of the keys on this device at that hop.

        The runs are empty once this device's ring is finished.
        """
        starts, offsets = jnp.asarray(runs.starts), jnp.asarray(runs.offsets)
        member = self.member()
        first, size = (jnp.asarray(x)[member] for x in groupings.group_of_device(self.sizes))

        def at(hop: Any) -> KeyRuns:
            source = first + (member - first - hop) % size
            source_offsets = offsets[source] if offsets.ndim == 2 else offsets
            if min(self.sizes) < self.hops:
                source_offsets = jnp.where(hop < size, source_offsets, 0)
            return KeyRuns(starts[source], source_offsets)

        return at

    def send_on(self, kv: KV, hop: int) -> KV:
        """Send K and V to the next member; return those that arrive for `hop`."""
        return self._permute(kv, groupings.hop_permutation(self.sizes, hop))

    def send_home(self, dkv: Any, hop: int) -> Any:
        """Send the gradients of the keys of hop - 1; return those that arrive for `hop`."""
        return self._permute(dkv, groupings.homeward_permutation(self.sizes, hop))

    def add_returned(self, home: Any, dkv: Any, hop: int) -> Any:
        """Add to `home` the dk and dv that arrived at `hop`, in rings of exactly `hop` members."""
        here = jnp.asarray(groupings.group_of_device(self.sizes)[1] == hop)[self.member()]
        return _add(home, [jnp.where(here, x, 0) for x in dkv])

    def _permute(self, tree: Any, members: tuple[tuple[int, int], ...]) -> Any:
        lanes = range(self.lanes)
        pairs = [(a * self.lanes + i, b * self.lanes + i) for a, b in members for i in lanes]
        with jax.named_scope("ring_hop"):
            return spmd.ppermute(tree, self.axes, pairs)


def forward(attend: Attend, kv: KV, runs: KeyRuns, rings: Rings) -> Partial:
    """Compute attention of this device's queries against the keys of its whole ring.

    Args:
        attend: the core, bound to this device's queries.
        kv: this device's own keys and values.
        runs: key runs of every member, as stacked rows; one row of offsets may serve all members.
        rings: the devices that K and V move over.
    """
    last, visiting = rings.hops - 1, rings.visiting(runs)
    if last == 0:
        return attend(kv, visiting(0))

    arriving = rings.send_on(kv, 1)
    partial = attend(kv, visiting(0))
    # The next move waits for this kernel. Otherwise XLA would start two sends in a row, and the
    # second would not be hidden.
    carry = jax.lax.optimization_barrier((arriving, partial))

    def middle(like: int, carry: Any, hop: Any) -> Any:
        kv, partial = carry
        arriving = rings.send_on(kv, like + 1)
        partial = merge(partial, attend(kv, visiting(hop)))
        return jax.lax.optimization_barrier((arriving, partial)), None

    for stretch in _stretches(range(1, last), {size - 1 for size in rings.sizes}):
        carry = _scan_by_twos(middle, carry, stretch)
    kv, partial = carry
    return merge(partial, attend(kv, visiting(last)))


def backward(
    attend_grads: AttendGrads, kv: KV, runs: KeyRuns, rings: Rings
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
    """Return the gradients of this device's queries, keys and values.

    Args:
        attend_grads: the core's gradient, bound to this device's queries and to the *global* lse
            and delta.
        kv: this device's own keys and values.
        runs: as in `forward`.
        rings: as in `forward`.
    """
    last, visiting = rings.hops - 1, rings.visiting(runs)
    if last == 0:
        return attend_grads(kv, visiting(0))

    arriving = rings.send_on(kv, 1)
    dq, *home = attend_grads(kv, visiting(0))
    kv, dq, home = jax.lax.optimization_barrier((arriving, dq, home))
    if last > 1:
        arriving = rings.send_on(kv, 2)
    dq_hop, *dkv = attend_grads(kv, visiting(1))
    dq += dq_hop

    def middle(like: int, carry: Any, hop: Any) -> Any:
        kv, dkv, dq = carry
        arriving = kv if like == last else rings.send_on(kv, like + 1)
        dkv = rings.send_home(dkv, like)
        dq_hop, *dkv_hop = attend_grads(kv, visiting(hop))
        carry = (arriving, _add(dkv, dkv_hop), dq + dq_hop)
        # No barrier after the last hop: dk and dv return while its last kernels still run.
        return carry if like == last else jax.lax.optimization_barrier(carry), None

    if last > 1:
        carry = jax.lax.optimization_barrier((arriving, dkv, dq))
        # When a ring of `size` is finished, its keys stop at one hop and its gradients return at
        # the next.
        borders = {size + i for size in rings.sizes for i in (-1, 0, 1)}
        for stretch in _stretches(range(2, last), borders):
            carry = _scan_by_twos(middle, carry, stretch)
            if stretch[-1] in rings.sizes:
                # Add the returned gradients before the others move on; else XLA would keep a copy.
                home = rings.add_returned(home, carry[1], stretch[-1])
                home, carry = jax.lax.optimization_barrier((home, carry))
        (_, dkv, dq), _ = middle(last, carry, last)
        home = rings.add_returned(home, dkv, last) if last in rings.sizes else home
    # Tie dq to the last move of dk and dv, so that the move is hidden behind dq's kernel.
    dq, dkv = jax.lax.optimization_barrier((dq, rings.send_home(dkv, last + 1)))
    return dq, *_add(home, dkv)


def _stretches(hops: range, borders: set[int]) -> list[range]:
    """Cut `hops` before each border; the hops of a stretch all send over the same rings."""
    edges = sorted({hops.start, hops.stop} | (borders & set(hops)))
    return [range(*edge) for edge in itertools.pairwise(edges)]


def _scan_by_twos(hop: Callable[..., Any], carry: Any, hops: range) -> Any:
    """Scan over hops that send over the same rings and end in a barrier, two hops per loop body.

    K and V arrive in a second buffer while kernels read the first. After two hops they are in the
    first buffer again, so the loop's carry keeps its address; with one hop per body, XLA would copy
    K and V at each hop. The barriers make sure that a move overwrites a buffer only after the
    kernels that read it are done.
    """
    body = functools.partial(hop, hops.start)
    return jax.lax.scan(body, carry, jnp.arange(hops.start, hops.stop), unroll=2)[0]


def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, list(a), list(b))
