"""Provide the public op: check the call, place its mask, run the strategy under shard_map."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from hcp_jax.attention import arguments, grouped
from hcp_jax.attention.derivatives import reverse_only
from hcp_jax.attention.heads import Exchange
from hcp_jax.attention.local import LocalSpec, attention
from hcp_jax.attention.refusals import require_whole_call
from hcp_jax.attention.ring import Rings
from hcp_jax.base import checks
from hcp_jax.kernels.core import CoreSpec, Problem, resolve
from hcp_jax.parallel import spmd
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.parallel.placing import warn_of_padding
from hcp_jax.sequence.layout import to_layout
from hcp_jax.sequence.mask import Intervals, Mask, Placement


def dot_product_attention(
    q: Float[Array, "*B T N H"],
    k: Float[Array, "*B S K H"],
    v: Float[Array, "*B S K Hv"],
    *,
    cp: ContextParallel | None = None,
    mask: Mask | None = None,
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
    if cp is None:
        device = _single_device(q)
        platform, device_kind = device.platform, device.device_kind
    else:
        platform, device_kind = cp.platform, cp.device_kind
        _require_divisible(q, k, cp)
    name = resolve(implementation, Problem.from_arrays(q, k, v, platform, device_kind))
    core = CoreSpec(
        implementation=name,
        scale=arguments.logits_scale(scale, q.shape[3]),
        logits_soft_cap=None
        if logits_soft_cap is None
        else checks.soft_cap("logits_soft_cap", logits_soft_cap),
        device_kind=device_kind,
        interpret=platform == "cpu",
    )
    mask = arguments.combined_mask(
        mask, is_causal, query_seq_lengths, key_value_seq_lengths, local_window_size
    )
    if cp is not None and mask.placement is None and mask.looks_ahead:
        times = cp.size if cp.on_device else 1
        warn_of_padding(cp, mask, times * q.shape[1], times * k.shape[1])
    if 0 in (q.shape[0], q.shape[1], k.shape[1]):
        out, lse = arguments.without_tokens(q, v, sinks)
    else:
        q, k, v, sinks = (reverse_only(x) for x in (q, k, v, sinks))
        out, lse = _jitted(cp, core, q, k, v, mask, sinks, return_residual)
    out = arguments.unflat(out, batch)
    return (out, arguments.unflat(lse, batch)) if return_residual else out


@functools.partial(jax.jit, static_argnums=(0, 1, 7))
def _jitted(
    cp: ContextParallel | None,
    core: CoreSpec,
    q: Any,
    k: Any,
    v: Any,
    mask: Mask,
    sinks: Any,
    residual: bool,
) -> Any:
    arrays = q, k, v, mask, sinks
    if cp is None:
        alone = functools.partial(_attend_alone, core, residual)
        specs = spmd.explicit_spec(q), PartitionSpec(*spmd.explicit_spec(q)[:3])
        results = spmd.run(None, (), alone, specs[: 1 + residual], *arrays)
    else:
        over = functools.partial(_attend_over, cp, core, residual)
        specs = (PartitionSpec(cp.dp, cp.cp_axes or None, cp.tp),) * 2
        results = spmd.run(cp.mesh, cp.axes, over, specs[: 1 + residual], *arrays)
    return results if residual else (*results, None)


def _attend_alone(
    core: CoreSpec, residual: bool, q: Any, k: Any, v: Any, mask: Mask, sinks: Any
) -> tuple[Any, ...]:
    intervals = _intervals(mask, q.shape[0], q.shape[1], k.shape[1], None)
    spec = LocalSpec(core=core, key_length=k.shape[1])
    results = attention(spec, q, k, v, intervals, sinks, return_residual=residual)
    return results[: 1 + residual]


def _attend_over(
    cp: ContextParallel,
    core: CoreSpec,
    residual: bool,
    q: Any,
    k: Any,
    v: Any,
    mask: Mask,
    sinks: Any,
) -> tuple[Any, ...]:
    # If the cp axes are Manual, arrays are one device's own part; the mask is of the whole stream.
    local = cp.on_device
    times = cp.size if local else 1
    length, key_length = times * q.shape[1], times * k.shape[1]
    intervals = _intervals(mask, q.shape[0], length, key_length, cp)
    local_heads = q.shape[2] // cp.axis_size(cp.tp, here=True)
    attend, interval_spec = _on_device(cp, core, local_heads, key_length, intervals)
    heads = PartitionSpec(cp.dp, cp.cp_axes or None, cp.tp)

    def on_device(q: Any, k: Any, v: Any, intervals: Any, sinks: Any, runs: Any) -> Any:
        if local:
            intervals = _own_part(intervals, cp.strategy.move, cp)
        results = attend(q, k, v, intervals, sinks, runs, return_residual=residual)
        return results[: 1 + residual]

    return spmd.shard_map(
        cp.mesh,
        cp.axes,
        on_device,
        in_specs=(heads, heads, heads, interval_spec, PartitionSpec(cp.tp), PartitionSpec()),
        out_specs=(heads, heads)[: 1 + residual],
    )(q, k, v, intervals, sinks, mask.runs)


def _own_part(intervals: Intervals, axes: tuple[str, ...], cp: ContextParallel) -> Intervals:
    """Select the intervals of this device's queries from those of the whole stream."""
    if not axes:
        return intervals
    size = intervals.start.shape[1] // cp.axis_size(axes)
    first = jax.lax.axis_index(axes) * size
    return Intervals(*(jax.lax.dynamic_slice_in_dim(x, first, size, axis=1) for x in intervals))


def _on_device(
    cp: ContextParallel, core: CoreSpec, heads: int, key_length: int, intervals: Intervals
) -> tuple[Callable[..., Any], PartitionSpec]:
    """Return the function that each device runs, and the PartitionSpec of its intervals.

    Args:
        cp: the context parallelism.
        core: how one device computes.
        heads: number of query heads of a device, after tp.
        key_length: keys of the whole stream, padded.
        intervals: the intervals of all queries.
    """
    if cp.groups is not None:
        spec = grouped.local_spec(cp, core, heads, key_length)
        return functools.partial(grouped.group_attention, spec), cp.interval_spec
    exchange, move, by = cp.strategy
    size, ring = cp.axis_size(exchange), cp.axis_size(move)
    spec = LocalSpec(
        core=core,
        key_length=key_length,
        cp_size=cp.size,
        layout=cp.layout,
        exchange=Exchange(exchange, size, size),
        rings=Rings(move, (ring,)),
        by=by,
        head_groups=cp.head_groups,
    )
    rows = cp.dp if intervals.start.shape[0] > 1 else None
    # Every cp device has all intervals, so those of the queries that it gets are a local slice.
    return functools.partial(attention, spec), PartitionSpec(rows, move or None)


def _intervals(
    mask: Mask, rows: int, length: int, key_length: int, cp: ContextParallel | None
) -> Intervals:
    """Return the intervals of all queries of the stream, in the layout's order.

    Args:
        mask: a placed mask, or one in natural order.
        rows: batch size of the queries.
        length: T, padded.
        key_length: S, padded.
        cp: the context parallelism; None for one device.
    """
    here = None if cp is None else cp.placement
    placed = mask.placement
    grouped_here = here is not None and here.groups is not None
    if placed is not None or grouped_here:
        _require_placed(mask, length, key_length, cp)
    if grouped_here:
        key_length *= rows  # a group's stream may continue over the rows of several dp devices
    intervals = mask.intervals(length, key_length, xp=jnp)
    if intervals.start.shape[0] not in (1, rows):
        raise ValueError(
            f"the mask has {intervals.start.shape[0]} rows, but q has a batch of {rows}; it needs "
            "as many, or one for all."
        )
    if cp is None or placed is not None:
        return intervals
    return Intervals(*(to_layout(jnp.asarray(x), cp.size, cp.layout, 1) for x in intervals))


def _require_placed(mask: Mask, length: int, key_length: int, cp: ContextParallel | None) -> None:
    """Check that the mask was placed for the context and the lengths of this call."""
    placed, here = mask.placement, None if cp is None else cp.placement
    if placed is None or placed._replace(key_length=None) != here:
        raise ValueError(
            f"the mask was placed for {_describe(placed) or 'no layout'}, but attention runs in "
            f"{_describe(here) or 'natural order on one device'}; place it with the same cp (for "
            "groups, that is what hcp.place_microbatch does)."
        )
    if here.groups is not None:
        return
    if mask.length != length:
        raise ValueError(
            f"the mask was placed for {mask.length} queries (padded), but q has {length}; place it "
            "for q's own length. Inside a shard_map over the cp axes a placed mask stays whole: "
            "give it the spec PartitionSpec(dp), or PartitionSpec() if it has one row."
        )
    if placed.key_length != key_length:
        raise ValueError(
            f"the mask was placed for {placed.key_length} keys (padded), but k has {key_length}; "
            "in cross attention, place it with cp.place(mask, T, key_length=S)."
        )


def _describe(placement: Placement | None) -> str:
    if placement is None:
        return ""
    layout, cp_size, groups, _ = placement
    return f"Placement(layout={layout!r}, cp_size={cp_size}, groups={groups})"


def _single_device(q: Any) -> jax.Device:
    """Return the device that a call without a mesh runs on."""
    if isinstance(q, jax.Array) and not isinstance(q, jax.core.Tracer):
        return next(iter(q.devices()))
    config: Any = jax.config  # jax does not type its flags
    default = config.jax_default_device
    return default if isinstance(default, jax.Device) else jax.devices(default)[0]


def _require_divisible(q: Any, k: Any, cp: ContextParallel) -> None:
    """Check that the mesh divides the batch, the sequences and the heads.

    Axes that are already Manual do not count: along them, arrays are one device's own part.
    """
    dp, tp = cp.axis_size(cp.dp, here=True), cp.axis_size(cp.tp, here=True)
    if q.shape[0] % dp:
        raise ValueError(f"q has a batch of B={q.shape[0]}, which dp={dp} does not divide.")
    if cp.groups is not None:
        if spmd.manual_axes(cp.mesh_in_context, cp.flat_axes):
            raise NotImplementedError(
                f"with groups, attention cannot run inside a shard_map over {cp.flat_axes}; leave "
                "dp and cp axes out of its axis_names (axes of no role, such as pp, may be in)."
            )
        _require_buffers(q, k, cp)
    times = cp.size if cp.on_device else 1
    for name, x in (("q", q), ("k", k)):
        if cp.groups is None and times * x.shape[1] != cp.padded_length(times * x.shape[1]):
            raise ValueError(
                f"{name} has {x.shape[1]} tokens, which do not fit a {cp.layout} layout over "
                f"{cp.size} devices; put it there with cp.shard({name}, dim=1), which pads it to "
                f"{cp.padded_length(x.shape[1])}."
            )
    for name, heads in (("q has N", q.shape[2]), ("k and v have K", k.shape[2])):
        if heads % tp:
            raise ValueError(
                f"{name}={heads} heads; tp={tp} needs a multiple of {tp}. Use a tp that divides "
                f"{math.gcd(q.shape[2], k.shape[2])}."
            )
    exchange, heads = cp.strategy.exchange, q.shape[2] // tp
    size = cp.axis_size(exchange) if cp.groups is None else grouped.exchange_size(cp, heads)
    if heads % size:
        after_tp = f" after tp={tp}" if tp > 1 else ""
        sizes = [str(n) for n in range(1, heads + 1) if heads % n == 0]
        raise ValueError(
            f"q has N={heads} heads{after_tp}; {cp.comm_type} over {' x '.join(exchange)}={size} "
            f"needs N % {size} == 0. Use comm_type='p2p', or one of {', '.join(sizes)} for "
            f"{' x '.join(exchange)}."
        )
    kv_heads = math.lcm(k.shape[2] // tp, size) // size
    if kv_heads % cp.head_groups:
        sizes = [str(n) for n in range(1, kv_heads + 1) if kv_heads % n == 0]
        raise ValueError(
            f"head_groups={cp.head_groups} must divide the {kv_heads} kv heads that a device has "
            f"after the exchange; use one of {', '.join(sizes)}."
        )


def _require_buffers(q: Any, k: Any, cp: ContextParallel) -> None:
    """Check that each device has one buffer of queries and one of keys, of the same size."""
    dp, size = cp.axis_size(cp.dp), cp.size
    if q.shape[0] != dp or q.shape[1] % size or q.shape[1] != k.shape[1]:
        raise ValueError(
            f"with groups, q and k must be [dp={dp}, a multiple of {size}, ...] as "
            f"hcp.place_microbatch leaves them, got {tuple(q.shape)} and {tuple(k.shape)}."
        )
