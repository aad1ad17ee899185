"""Give each run the last tokens of the run before it, and convolve over them.

    run r-1   … x x x x a b c |      a causal convolution of width 4 needs the three tokens before
    run r           [a b c] | y y y …   each run; in a zigzag, run r - 1 may be on the same device

Only `width - 1` tokens per run are sent, in the dtype of the activations; backward sends their
gradients to where they came from.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32

from hcp_jax.cost.traffic import HALO
from hcp_jax.parallel import spmd
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.parallel.grouped import block_of, block_order, padded
from hcp_jax.parallel.peers import Peers
from hcp_jax.parallel.stream import StreamOrder, stream_order


def with_halo(
    x: Float[Array, "B t *C"], stream: StreamOrder, halo: int
) -> Float[Array, "R B ht *C"]:
    """Return each run of this device after the `halo` tokens before it; inside `shard_map`.

    Args:
        x: this device's tokens.
        stream: the order of the runs over the devices.
        halo: number of tokens. If runs are shorter, several runs are asked.

    Returns:
        The runs, each `halo` tokens longer; zeros before the stream.
    """
    runs = jnp.moveaxis(x.reshape(x.shape[0], stream.runs, -1, *x.shape[2:]), 1, 0)
    length, parts = runs.shape[2], [runs]
    with jax.named_scope(HALO):
        for distance in range(1, -(-halo // max(length, 1)) + 1):
            tokens = min(length, halo - (distance - 1) * length)
            parts.insert(0, stream.from_earlier(runs[:, :, length - tokens :], distance))
    return jnp.concatenate(parts, axis=2)


def short_conv(
    arrays: Sequence[Float[Array, "B T H D"]],
    weights: Sequence[Float[Array, "W H D"]],
    positions: Int32[Array, "B1 T"],
    *,
    cp: ContextParallel | None = None,
    order: Int32[Array, "B1 T"] | None = None,
    biases: Sequence[Float[Array, "H D"]] | None = None,
) -> list[Float[Array, "B T H D"]]:
    """Convolve arrays along the stream, channel by channel: y_i = Σ_w weight[W-1-w] x[i-w].

    Tokens of earlier documents count as zero. Sums are in float32.

    Args:
        arrays: inputs in cp's layout. tp cuts their heads where it divides them.
        weights: one for each array; the last row belongs to the token itself.
        positions: number of tokens of the same document before each token.
        cp: the context whose layout the arrays are in; None for one device.
        order: with groups, `mask.intervals.end` of `hcp.place_microbatch`: one past the global
            index of each token, and 0 for empty slots.
        biases: one for each array, or None.

    Returns:
        The results, in the dtypes of the arrays.

    Raises:
        ValueError: if shapes do not fit each other or the context.

    >>> x, weight = jnp.arange(1.0, 5).reshape(1, 4, 1, 1), jnp.array([10.0, 1]).reshape(2, 1, 1)
    >>> short_conv([x], [weight], jnp.array([[0, 1, 0, 1]]))[0][0, :, 0, 0]
    Array([ 1., 12.,  3., 34.], dtype=float32)
    """
    block = block_of(cp, order)
    stream = stream_order(cp) if block is None else StreamOrder()
    rows, tokens = arrays[0].shape[:2]
    if positions.shape not in ((rows, tokens), (1, tokens)):
        raise ValueError(
            f"positions must have the shape {(rows, tokens)} or {(1, tokens)}, got "
            f"{positions.shape}."
        )
    if cp is not None:
        length = tokens * (cp.size if cp.on_device else 1)
        if length != cp.padded_length(length):
            raise ValueError(
                f"{length} tokens are not a whole layout over {cp.size} devices; put them there "
                "with cp.shard first."
            )
    for x, weight in zip(arrays, weights, strict=True):
        if x.shape[:2] != (rows, tokens) or weight.shape[1:] != x.shape[2:]:
            raise ValueError(
                f"a convolution of {(rows, tokens)} tokens needs arrays [B, T, H, D] and weights "
                f"[W, H, D], got {x.shape} and {weight.shape}."
            )
    none: list[Any] = [None] * len(weights)
    taps = list(zip(weights, biases or none, strict=True))
    local = functools.partial(_convolve, stream)
    if cp is None:
        return local(list(arrays), taps, positions)
    tp = cp.axis_size(cp.tp, here=True)
    heads = [cp.tp if x.shape[2] % tp == 0 else None for x in arrays]
    specs = [PartitionSpec(cp.dp, cp.cp_axes or None, cut, None) for cut in heads]
    tap_specs = [
        (PartitionSpec(None, cut, None), None if bias is None else PartitionSpec(cut, None))
        for cut, (_, bias) in zip(heads, taps, strict=True)
    ]
    position_spec = PartitionSpec(cp.dp if positions.shape[0] > 1 else None, cp.cp_axes or None)
    if block is not None:
        in_block = functools.partial(_convolve_in_block, block)
        in_specs = (specs, tap_specs, position_spec, position_spec)
        mapped = spmd.shard_map(cp.mesh, cp.axes, in_block, in_specs, specs)
        return spmd.run(cp.mesh, cp.axes, mapped, specs, list(arrays), taps, positions, order)
    mapped = spmd.shard_map(cp.mesh, cp.axes, local, (specs, tap_specs, position_spec), specs)
    return spmd.run(cp.mesh, cp.axes, mapped, specs, list(arrays), taps, positions)


def _convolve(stream: StreamOrder, arrays: list[Array], taps: list[Any], positions: Array) -> list:
    rows, tokens = arrays[0].shape[:2]
    place = jnp.broadcast_to(positions, (rows, tokens)).reshape(rows, stream.runs, -1)
    place = jnp.moveaxis(place, 1, 0)[..., None, None]  # [R, B, t, 1, 1]
    results = []
    for x, (weight, bias) in zip(arrays, taps, strict=True):
        width, length = weight.shape[0], place.shape[2]
        known, weight = with_halo(x, stream, width - 1), weight.astype(jnp.float32)
        y = jnp.zeros((), jnp.float32)
        for back in range(width):
            first = width - 1 - back
            tap = known[:, :, first : first + length].astype(jnp.float32)
            y += jnp.where(place >= back, tap, 0) * weight[first][None, None, None]
        if bias is not None:
            y += bias.astype(jnp.float32)[None, None, None]
        results.append(jnp.moveaxis(y, 0, 1).reshape(x.shape).astype(x.dtype))
    return results


def _convolve_in_block(
    block: Peers, arrays: list[Array], taps: list[Any], positions: Array, order: Array
) -> list[Array]:
    """Convolve all tokens of a block, for this device's share of the channels."""
    now = block_order(block, order, positions)

    def flat(x: Array | None, lead: int) -> Any:  # [..., H, D] -> [..., channels, 1]
        if x is None:
            return None
        x = x.reshape(*x.shape[:lead], -1, 1)
        return padded(x, lead, -(-x.shape[lead] // block.size) * block.size)

    mine = [now.to_stream(flat(x, 2)) for x in arrays]
    own = [
        (now.own(flat(weight, 1), 1), None if bias is None else now.own(flat(bias, 0), 0))
        for weight, bias in taps
    ]
    found = [now.from_stream(y) for y in _convolve(StreamOrder(), mine, own, now.positions)]
    return [
        y[:, :, : math.prod(x.shape[2:])].reshape(x.shape)
        for y, x in zip(found, arrays, strict=True)
    ]
