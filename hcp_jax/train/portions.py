"""Compute a batch in portions: split its rows, sum over the portions, reduce over devices once."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from hcp_jax.models.layers.embedding import live_axes
from hcp_jax.parallel import spmd
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.train.batch import Batch


class Sums(NamedTuple):
    """Sums over the microbatches of a step so far, all in float32.

    Attributes:
        grads: gradients of `loss`, a tree like the parameters.
        loss: Σ weight · loss over all tokens, in nats.
        weight: Σ weight.
        means: `Losses.means`.
    """

    grads: Any
    loss: Any
    weight: Any
    means: Any


def split_portions(batch: Batch, number: int, cp: ContextParallel | None) -> Any:
    """Return the batch with a leading dim of `number` portions; row r is in portion r mod `number`.

    Rows are cut over dp in equal stretches; taking every `number`-th row of each moves no data.
    """
    rows = batch["tokens"].shape[0]
    each = number * (1 if cp is None else cp.axis_size(cp.dp))
    if rows % each:
        raise ValueError(
            f"a batch of {rows} rows cannot be computed in accumulation={number} portions on "
            f"dp={each // number}: the rows must be a multiple of {each}."
        )

    def split(x: Array) -> Array:
        if x.shape[0] != rows:  # one for all rows
            return jnp.broadcast_to(x, (number, *x.shape))
        return x.reshape(rows // number, number, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)


def reduced_once(
    summed: Callable[[Any, Any, Any], Sums], cp: ContextParallel
) -> Callable[[Any, Any, Any], Sums]:
    """Return `summed` with its sums reduced over the devices once, after all portions.

    Outside of a `shard_map`, XLA reduces the gradients of each layer in each portion.
    """
    axes = live_axes(cp, cp.dp) + live_axes(cp, cp.cp_axes)
    if not axes:
        return summed

    def on_device(params: Any, portions: Any, weight: Any) -> Sums:
        sums: Sums = jax.lax.psum(summed(params, portions, weight), axes)
        return sums

    def once(params: Any, portions: Any, weight: Any) -> Sums:
        rows = portions["tokens"].shape[1]
        tokens, each = PartitionSpec(None, *cp.spec(2)), PartitionSpec(None, cp.dp)
        specs = {name: tokens for name in portions if name != "mask"}
        # The devices of a row see all intervals of its mask.
        mask = jax.tree.map(
            lambda x: each if x.shape[1] == rows else PartitionSpec(), portions["mask"]
        )
        in_specs = (PartitionSpec(), specs | {"mask": mask}, PartitionSpec())
        mapped = spmd.shard_map(cp.mesh, axes, on_device, in_specs, PartitionSpec())
        sums: Sums = mapped(params, portions, weight)
        return sums

    return once


def sum_portions(
    gradients: Callable[[Any, Batch, Any], Sums],
    params: Any,
    portions: Any,
    weight: Any,
) -> Sums:
    """Return the sums over the portions (`split_portions`), computed one after the other."""
    number = jax.tree.leaves(portions)[0].shape[0]
    if number == 1:
        return gradients(params, jax.tree.map(lambda x: x[0], portions), weight)

    def add(total: Sums, portion: Any) -> tuple[Sums, None]:
        return jax.tree.map(jnp.add, total, gradients(params, portion, weight)), None

    first = jax.tree.map(lambda x: x[0], portions)
    shapes = jax.eval_shape(gradients, params, first, weight)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total: Sums = jax.lax.scan(add, zeros, portions)[0]
    return total
