"""Ring attention: K and V go round, each device attends to what it holds, partials merge.

    hop 0        hop 1        hop 2        hop 3
    p: its own   p: p-1's     p: p-2's     p: p-3's      keys and values at device p of P = 4

A hop first sends on what it holds and then computes with it, so that the transfer to the next hop
hides behind attention. The first and the last hop stand outside the loop, because the first needs
no merge and the last sends nothing: K and V make exactly P - 1 moves.

Backward, K and V go round again, and the gradients of the keys that are visiting travel with them.
They arrive *before* this hop's part is added, so that they too move behind the kernels. The
gradients of a device's own keys (hop 0) wait at home, and what has gathered elsewhere comes back
in one last move: dk and dv make P - 1 moves, in float32.

Rings of several sizes turn side by side, in the hops of the widest. A move is one ppermute, the
union of the cycles that still turn; a device whose ring is done holds no keys, so that its kernels
visit nothing, and takes home the gradients that come back to it:

    rings of 4, 2, 1      hop 1  0→1→2→3→0  4→5→4  6      hops 2, 3  0→1→2→3→0  4  5  6

The layout decides how much work a hop has; under a causal mask in zigzag every device has the same
at every hop. (Liu, Zaharia and Abbeel, Ring Attention with Blockwise Transformers, 2023; zigzag:
Brandon et al., Striped Attention, 2023, and Zhu, ring-flash-attention, 2024.)
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

# attend(kv, runs) -> partial, and attend_grads(kv, runs) -> (dq, dk, dv), all else bound.
Attend = Callable[[KV, KeyRuns], Partial]
AttendGrads = Callable[[KV, KeyRuns], tuple[Any, Any, Any]]


class Rings(NamedTuple):
    """The devices that K and V go round, in rings of any sizes side by side; static.

    Attributes:
        axes: the mesh axes of all rings together.
        sizes: members of each ring, in the order of the devices along `axes`.
        lanes: how many neighbouring devices make up one member. Each has heads of its own, and
            sends to the same lane of the next member.
    """

    axes: tuple[str, ...] = ()
    sizes: tuple[int, ...] = (1,)
    lanes: int = 1

    @property
    def hops(self) -> int:
        """Hops of the widest ring; at the first of them a member has its own keys."""
        return groupings.num_hops(self.sizes)

    def member(self) -> Any:
        """The number of the member that this device is, or is a lane of."""
        if sum(self.sizes) == 1:
            return 0
        device = jax.lax.axis_index(self.axes)
        return device if self.lanes == 1 else device // self.lanes

    def visiting(self, runs: KeyRuns) -> Callable[[Any], KeyRuns]:
        """What gives the runs of the keys that are here at a hop: none once the ring is done."""
        starts, offsets = jnp.asarray(runs.starts), jnp.asarray(runs.offsets)
        member = self.member()
        first, size = (jnp.asarray(x)[member] for x in groupings.group_of_device(self.sizes))

        def at(hop) -> KeyRuns:
            source = first + (member - first - hop) % size
            of_source = offsets[source] if offsets.ndim == 2 else offsets
            if min(self.sizes) < self.hops:
                of_source = jnp.where(hop < size, of_source, 0)
            return KeyRuns(starts[source], of_source)

        return at

    def send_on(self, kv: KV, hop: int) -> KV:
        """K and V, as they arrive for `hop`."""
        return self._permute(kv, groupings.hop_permutation(self.sizes, hop))

    def send_home(self, dkv, hop: int):
        """The gradients of the keys that are here at the hop before, as they arrive for `hop`."""
        return self._permute(dkv, groupings.homeward_permutation(self.sizes, hop))

    def come_home(self, home, dkv, hop: int):
        """Add to `home` what has come back at `hop`: in the rings of so many members."""
        here = jnp.asarray(groupings.group_of_device(self.sizes)[1] == hop)[self.member()]
        return _add(home, [jnp.where(here, x, 0) for x in dkv])

    def _permute(self, tree, members: tuple[tuple[int, int], ...]):
        lanes = range(self.lanes)
        pairs = [(a * self.lanes + i, b * self.lanes + i) for a, b in members for i in lanes]
        with jax.named_scope("ring_hop"):
            return spmd.ppermute(tree, self.axes, pairs)


def forward(attend: Attend, kv: KV, runs: KeyRuns, rings: Rings) -> Partial:
    """Attention of this device's queries against the keys of its whole ring.

    Args:
        attend: the core, for this device's queries.
        kv: this device's own keys and values.
        runs: the key runs of every member, as stacked rows; offsets may be one row for all.
        rings: who passes K and V to whom.
    """
    last, visiting = rings.hops - 1, rings.visiting(runs)
    if last == 0:
        return attend(kv, visiting(0))

    arriving = rings.send_on(kv, 1)
    partial = attend(kv, visiting(0))
    # The next move waits for this kernel, or XLA would send twice on end with nothing to hide it.
    carry = jax.lax.optimization_barrier((arriving, partial))

    def middle(like: int, carry, hop):
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
    """The gradients of this device's queries, keys and values.

    Args:
        attend_grads: the core's gradient, for this device's queries and the *global* lse and delta.
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

    def middle(like: int, carry, hop):
        kv, dkv, dq = carry
        arriving = kv if like == last else rings.send_on(kv, like + 1)
        dkv = rings.send_home(dkv, like)
        dq_hop, *dkv_hop = attend_grads(kv, visiting(hop))
        carry = (arriving, _add(dkv, dkv_hop), dq + dq_hop)
        # After the last hop dk and dv go home behind what is left of its kernels.
        return carry if like == last else jax.lax.optimization_barrier(carry), None

    if last > 1:
        carry = jax.lax.optimization_barrier((arriving, dkv, dq))
        # Where a ring of `size` is done, keys stop at one hop and gradients are home at the next.
        borders = {size + i for size in rings.sizes for i in (-1, 0, 1)}
        for stretch in _stretches(range(2, last), borders):
            carry = _scan_by_twos(middle, carry, stretch)
            if stretch[-1] in rings.sizes:
                # What has come home is added before the rest moves on, or XLA would keep a copy.
                home = rings.come_home(home, carry[1], stretch[-1])
                home, carry = jax.lax.optimization_barrier((home, carry))
        (_, dkv, dq), _ = middle(last, carry, last)
        home = rings.come_home(home, dkv, last) if last in rings.sizes else home
    # dq waits for the way home of dk and dv, so that its kernel is what they hide behind.
    dq, dkv = jax.lax.optimization_barrier((dq, rings.send_home(dkv, last + 1)))
    return dq, *_add(home, dkv)


def _stretches(hops: range, borders: set[int]) -> list[range]:
    """`hops`, cut in front of the borders: in between, all moves are alike."""
    edges = sorted({hops.start, hops.stop} | (borders & set(hops)))
    return [range(*edge) for edge in itertools.pairwise(edges)]


def _scan_by_twos(hop: Callable, carry, hops: range):
    """Scan over hops that move alike and end in a barrier, two to a body.

    K and V arrive in a second buffer while kernels read the first. Two hops a body lead back to the
    first one, so that the loop's carry stays where it is; with one, XLA would copy K and V each
    hop. The barriers say that a move may overwrite a buffer: its kernels are done.
    """
    body = functools.partial(hop, hops.start)
    return jax.lax.scan(body, carry, jnp.arange(hops.start, hops.stop), unroll=2)[0]


def _add(a, b):
    return jax.tree.map(jnp.add, list(a), list(b))
