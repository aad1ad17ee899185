"""Provide the public op: check the call, place its mask, run the strategy under shard_map."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from hcp_jax.attention import arguments
from hcp_jax.attention.derivatives import reverse_only
from hcp_jax.attention.local import LocalSpec, attention
from hcp_jax.attention.refusals import require_whole_call
from hcp_jax.attention.strategy import compose
from hcp_jax.base import checks
from hcp_jax.kernels.core import CoreSpec, Problem, resolve, tiles_kept
from hcp_jax.parallel import one_device, spmd
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.parallel.one_device import OneDevice
from hcp_jax.sequence.mask import Intervals, Mask
from hcp_jax.sequence.placed_mask import PlacedMask, place, require_fit


def dot_product_attention(
    q: Float[Array, "*B T N H"],
    k: Float[Array, "*B S K H"],
    v: Float[Array, "*B S K Hv"],
    *,
    cp: ContextParallel | None = None,
    mask: Mask | PlacedMask | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    query_seq_lengths: Int[Array, "B"] | None = None,
    key_value_seq_lengths: Int[Array, "B"] | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    bias: None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Float[Array, "*B T N Hv"] | tuple[Float[Array, "*B T N Hv"], Float[Array, "*B T N"]]:
    """Compute exact attention over sequences that are cut over the devices of a mesh.

    Arguments are named as in `jax.nn.dot_product_attention`; arrays are global, inside and outside
    of `jit`. Three things differ from jax. lse has a gradient here, and is in float32; jax stops
    its gradient and returns it in q's dtype. The output of a query that sees no key is zero; in jax
    it is the mean of all values. Masks are intervals.

    Args:
        q: queries, in `cp`'s layout order: computed from tokens that `cp.shard_batch` cut, or from
            `cp.shard(q, dim=1)`. Query head n reads kv head n // (N / K). There may be no batch
            dim, or several; rows of masks then count over all of them.
        k: keys, likewise.
        v: values, likewise; their head size may differ from that of q and k.
        cp: the mesh and the roles of its axes; None for one device.
        mask: which keys each query sees, in natural order, or as placed by `cp.shard_batch`; every
            key if None. A query that sees no key has zero output and zero gradients. Convert a
            boolean matrix to a mask with `hcp.from_dense`.
        is_causal: shorthand for `mask & hcp.causal()`.
        scale: factor of the logits, finite; 1 / sqrt(H) if None.
        logits_soft_cap: c > 0, to compute logits c · tanh(logits / c); no cap if None.
        sinks: one extra logit per query head that takes part in the softmax and has no value
            (gpt-oss; Xiao et al., Attention Sinks, 2023).
        query_seq_lengths: number of queries of each row, in natural order, that are not padding;
            the others see nothing.
        key_value_seq_lengths: number of keys of each row, in natural order, that are not padding.
        local_window_size: (left, right): a query sees that many keys on each side of its own
            index; one integer for both. Same as `hcp.sliding_window(left + 1, right=right)`.
        bias: must be None; a bias would be a T x S matrix, which is not supported.
        implementation: the blockwise core: "reference", "blockwise", "triton" or "mosaic". None
            chooses the best one that supports this call on the mesh's devices.
        return_residual: also return lse.

    Returns:
        The output, in q's dtype; with `return_residual` also lse = log Σ exp(logits), sinks
        included, in float32 (float64 if q is); it is -inf for a query that sees nothing. Both
        have correct first gradients, in reverse mode. If there are no queries, keys or rows, the
        output is empty or zero.

    Raises:
        ValueError: for shapes, dtypes, numbers, masks or meshes that do not fit, and for a bias.
        NotImplementedError: if the named implementation does not support this call, and for
            derivatives in forward mode (jvp, jacfwd) or of second order (hessian, grad of grad).

    >>> import jax, hcp_jax as hcp
    >>> cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=4, cp_inner=2), comm_type="a2a+p2p")
    >>> x = jax.random.normal(jax.random.key(0), (1, 64, 8, 16))
    >>> q = k = v = cp.shard(x, dim=1)
    >>> hcp.dot_product_attention(q, k, v, cp=cp, mask=hcp.causal()).shape
    (1, 64, 8, 16)
    """
    arguments.require_arrays(q, k, v, sinks)
    arguments.require_options(
        cp, implementation, is_causal=is_causal, return_residual=return_residual
    )
    require_whole_call(cp, mask, q, k, v)
    if bias is not None:
        raise ValueError(arguments.NO_BIAS)
    batch = q.shape[:-3]
    q, k, v = (arguments.flat(x) for x in (q, k, v))
    here = one_device.resolve(cp, q)
    _require_divisible(q, k, here)
    spec = _local_spec(q, k, v, here, implementation, scale, logits_soft_cap)
    mask = arguments.combined_mask(
        mask, is_causal, query_seq_lengths, key_value_seq_lengths, local_window_size
    )
    if cp is not None and isinstance(mask, Mask) and mask.looks_ahead:
        times = cp.size if cp.on_device else 1
        cp.padded_streams.warn_if_seen(mask, times * q.shape[1], times * k.shape[1])
    if 0 in (q.shape[0], q.shape[1], k.shape[1]):
        out, lse = arguments.without_tokens(q, v, sinks)
    else:
        q, k, v, sinks = (reverse_only(x) for x in (q, k, v, sinks))
        out, lse = _jitted(here, spec, q, k, v, mask, sinks, return_residual)
    out = arguments.unflat(out, batch)
    return (out, arguments.unflat(lse, batch)) if return_residual else out


def _local_spec(
    q: Any,
    k: Any,
    v: Any,
    cp: ContextParallel | OneDevice,
    implementation: str | None,
    scale: float | None,
    logits_soft_cap: float | None,
) -> LocalSpec:
    """Return the static parameters of one device's part of a call."""
    problem = Problem.from_arrays(q, k, v, cp.platform, cp.device_kind)
    cap = None if logits_soft_cap is None else checks.soft_cap("logits_soft_cap", logits_soft_cap)
    name = resolve(implementation, problem)
    core = CoreSpec(
        implementation=name,
        scale=arguments.logits_scale(scale, q.shape[3]),
        logits_soft_cap=cap,
        device_kind=cp.device_kind,
        interpret=cp.platform == "cpu",
        tiles=tiles_kept(name, problem),
    )
    composed = compose(cp, q.shape[2] // cp.axis_size(cp.tp, here=True))
    return LocalSpec(core, composed.lanes, composed.mover, cp.head_groups)


@functools.partial(jax.jit, static_argnums=(0, 1, 7))
def _jitted(
    cp: ContextParallel | OneDevice,
    spec: LocalSpec,
    q: Any,
    k: Any,
    v: Any,
    mask: Mask | PlacedMask,
    sinks: Any,
    residual: bool,
) -> Any:
    over = functools.partial(_attend_over, cp, spec, residual)
    heads = cp.heads_spec(q)
    specs = heads, PartitionSpec(*tuple(heads)[:3])
    results = spmd.run(cp.mesh, cp.axes, over, specs[: 1 + residual], q, k, v, mask, sinks)
    return results if residual else (*results, None)


def _attend_over(
    cp: ContextParallel | OneDevice,
    spec: LocalSpec,
    residual: bool,
    q: Any,
    k: Any,
    v: Any,
    mask: Mask | PlacedMask,
    sinks: Any,
) -> tuple[Any, ...]:
    # If the cp axes are Manual, arrays are one device's own part. The mask is of the whole stream,
    # or, under groups, cut as `interval_spec` says.
    local = cp.on_device
    times = cp.size if local else 1
    placed = _placed(mask, cp, q.shape[0], times * q.shape[1], times * k.shape[1])
    slots = times * k.shape[1] // cp.size
    move = cp.strategy.move
    rows = cp.dp if placed.intervals.start.shape[0] > 1 else None
    heads = PartitionSpec(cp.dp, cp.cp_axes or None, cp.tp)
    # Devices that exchange heads have all intervals of their member, so those of the queries that
    # a device gets by exchange are a local slice.
    interval_spec = PartitionSpec(rows, move or None)

    def on_device(q: Any, k: Any, v: Any, intervals: Any, sinks: Any, runs: Any) -> Any:
        if local:
            parts = intervals.start.shape[1] * cp.axis_size(move) // (cp.size * q.shape[1])
            intervals = _own_part(intervals, parts, _index(move))
        # After the exchange of heads, a device has the queries of all its lanes.
        members = intervals.start.shape[1] // (spec.lanes.size * q.shape[1])
        intervals = _own_part(intervals, members, _index(spec.lanes.axes) // spec.lanes.size)
        runs = cp.placement.source_runs(runs, slots, spec.mover.sources, spec.mover.block(), jnp)
        results = attention(spec, q, k, v, intervals, sinks, runs, return_residual=residual)
        return results[: 1 + residual]

    return spmd.shard_map(
        cp.mesh,
        cp.axes,
        on_device,
        in_specs=(heads, heads, heads, interval_spec, PartitionSpec(cp.tp), PartitionSpec()),
        out_specs=(heads, heads)[: 1 + residual],
    )(q, k, v, placed.intervals, sinks, placed.runs)


def _index(axes: tuple[str, ...]) -> Any:
    return jax.lax.axis_index(axes) if axes else 0


def _own_part(intervals: Intervals, parts: int, part: Any) -> Intervals:
    """Select one of equal parts of the intervals, counted modulo their number."""
    if parts == 1:
        return intervals
    size = intervals.start.shape[1] // parts
    first = part % parts * size
    return Intervals(*(jax.lax.dynamic_slice_in_dim(x, first, size, axis=1) for x in intervals))


def _placed(
    mask: Mask | PlacedMask,
    cp: ContextParallel | OneDevice,
    rows: int,
    length: int,
    key_length: int,
) -> PlacedMask:
    """Return the mask as intervals in the order of the devices, for this call's lengths."""
    if isinstance(mask, Mask):
        mask = place(mask, cp.placement, length, key_length, xp=jnp)
    require_fit(mask, cp.placement, length, key_length)
    found = mask.intervals.start.shape[0]
    if found not in (1, rows):
        raise ValueError(
            f"the mask has {found} rows, but q has a batch of {rows}; it needs as many, or one for "
            "all."
        )
    return mask


def _require_divisible(q: Any, k: Any, cp: ContextParallel | OneDevice) -> None:
    """Check that the mesh divides the batch, the sequences and the heads.

    Axes that are already Manual do not count: along them, arrays are one device's own part.
    """
    dp, tp = cp.axis_size(cp.dp, here=True), cp.axis_size(cp.tp, here=True)
    if q.shape[0] % dp:
        raise ValueError(f"q has a batch of B={q.shape[0]}, which dp={dp} does not divide.")
    times = cp.size if cp.on_device else 1
    for name, x in (("q", q), ("k", k)):
        cp.placement.require_tokens(name, tuple(x.shape), times, dp, cp.size // times)
    for name, heads in (("q has N", q.shape[2]), ("k and v have K", k.shape[2])):
        if heads % tp:
            raise ValueError(
                f"{name}={heads} heads; tp={tp} needs a multiple of {tp}. Use a tp that divides "
                f"{math.gcd(q.shape[2], k.shape[2])}."
            )
    size = compose(cp, q.shape[2] // tp).lanes.size
    kv_heads = math.lcm(k.shape[2] // tp, size) // size
    if kv_heads % cp.head_groups:
        sizes = [str(n) for n in range(1, kv_heads + 1) if kv_heads % n == 0]
        raise ValueError(
            f"head_groups={cp.head_groups} must divide the {kv_heads} kv heads that a device has "
            f"after the exchange; use one of {', '.join(sizes)}."
        )
