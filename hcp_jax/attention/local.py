"""Run one device's part inside shard_map: exchange heads, attend while K and V move, exchange back.

Every strategy is this composition. Only its middle part has a gradient rule of its own: a
custom_vjp that saves q, the local k and v, out and lse, and moves K and V once more in backward.
The all-to-alls around it use JAX's transpose, which is again an all-to-all.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from hcp_jax.attention import heads
from hcp_jax.attention.derivatives import first_order
from hcp_jax.attention.movers import Mover
from hcp_jax.kernels.core import CoreSpec, attend, attend_grads
from hcp_jax.kernels.merge import Partial, merge, softmax_weight
from hcp_jax.parallel.peers import Peers
from hcp_jax.sequence.layout import KeyRuns
from hcp_jax.sequence.mask import Intervals

# Names of the residuals. A remat policy that saves them avoids a second forward of attention.
RESIDUALS = ("hcp_out", "hcp_lse")
# Names of q, k and v as attention takes them: rotated, and with their heads exchanged.
OPERANDS = ("hcp_q", "hcp_k", "hcp_v")


@dataclasses.dataclass(frozen=True)
class LocalSpec:
    """The static parameters of attention on one device; hashable.

    Attributes:
        core: how one device computes.
        lanes: the devices that exchange heads with each other.
        mover: brings the keys and values of other devices.
        head_groups: the number of parts that the heads are processed in, one after the other.
    """

    core: CoreSpec
    lanes: Peers
    mover: Mover
    head_groups: int = 1


def attention(
    spec: LocalSpec,
    q: Float[Array, "B t N H"],
    k: Float[Array, "B s K H"],
    v: Float[Array, "B s K Hv"],
    intervals: Intervals,
    sinks: Float[Array, "N"] | None,
    runs: KeyRuns,
    *,
    return_residual: bool,
) -> tuple[Float[Array, "B t N Hv"], Float[Array, "B t N"] | None]:
    """Compute attention of this device's queries against all keys of the stream.

    Args:
        spec: the static parameters.
        q: this device's queries, all heads (of its tp part).
        k: this device's keys.
        v: this device's values.
        intervals: intervals of the queries that this device has *after* the exchange of heads.
        sinks: logits of the attention sinks of all heads (of its tp part).
        runs: the key runs of each source of keys, as stacked rows.
        return_residual: whether to return lse; None in its place otherwise.
    """
    k, v = (heads.replicate_kv(x, spec.lanes.size) for x in (k, v))
    number = spec.head_groups
    parts = list(zip(*(jnp.split(x, number, axis=2) for x in (q, k, v)), strict=True))
    sinks_by_part = [None] * number if sinks is None else jnp.split(sinks, number)
    arriving = _to_sequence(spec, parts[0])
    partials: list[tuple[Any, ...]] = []
    for i, part_sinks in enumerate(sinks_by_part):
        here = arriving
        if i + 1 < number:
            # The next exchange starts when this one has arrived and the attention before it is
            # done. Without this barrier, XLA sends all parts first, and hides none of them.
            leaving, here, before = jax.lax.optimization_barrier(
                (parts[i + 1], here, partials[-1:])
            )
            partials[-1:] = before
            arriving = _to_sequence(spec, leaving)
        own_sinks = None if part_sinks is None else heads.own_part(part_sinks, spec.lanes)
        partials.append(_attend_moving(spec, *here, intervals, runs, own_sinks))
    out, lse = (
        jnp.concatenate([heads.to_heads(x, spec.lanes) for x in results], axis=2)
        for results in zip(*partials, strict=True)
    )
    return out, lse if return_residual else None


def _to_sequence(spec: LocalSpec, arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(heads.to_sequence(x, spec.lanes) for x in arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_moving(
    spec: LocalSpec, q: Any, k: Any, v: Any, intervals: Intervals, runs: KeyRuns, sinks: Any
) -> Any:
    def core(kv: Any, runs: Any) -> Any:
        k, v = kv
        return attend(spec.core, q, k, v, intervals, runs)

    partial = spec.mover.forward(core, (k, v), runs)
    if sinks is not None:
        # A sink is one more key whose value is zero. It is merged once, not at every hop.
        partial = merge(
            partial, Partial(jnp.zeros_like(partial.out), _by_query(sinks, partial.lse))
        )
    return partial.out.astype(q.dtype), partial.lse


def _forward(
    spec: LocalSpec, q: Any, k: Any, v: Any, intervals: Intervals, runs: KeyRuns, sinks: Any
) -> Any:
    q, k, v, sinks = first_order((q, k, v, sinks))
    q, k, v = (checkpoint_name(x, name) for x, name in zip((q, k, v), OPERANDS, strict=True))
    out, lse = _attend_moving(spec, q, k, v, intervals, runs, sinks)
    out, lse = (checkpoint_name(x, name) for x, name in zip((out, lse), RESIDUALS, strict=True))
    return (out, lse), (q, k, v, intervals, runs, sinks, out, lse)


def _backward(spec: LocalSpec, residuals: Any, cotangents: Any) -> Any:
    q, k, v, intervals, runs, sinks, out, lse = residuals
    dout, dlse = first_order(cotangents)
    # lse is the forward's last result. Backward's transfers must wait for it: otherwise XLA would
    # send K and V for backward while the forward's ring still runs.
    k, v, lse = jax.lax.optimization_barrier((k, v, lse))
    # With l = log Σ exp(s), dl/ds = p, so the cotangent of lse is one more term of delta.
    delta = jnp.sum(dout.astype(lse.dtype) * out.astype(lse.dtype), axis=-1) - dlse
    delta = jnp.where(lse == -jnp.inf, 0, delta)

    def core(kv: Any, runs: Any) -> Any:
        k, v = kv
        return attend_grads(spec.core, q, k, v, intervals, runs, dout, lse, delta)

    dq, dk, dv = spec.mover.backward(core, (k, v), runs)
    dsinks = None
    if sinks is not None:
        weight = softmax_weight(_by_query(sinks, lse), lse)
        dsinks = jnp.sum(-weight * delta, axis=(0, 1)).astype(sinks.dtype)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None, dsinks


def _by_query(sinks: Any, lse: Any) -> Any:
    return jnp.broadcast_to(sinks.astype(lse.dtype)[None, None], lse.shape)


_attend_moving.defvjp(_forward, _backward)
