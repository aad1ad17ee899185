"""Compute cross entropy without holding the logits of a whole sequence.

A device cuts *its own* tokens into chunks and holds the logits of one chunk at a time; the backward
pass recomputes them. Each chunk lies inside the device's part of the stream, so no token moves. The
code is written per device (`shard_map`), so that the gradients of the output matrix are summed over
chunks on the device first, and over devices once.

The vocabulary may be cut over tp. Then the log-partition is merged over tp (two scalars per token).
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32

from hcp_jax.models.layers import chunks
from hcp_jax.models.layers.embedding import live_axes, live_tp
from hcp_jax.parallel import spmd
from hcp_jax.parallel.context import ContextParallel


def summed_cross_entropy(
    hidden: Float[Array, "B T D"],
    unembedding: Float[Array, "V D"],
    targets: Int32[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    cp: ContextParallel | None = None,
    chunk: int = 1024,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    vocab_axes: tuple[str, ...] = (),
) -> Float[Array, ""]:
    """Return Σ weight · (cross entropy in nats + z_loss · logZ²) over all tokens, in float32.

    The result is a sum, so that results of microbatches can be added; divide the total by the sum
    of all weights. Inside a `shard_map` over dp or cp axes it covers the tokens given there.

    Args:
        hidden: outputs of the decoder, in cp's layout order.
        unembedding: output matrix; used in the dtype of `hidden`, while its gradient is summed in
            its own dtype.
        targets: token to predict at each position; any valid id where the weight is 0.
        weights: weight of each position; 0 excludes it.
        cp: context whose axes cut the batch and the sequence; None for one device.
        chunk: number of tokens per device whose logits exist at one time.
        z_loss: weight of the squared log-partition.
        soft_cap: soft cap of the logits; None for no cap.
        vocab_axes: mesh axes that a `shard_map` around the call has made Manual, along which
            `unembedding` is a device's own rows; each of these devices returns the whole sum.
    """
    local = functools.partial(_on_device, chunk=chunk, z_loss=z_loss, soft_cap=soft_cap)
    if cp is None:
        return local(hidden, unembedding, targets, weights, sum_over=(), tp=())
    tokens, tp = cp.spec(2), live_tp(cp)
    sum_over = live_axes(cp, cp.dp) + live_axes(cp, cp.cp_axes)
    on_each_device = functools.partial(local, sum_over=sum_over, tp=(*vocab_axes, *tp))
    in_specs = (cp.spec(3), PartitionSpec(tp or None, None), tokens, tokens)
    summed = spmd.shard_map(cp.mesh, cp.axes, on_each_device, in_specs, PartitionSpec())
    arrays = hidden, unembedding, targets, weights
    return spmd.run(cp.mesh, cp.axes, summed, PartitionSpec(), *arrays)


def cross_entropy_by_bin(
    hidden: Float[Array, "B T D"],
    unembedding: Float[Array, "V D"],
    targets: Int32[Array, "B T"],
    weights: Float[Array, "B T"],
    bins: Int32[Array, "B T"],
    num_bins: int,
    *,
    cp: ContextParallel | None = None,
    chunk: int = 1024,
    soft_cap: float | None = None,
    vocab_axes: tuple[str, ...] = (),
) -> tuple[Float[Array, "B C n"], Float[Array, "B C n"]]:
    """Return Σ weight · cross entropy in nats, and Σ weight, for each row, cp device and bin.

    This is for evaluation, not for training. Each device reduces its own tokens, and nothing is
    summed over devices: what tokens belong together, a row or a group, is the caller's to know.

    Args:
        hidden: outputs of the decoder, in cp's layout order.
        unembedding: output matrix.
        targets: token to predict at each position.
        weights: weight of each position.
        bins: bin of each position, from 0 to `num_bins - 1`.
        num_bins: n.
        cp: context; None for one device.
        chunk: number of tokens per device whose logits exist at one time.
        soft_cap: soft cap of the logits; None for no cap.
        vocab_axes: as for `summed_cross_entropy`.
    """

    def on_device(hidden, unembedding, targets, weights, bins, *, tp):
        def chunk_loss(block):
            hidden, targets, weights, bins = block
            log_z, target_logit = _log_z_and_target(hidden, unembedding, targets, tp, soft_cap)
            # Compare instead of scattering, so that the order of the sums is always the same.
            own = bins[..., None] == jnp.arange(num_bins, dtype=bins.dtype)[None, None]
            in_bin = jnp.where(own, weights[..., None], 0)
            loss = (log_z - target_logit)[..., None]
            return jnp.sum(in_bin * loss, axis=1), jnp.sum(in_bin, axis=1)

        blocks = [chunks.split(x, chunk) for x in (hidden, targets, weights, bins)]
        sums = jax.lax.map(chunk_loss, blocks)
        return jax.tree.map(lambda x: jnp.sum(x, axis=0)[:, None], sums)

    if cp is None:
        return on_device(hidden, unembedding, targets, weights, bins, tp=())
    tokens, tp = cp.spec(2), live_tp(cp)
    on_each_device = functools.partial(on_device, tp=(*vocab_axes, *tp))
    sums = cp.spec(3)
    in_specs = (cp.spec(3), PartitionSpec(tp or None, None), tokens, tokens, tokens)
    binned = spmd.shard_map(cp.mesh, cp.axes, on_each_device, in_specs, (sums, sums))
    arrays = hidden, unembedding, targets, weights, bins
    return spmd.run(cp.mesh, cp.axes, binned, (sums, sums), *arrays)


def _on_device(hidden, unembedding, targets, weights, *, chunk, z_loss, soft_cap, sum_over, tp):
    """Return the weighted sum over the tokens of one device, summed over the axes `sum_over`."""

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def chunk_loss(hidden, targets, weights):
        log_z, target_logit = _log_z_and_target(hidden, unembedding, targets, tp, soft_cap)
        return jnp.sum(weights * (log_z - target_logit + z_loss * jnp.square(log_z)))

    # In the padding of the last chunk the weights are 0.
    blocks = [chunks.split(x, chunk) for x in (hidden, targets, weights)]
    sums = jax.lax.map(lambda block: chunk_loss(*block), blocks)
    total = jnp.sum(sums)
    return jax.lax.psum(total, sum_over) if sum_over else total


def _log_z_and_target(
    hidden: Float[Array, "B t D"],
    unembedding,
    targets,
    tp: tuple[str, ...],
    soft_cap: float | None,
) -> tuple[Float[Array, "B t"], Float[Array, "B t"]]:
    """Return each token's log-partition and its target's logit; their difference is the loss."""
    # The cast is inside, so that the cotangents of the chunks are summed in the matrix's own dtype.
    logits = jnp.einsum(
        "btd,vd->btv",
        hidden,
        unembedding.astype(hidden.dtype),
        preferred_element_type=jnp.float32,
    )
    logits = soft_capped(logits, soft_cap)
    return _log_partition(logits, tp), _target_logit(targets, logits, tp)


def soft_capped(logits: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """Return cap · tanh(logits / cap), or the logits as they are if there is no cap."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def _log_partition(logits: Float[Array, "B t V"], tp: tuple[str, ...]) -> Float[Array, "B t"]:
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    top = jax.lax.pmax(top, tp) if tp else top
    total = jnp.sum(jnp.exp(logits - top[..., None]), axis=-1)
    return top + jnp.log(jax.lax.psum(total, tp) if tp else total)


def _target_logit(
    targets, logits: Float[Array, "B t V"], tp: tuple[str, ...]
) -> Float[Array, "B t"]:
    """Return the target's logit, which one of the tp devices holds."""
    first = jax.lax.axis_index(tp) * logits.shape[-1] if tp else 0
    token = first + jnp.arange(logits.shape[-1], dtype=targets.dtype)
    here = jnp.sum(jnp.where(token[None, None] == targets[..., None], logits, 0), axis=-1)
    return jax.lax.psum(here, tp) if tp else here
