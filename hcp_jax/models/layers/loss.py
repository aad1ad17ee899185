"""Cross entropy without the logits of a whole sequence.

A device cuts *its own* tokens into chunks and keeps the logits of one chunk at a time: the backward
pass computes them again. The chunks lie inside the device's share of the stream, so no token moves;
and what the chunks add to the gradient of the output matrix is summed on the device first and over
devices once, which is why this is written per device (`shard_map`).

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
) -> Float[Array, ""]:
    """Σ over all tokens of weight · (cross entropy in nats + z_loss · logZ²), in float32.

    It is a sum, so that sums over microbatches add up; divide it by the sum of all the weights.
    Inside a `shard_map` over dp or cp axes it is the sum over the tokens that are given there.

    Args:
        hidden: outputs of the decoder, in cp's layout order.
        unembedding: the output matrix; used in the dtype of `hidden`, its gradient summed in its
            own.
        targets: the token to be predicted at each place; any valid id where the weight is 0.
        weights: how much each place counts; 0 for those that do not.
        cp: the context parallelism whose axes the batch and the sequence are cut over; None for one
            device.
        chunk: tokens per device whose logits exist at one time.
        z_loss: weight of the squared log-partition.
    """
    local = functools.partial(_on_device, chunk=chunk, z_loss=z_loss)
    if cp is None:
        return local(hidden, unembedding, targets, weights, sum_over=(), tp=())
    tokens, tp = cp.spec(2), live_tp(cp)
    sum_over = live_axes(cp, cp.dp) + live_axes(cp, cp.cp_axes)
    of_device = functools.partial(local, sum_over=sum_over, tp=tp)
    in_specs = (cp.spec(3), PartitionSpec(tp or None, None), tokens, tokens)
    summed = spmd.shard_map(cp.mesh, cp.axes, of_device, in_specs, PartitionSpec())
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
) -> tuple[Float[Array, "B n"], Float[Array, "B n"]]:
    """Σ weight · cross entropy in nats, and Σ weight, over the tokens of each bin of each row.

    For looking at a model, not for training it: the tokens are reduced where they are, and no
    more than a number per row and bin leaves a device.

    Args:
        hidden: as in `summed_cross_entropy`, like all that is not named here.
        unembedding: the output matrix.
        targets: the token to be predicted at each place.
        weights: how much each place counts.
        bins: the bin that each place belongs to, from 0 to `num_bins - 1`.
        num_bins: n.
        cp: the context parallelism.
        chunk: tokens per device whose logits exist at one time.
    """

    def on_device(hidden, unembedding, targets, weights, bins, *, sum_over, tp):
        def of_chunk(block):
            hidden, targets, weights, bins = block
            log_z, of_target = _log_z_and_target(hidden, unembedding, targets, tp)
            # Compared, not scattered: the order of the sums is then always the same.
            own = bins[..., None] == jnp.arange(num_bins, dtype=bins.dtype)[None, None]
            in_bin = jnp.where(own, weights[..., None], 0)
            loss = (log_z - of_target)[..., None]
            return jnp.sum(in_bin * loss, axis=1), jnp.sum(in_bin, axis=1)

        blocks = [chunks.split(x, chunk) for x in (hidden, targets, weights, bins)]
        sums = jax.tree.map(lambda x: jnp.sum(x, axis=0), jax.lax.map(of_chunk, blocks))
        return jax.lax.psum(sums, sum_over) if sum_over else sums

    if cp is None:
        return on_device(hidden, unembedding, targets, weights, bins, sum_over=(), tp=())
    tokens, tp = cp.spec(2), live_tp(cp)
    of_device = functools.partial(on_device, sum_over=live_axes(cp, cp.cp_axes), tp=tp)
    rows = PartitionSpec(cp.dp, None)
    in_specs = (cp.spec(3), PartitionSpec(tp or None, None), tokens, tokens, tokens)
    binned = spmd.shard_map(cp.mesh, cp.axes, of_device, in_specs, (rows, rows))
    arrays = hidden, unembedding, targets, weights, bins
    return spmd.run(cp.mesh, cp.axes, binned, (rows, rows), *arrays)


def _on_device(hidden, unembedding, targets, weights, *, chunk, z_loss, sum_over, tp):
    """The weighted sum over the tokens of one device, and then over the devices of `sum_over`."""

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def of_chunk(hidden, targets, weights):
        log_z, of_target = _log_z_and_target(hidden, unembedding, targets, tp)
        return jnp.sum(weights * (log_z - of_target + z_loss * jnp.square(log_z)))

    # Where the last chunk is filled up, the weights are 0.
    blocks = [chunks.split(x, chunk) for x in (hidden, targets, weights)]
    sums = jax.lax.map(lambda block: of_chunk(*block), blocks)
    total = jnp.sum(sums)
    return jax.lax.psum(total, sum_over) if sum_over else total


def _log_z_and_target(
    hidden: Float[Array, "B t D"], unembedding, targets, tp: tuple[str, ...]
) -> tuple[Float[Array, "B t"], Float[Array, "B t"]]:
    """Of each token, the log-partition and the target's logit; their difference is the loss."""
    # The cast is in here so that the cotangents of the chunks add up in the matrix's own dtype.
    logits = jnp.einsum(
        "btd,vd->btv",
        hidden,
        unembedding.astype(hidden.dtype),
        preferred_element_type=jnp.float32,
    )
    return _log_partition(logits, tp), _logit_of(targets, logits, tp)


def _log_partition(logits: Float[Array, "B t V"], tp: tuple[str, ...]) -> Float[Array, "B t"]:
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    top = jax.lax.pmax(top, tp) if tp else top
    total = jnp.sum(jnp.exp(logits - top[..., None]), axis=-1)
    return top + jnp.log(jax.lax.psum(total, tp) if tp else total)


def _logit_of(targets, logits: Float[Array, "B t V"], tp: tuple[str, ...]) -> Float[Array, "B t"]:
    """The target's logit, which one of the tp devices holds."""
    first = jax.lax.axis_index(tp) * logits.shape[-1] if tp else 0
    token = first + jnp.arange(logits.shape[-1], dtype=targets.dtype)
    here = jnp.sum(jnp.where(token[None, None] == targets[..., None], logits, 0), axis=-1)
    return jax.lax.psum(here, tp) if tp else here
