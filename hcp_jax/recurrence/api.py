"""Compute recurrences over streams that are cut over devices: state-space models and delta rules.

Each op takes arrays `[B, T, heads, …]` in the layout of a `ContextParallel`, or plain arrays with
`cp=None`. Outputs are those of one device that holds all tokens in natural order. Per head:

    state_space   S_i = a_i S_(i-1) + k_i v_iᵀ                                  o_i = S_iᵀ q_i
    delta_rule    S_i = (1 - β_i k_i k_iᵀ) diag(a_i) S_(i-1) + β_i k_i v_iᵀ     o_i = S_iᵀ q_i

with S [K, V], zero before the first token of every document. (Mamba-2: Dao and Gu, 2024. Gated
delta rule and its WY form: Yang et al., 2024. A decay per channel: Kimi Linear, 2025.)
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32

from hcp_jax.base import checks
from hcp_jax.parallel import spmd
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.parallel.grouped import block_of, block_order, padded, shares, whole_groups
from hcp_jax.parallel.peers import Peers
from hcp_jax.parallel.stream import StreamOrder, stream_order
from hcp_jax.recurrence import chunks
from hcp_jax.recurrence.scan import states_before


def state_space(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H"],
    positions: Int32[Array, "B1 T"],
    *,
    cp: ContextParallel | None = None,
    order: Int32[Array, "B1 T"] | None = None,
    chunk: int = 128,
) -> Float[Array, "B T H V"]:
    """Compute the recurrence of Mamba-2: S_i = exp(log_decay_i) S_(i-1) + k_i v_iᵀ, o_i = S_iᵀ q_i.

    Args:
        q: Mamba's C; H / G heads share one.
        k: Mamba's B, likewise.
        v: Mamba's x, times its step size.
        log_decay: 0 or less.
        positions: number of tokens of the same document before each token; the state is zero before
            a token with position 0.
        cp: the context whose layout the arrays are in; None for one device.
        order: with groups, `mask.intervals.end` of `hcp.place_microbatch`: one past the global
            index of each token, and 0 for empty slots.
        chunk: tokens per chunk; work inside a chunk grows with its square.

    Returns:
        The outputs, in the dtype of `v`.

    Raises:
        ValueError: if shapes do not fit each other or the context.

    >>> ones = jnp.ones((1, 4, 1, 1))
    >>> state_space(ones, ones, ones, 0 * ones[..., 0], jnp.array([[0, 1, 0, 1]]))[0, :, 0, 0]
    Array([1., 2., 1., 2.], dtype=float32)
    """
    _require(q.shape == k.shape, f"q and k must have one shape, got {q.shape} and {k.shape}")
    _require(
        log_decay.shape == v.shape[:3],
        f"log_decay must have the shape {v.shape[:3]} of v's heads, got {log_decay.shape}",
    )
    _require_heads(q, v)
    chunk = checks.integer("chunk", chunk, least=1)
    local = functools.partial(_state_space, chunk=chunk)
    return _on_devices(local, cp, positions, order, (q, k, v, log_decay))


def delta_rule(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H *K"],
    positions: Int32[Array, "B1 T"],
    *,
    cp: ContextParallel | None = None,
    order: Int32[Array, "B1 T"] | None = None,
    chunk: int = 64,
) -> Float[Array, "B T H V"]:
    """Compute the gated delta rule, with one decay per head or one per channel of the keys.

    Args:
        q: queries, scaled; H / G heads share one.
        k: keys, of length 1 or less (longer ones may make the state grow without bound).
        v: values.
        beta: how much of what the state holds for a key is replaced, from 0 to 1.
        log_decay: 0 or less, for each head, `[B, T, H]`, or for each channel, `[B, T, H, K]`.
        positions: as in `state_space`.
        cp: as in `state_space`.
        order: as in `state_space`.
        chunk: tokens per chunk, a power of two.

    Returns:
        The outputs, in the dtype of `v`.

    Raises:
        ValueError: if shapes do not fit each other or the context, or if `chunk` is not a power of
            two.

    >>> ones = jnp.ones((1, 3, 1, 1))  # beta 1 replaces what the state holds for the key
    >>> decay, positions = 0 * ones[..., 0], jnp.arange(3)[None]
    >>> delta_rule(ones, ones, ones, ones[..., 0], decay, positions)[0, :, 0, 0]
    Array([1., 1., 1.], dtype=float32)
    """
    _require(q.shape == k.shape, f"q and k must have one shape, got {q.shape} and {k.shape}")
    _require_heads(q, v)
    _require(
        beta.shape == v.shape[:3],
        f"beta must have the shape {v.shape[:3]} of v's heads, got {beta.shape}",
    )
    _require(
        log_decay.shape in (v.shape[:3], (*v.shape[:3], k.shape[-1])),
        f"log_decay must have the shape {v.shape[:3]} or {(*v.shape[:3], k.shape[-1])}, got "
        f"{log_decay.shape}",
    )
    chunk = checks.integer("chunk", chunk, least=1)
    _require(chunk & (chunk - 1) == 0, f"chunk must be a power of two, got {chunk}")
    local = functools.partial(_delta_rule, chunk=chunk)
    return _on_devices(local, cp, positions, order, (q, k, v, beta, log_decay))


def _on_devices(
    local: Callable, cp: ContextParallel | None, positions: Array, order: Any, arrays: Any
) -> Any:
    """Call `local(*arrays, starts, stream)` on every device, with its own heads and tokens."""
    rows, tokens, heads = arrays[2].shape[:3]
    block = block_of(cp, order)
    for x in arrays:
        _require(
            x.shape[:2] == (rows, tokens), f"arrays must begin with {(rows, tokens)}, got {x.shape}"
        )
    _require(
        positions.shape in ((rows, tokens), (1, tokens)),
        f"positions must have the shape {(rows, tokens)} or {(1, tokens)}, got {positions.shape}",
    )
    stream = stream_order(cp) if block is None else StreamOrder()
    on_device = functools.partial(_flagged, local, stream)
    if cp is None:
        return on_device(positions, *arrays)
    arrays = _whole_groups(cp, arrays, heads)
    length = tokens * (cp.size if cp.on_device else 1)
    _require(
        length == cp.padded_length(length),
        f"{length} tokens are not a whole layout over {cp.size} devices; put them there with "
        "cp.shard first",
    )
    specs = [
        PartitionSpec(cp.dp, cp.cp_axes or None, cp.tp, *[None] * (x.ndim - 3)) for x in arrays
    ]
    position_spec = PartitionSpec(cp.dp if positions.shape[0] > 1 else None, cp.cp_axes or None)
    out_spec = PartitionSpec(cp.dp, cp.cp_axes or None, cp.tp, None)
    if block is not None:
        in_block = functools.partial(_in_block, on_device, block)
        in_specs = (position_spec, position_spec, *specs)
        mapped = spmd.shard_map(cp.mesh, cp.axes, in_block, in_specs, out_spec)
        return spmd.run(cp.mesh, cp.axes, mapped, out_spec, order, positions, *arrays)
    mapped = spmd.shard_map(cp.mesh, cp.axes, on_device, (position_spec, *specs), out_spec)
    return spmd.run(cp.mesh, cp.axes, mapped, out_spec, positions, *arrays)


def _whole_groups(cp: ContextParallel, arrays: Any, heads: int) -> Any:
    """Repeat q and k, as few times as needed, so that tp cuts them as it cuts the other heads."""
    tp = cp.axis_size(cp.tp, here=True)
    _require(heads % tp == 0, f"tp={tp} cannot cut {heads} heads; use a tp that divides them")
    q, k, *rest = arrays
    groups = q.shape[2]
    times = whole_groups(groups, heads, tp)
    if times > 1:
        q, k = (jnp.repeat(x, times, axis=2) for x in (q, k))
    return (q, k, *rest)


def _in_block(
    on_device: Callable, block: Peers, order: Array, positions: Array, *arrays: Array
) -> Array:
    """Call `on_device` on all tokens of a block, for this device's share of its heads."""
    now = block_order(block, order, positions)
    q, k, v, *by_head = arrays
    heads, columns = v.shape[2:]
    parts, width = shares(heads, columns, block.size)
    v = padded(v, 3, parts * width).reshape(*v.shape[:2], heads * parts, width)
    times = whole_groups(q.shape[2], heads * parts, block.size)
    cut = [
        *(jnp.repeat(x, times, axis=2) for x in (q, k)),
        v,
        *(jnp.repeat(x, parts, axis=2) for x in by_head),
    ]
    out = now.from_stream(on_device(now.positions, *map(now.to_stream, cut)))
    return out.reshape(*out.shape[:2], heads, -1)[..., :columns]


def _flagged(local: Callable, stream: StreamOrder, positions: Array, *arrays: Array) -> Array:
    starts = jnp.broadcast_to(positions == 0, arrays[0].shape[:2])
    return local(*arrays, starts, stream)


def _state_space(q, k, v, log_decay, starts, stream: StreamOrder, *, chunk: int) -> Array:
    einsum, tokens, dtype = _einsum(v), v.shape[1], v.dtype
    repeats = v.shape[2] // q.shape[2]
    docs, lead, (q, k, v, g) = _split(stream, chunk, starts, q, k, v, log_decay[..., None])
    # [c H, …] -> [c G, H / G, …]: q and k are never repeated.
    docs, v, g = (
        jax.tree.map(lambda x: x.reshape(-1, repeats, *x.shape[1:]), y) for y in (docs, v, g)
    )
    decay = chunks.decays(g, docs)
    weights = einsum("clk,csk->cls", q, k)[:, None] * chunks.pair_decays(g, docs)
    b = einsum("clk,crlv->crkv", k, v * decay.leaves)
    states = states_before(
        decay.passes.reshape(*lead, 1, 1), b.reshape(*lead, *b.shape[-2:]), stream
    ).reshape(b.shape)
    out = einsum("crls,crsv->crlv", weights, v)
    out += einsum("clk,crkv->crlv", q, states) * decay.entered
    return chunks.join(out.reshape(*lead, *out.shape[-2:]), tokens).astype(dtype)


def _delta_rule(q, k, v, beta, log_decay, starts, stream: StreamOrder, *, chunk: int) -> Array:
    """Compute the WY form: the values that a chunk's tokens write are U = T (β V - β K S).

    T = (1 + M)⁻¹, with M the products of keys below the diagonal, times β of the row and the decay
    between the two tokens.
    """
    einsum, tokens, dtype = _einsum(v), v.shape[1], v.dtype
    repeats, size = v.shape[2] // q.shape[2], q.shape[-1]
    if repeats > 1:
        q, k = (jnp.repeat(x, repeats, axis=2) for x in (q, k))
    log_decay = log_decay[..., None] if log_decay.ndim == 3 else log_decay
    arrays = q, k, v, beta[..., None], log_decay
    docs, lead, (q, k, v, beta, g) = _split(stream, chunk, starts, *arrays)
    decay = chunks.decays(g, docs)
    if g.shape[-1] == 1:
        between = chunks.pair_decays(g, docs)
        by_key, by_query = (einsum("cik,cjk->cij", x, k) * between for x in (k, q))
    else:
        by_key, by_query = (
            jnp.where(docs.visible, chunks.decayed_products(x, k, g, einsum), 0) for x in (k, q)
        )
    inverse = chunks.invert(jnp.tril(by_key, -1) * beta)
    written = einsum("cij,cjv->civ", inverse, beta * v)
    erased = einsum("cij,cjk->cik", inverse, beta * k * decay.entered)
    leaving = k * decay.leaves
    kept = jnp.swapaxes(decay.passes, -1, -2) * jnp.eye(size)[None]
    a = kept - einsum("clk,clj->ckj", leaving, erased)
    b = einsum("clk,clv->ckv", leaving, written)
    states = states_before(
        a.reshape(*lead, *a.shape[1:]), b.reshape(*lead, *b.shape[1:]), stream
    ).reshape(b.shape)
    read = q * decay.entered - einsum("cij,cjk->cik", by_query, erased)
    out = einsum("cij,cjv->civ", by_query, written) + einsum("clk,ckv->clv", read, states)
    return chunks.join(out.reshape(*lead, *out.shape[1:]), tokens).astype(dtype)


def _split(stream: StreamOrder, chunk: int, starts: Array, *arrays: Array) -> Any:
    """Cut arrays `[B, t, heads, D]` into chunks, in float32; the last one holds log decays.

    Chunks, rows and heads are one leading dim, because jaxlib 0.10 computes sums and products of
    arrays of seven dims wrongly on CPUs (it writes outside of their buffers).

    Returns:
        The documents of every chunk `[c, L, …]`, the shape `(n, R, B, heads)` that c stands for,
        and the arrays `[c, L, D]`.
    """
    length = starts.shape[1] // stream.runs
    # No longer than a run needs: the next power of two, because `chunks` halves.
    chunk = min(chunk, 1 << max(length - 1, 0).bit_length())
    cut = [chunks.split(x.astype(jnp.float32), stream.runs, chunk) for x in arrays]
    lead = cut[-1].shape[:-2]
    flags = chunks.split(starts, stream.runs, chunk)[:, :, :, None]
    flags = jnp.broadcast_to(flags, (*lead, chunk)).reshape(-1, chunk)
    cut = [x.reshape(-1, *x.shape[-2:]) for x in cut]
    # A decay at a document's start would multiply a state that is zero there.
    cut[-1] = jnp.where(flags[..., None], 0, cut[-1])
    return chunks.documents(flags), lead, cut


def _einsum(x: Array) -> Callable[..., Any]:
    """Return `einsum` on float32 arrays, exact if `x` came in float32."""
    exact = "highest" if x.dtype == jnp.float32 else None
    return functools.partial(jnp.einsum, precision=exact)


def _require_heads(q: Array, v: Array) -> None:
    _require(
        v.shape[2] % q.shape[2] == 0,
        f"v has {v.shape[2]} heads, which must be a multiple of the {q.shape[2]} of q and k",
    )


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise + ".")
