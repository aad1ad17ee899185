"""Sum losses and gradients over the parts of a step, and reduce them over the devices once.

The parts are portions of one batch, in one program (`sum_portions`), or microbatches, each with a
program of its own (`add_on_each_device`). Outside of a `shard_map`, XLA reduces the gradients of
each layer in each part. Inside, a device adds up its own, unreduced, until the step ends.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from hcp_jax.models.layers.embedding import live_axes
from hcp_jax.models.loss_terms import Mean
from hcp_jax.parallel import spmd
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.parallel.placing import Gathered
from hcp_jax.sequence.placed_mask import PlacedMask
from hcp_jax.sequence.placement import Groups
from hcp_jax.train.batch import Batch


class Sums(NamedTuple):
    """Sums over the microbatches of a step so far, all in float32.

    They are over the tokens of all devices, or, with a leading dim, of each device of dp and cp.

    Attributes:
        grads: gradients of `loss`, a tree like the parameters.
        loss: Σ weight · loss over the tokens, in nats.
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


def portion(batch: Batch, number: int, of: int) -> Batch:
    """Return one portion of a batch on the host, as `split_portions` cuts it.

    Args:
        batch: the batch; some arrays may not be read yet.
        number: the number of the portion.
        of: how many portions there are; it divides the rows.
    """
    rows = batch["weights"].shape[0]

    def cut(x: Any) -> Any:
        if isinstance(x, Gathered):
            return x._replace(places=cut(x.places))
        return x[number::of] if np.ndim(x) and x.shape[0] == rows else x

    found: Any = jax.tree.map(cut, dict(batch), is_leaf=lambda x: isinstance(x, Gathered))
    return found


def reduced_once(
    summed: Callable[[Any, Any, Any], Sums], cp: ContextParallel
) -> Callable[[Any, Any, Any], Sums]:
    """Return `summed` with its sums reduced over the devices once, after all portions."""
    axes = live_axes(cp, cp.dp) + live_axes(cp, cp.cp_axes)
    if not axes:
        return summed

    def on_device(params: Any, portions: Any, weight: Any) -> Sums:
        sums: Sums = jax.lax.psum(summed(params, portions, weight), axes)
        return sums

    def once(params: Any, portions: Any, weight: Any) -> Sums:
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), portions)
        specs = jax.tree.map(
            lambda spec: PartitionSpec(None, *spec),
            batch_specs(one, cp),
            is_leaf=lambda x: isinstance(x, PartitionSpec),
        )
        in_specs = (PartitionSpec(), specs, PartitionSpec())
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


def batch_specs(batch: Batch, cp: ContextParallel) -> Any:
    """Return a tree like the batch with the specs that give each device its own part of it.

    The devices of a row get all intervals of its mask; under groups, those that they exchange heads
    with.
    """
    whole, mask = PartitionSpec(), batch["mask"]
    rows = batch["tokens"].shape[0]
    if isinstance(mask, PlacedMask) and isinstance(mask.placement, Groups):
        intervals = jax.tree.map(lambda _: cp.interval_spec, mask.intervals)
        runs = jax.tree.map(lambda _: whole, mask.runs)
        mask_specs: Any = dataclasses.replace(mask, intervals=intervals, runs=runs)
    else:
        each = PartitionSpec(cp.dp)
        mask_specs = jax.tree.map(lambda x: each if x.shape[0] == rows else whole, mask)
    return {name: cp.spec(2) for name in batch if name != "mask"} | {"mask": mask_specs}


def whole_gradients(cp: ContextParallel, *, fsdp: bool) -> bool:
    """Return whether a device sums the gradients of all parameters by itself (of its part of tp).

    With FSDP no device has room for them: those of each part of a step are reduce-scattered.
    Experts that are cut are no one's whole gradients either.
    """
    return not fsdp and cp.ep == 1


def abstract_sums(
    params: Any, cp: ContextParallel, means: Sequence[str] = (), *, fsdp: bool
) -> Sums:
    """Return shapes and shardings of the sums of a step whose microbatches have their own programs.

    Each device sums its own tokens, and the update reduces that over the devices. But without
    `whole_gradients`, the sums of gradients are reduced already, and sharded like the parameters.

    Args:
        params: shapes and shardings of the parameters.
        cp: their context parallelism.
        means: names of the means, from `mean_names`.
        fsdp: whether parameters are cut over dp and cp.
    """
    number, axes = cp.axis_size(cp.flat_axes), cp.flat_axes

    def unreduced(shape: tuple[int, ...], spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(cp.mesh, PartitionSpec(axes, *spec))
        return jax.ShapeDtypeStruct((number, *shape), jnp.float32, sharding=sharding)

    scalar = unreduced((), PartitionSpec())
    weight, grads = scalar, params
    if whole_gradients(cp, fsdp=fsdp):
        grads = jax.tree.map(lambda x: unreduced(x.shape, x.sharding.spec), params)
    else:
        whole = NamedSharding(cp.mesh, PartitionSpec())
        scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    return Sums(grads, scalar, weight, {name: Mean(scalar, scalar) for name in means})


def add_on_each_device(
    gradients: Callable[[Any, Batch, Any], Sums], cp: ContextParallel
) -> Callable[[Any, Sums, Batch], Sums]:
    """Return a function `(params, sums, batch) -> sums` that adds the gradients of a microbatch.

    No collective reduces anything, so those of attention are the only ones (and those of tp).

    Args:
        gradients: from `summed_gradients`.
        cp: the context parallelism of the microbatch.
    """
    axes = cp.flat_axes

    def on_device(params: Any, sums: Sums, batch: Batch) -> Sums:
        found = gradients(params, batch, 1.0)
        added: Sums = jax.tree.map(lambda total, x: total + x[None], sums, found)
        return added

    def add(params: Any, sums: Sums, batch: Batch) -> Sums:
        each = PartitionSpec(axes)
        in_specs = (PartitionSpec(), each, batch_specs(batch, cp))
        added: Sums = spmd.shard_map(cp.mesh, axes, on_device, in_specs, each)(params, sums, batch)
        return added

    return add


def weight_on_each_device(batch: Batch, cp: ContextParallel) -> Float[Array, "D"]:
    """Return the sum of the weights of each device's own tokens."""
    return spmd.shard_map(
        cp.mesh,
        cp.flat_axes,
        lambda weights: jnp.sum(weights)[None],
        (cp.spec(2),),
        PartitionSpec(cp.flat_axes),
    )(batch["weights"])


def reduce_over_devices(tree: Any, cp: ContextParallel) -> Any:
    """Return the sum of each array over its leading dim of devices; see `abstract_sums`."""
    axes = cp.flat_axes

    def on_device(tree: Any) -> Any:
        return jax.lax.psum(jax.tree.map(lambda x: x[0], tree), axes)

    mapped = spmd.shard_map(cp.mesh, axes, on_device, PartitionSpec(axes), PartitionSpec())
    return mapped(tree)
