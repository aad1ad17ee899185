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

The layout decides how much work a hop has; under a causal mask in zigzag every device has the same
at every hop. (Liu, Zaharia and Abbeel, Ring Attention with Blockwise Transformers, 2023; zigzag:
Brandon et al., Striped Attention, 2023, and Zhu, ring-flash-attention, 2024.)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hcp_jax.kernels.merge import Partial, merge
from hcp_jax.layout import KeyRuns

KV = tuple[Float[Array, "B S K H"], Float[Array, "B S K Hv"]]

# attend(kv, runs) -> partial, and attend_grads(kv, runs) -> (dq, dk, dv), all else bound.
Attend = Callable[[KV, KeyRuns], Partial]
AttendGrads = Callable[[KV, KeyRuns], tuple[Any, Any, Any]]


def forward(
    attend: Attend,
    kv: KV,
    runs: KeyRuns,
    axes: tuple[str, ...],
) -> Partial:
    """Attention of this device's queries against the keys of the whole ring.

    Args:
        attend: the core, for this device's queries.
        kv: this device's own keys and values.
        runs: `layout.ring_runs`: the key runs of every device of the ring.
        axes: mesh axes of the ring.
    """
    size, visiting = _ring(runs, axes)
    if size == 1:
        return attend(kv, visiting(0))

    arriving = _send_on(kv, axes, size)
    partial = attend(kv, visiting(0))

    def middle(carry, hop):
        kv, partial = carry
        arriving = _send_on(kv, axes, size)
        partial = merge(partial, attend(kv, visiting(hop)))
        return jax.lax.optimization_barrier((arriving, partial)), None

    (kv, partial), _ = _scan_by_twos(middle, (arriving, partial), jnp.arange(1, size - 1))
    return merge(partial, attend(kv, visiting(size - 1)))


def backward(
    attend_grads: AttendGrads,
    kv: KV,
    runs: KeyRuns,
    axes: tuple[str, ...],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
    """The gradients of this device's queries, keys and values.

    Args:
        attend_grads: the core's gradient, for this device's queries and the *global* lse and delta.
        kv: this device's own keys and values.
        runs: as in `forward`.
        axes: mesh axes of the ring.
    """
    size, visiting = _ring(runs, axes)
    if size == 1:
        return attend_grads(kv, visiting(0))

    arriving = _send_on(kv, axes, size)
    dq, *home = attend_grads(kv, visiting(0))
    # The next move waits for these kernels, or XLA would send twice on end with nothing to hide it.
    kv, dq, home = jax.lax.optimization_barrier((arriving, dq, home))
    if size > 2:
        arriving = _send_on(kv, axes, size)
    dq_hop, *dkv = attend_grads(kv, visiting(1))
    dq += dq_hop

    def middle(carry, hop, last=False):
        kv, dkv, dq = carry
        arriving = kv if last else _send_on(kv, axes, size)
        dkv = _send_on(dkv, axes, size)
        dq_hop, *dkv_hop = attend_grads(kv, visiting(hop))
        carry = (arriving, _add(dkv, dkv_hop), dq + dq_hop)
        # After the last hop dk and dv go home behind what is left of its kernels.
        return carry if last else jax.lax.optimization_barrier(carry), None

    if size > 2:
        carry = (arriving, dkv, dq)
        carry, _ = _scan_by_twos(middle, carry, jnp.arange(2, size - 1))
        (_, dkv, dq), _ = middle(carry, size - 1, last=True)
    # dq waits for the way home of dk and dv, so that its kernel is what they hide behind.
    dq, dkv = jax.lax.optimization_barrier((dq, _send_on(dkv, axes, size)))
    return dq, *_add(home, dkv)


def _ring(runs: KeyRuns, axes: tuple[str, ...]) -> tuple[int, Callable[[Any], KeyRuns]]:
    """The ring's size, and the runs of the keys that visit this device at a hop."""
    size = runs.starts.shape[0]
    here = jax.lax.axis_index(axes) if size > 1 else 0
    starts, offsets = jnp.asarray(runs.starts), jnp.asarray(runs.offsets)
    return size, lambda hop: KeyRuns(starts[(here - hop) % size], offsets)


def _scan_by_twos(hop: Callable, carry, hops):
    """Scan over hops that end in a barrier, two to a body.

    K and V arrive in a second buffer while kernels read the first. Two hops a body lead back to the
    first one, so that the loop's carry stays where it is; with one, XLA would copy K and V each
    hop. The barriers say that a move may overwrite a buffer: its kernels are done.
    """
    return jax.lax.scan(hop, carry, hops, unroll=2)


def _send_on(tree, axes: tuple[str, ...], size: int):
    pairs = [(source, (source + 1) % size) for source in range(size)]
    with jax.named_scope("ring_hop"):
        return jax.tree.map(lambda x: jax.lax.ppermute(x, axes, pairs), tree)


def _add(a, b):
    return jax.tree.map(jnp.add, list(a), list(b))
