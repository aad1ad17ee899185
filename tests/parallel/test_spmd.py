"""Devices are numbered in the order in which axes are named, whatever the mesh's own order."""

import contextlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import hcp_jax as hcp
from hcp_jax.parallel import spmd

NAMES = ("a", "b", "c")
TUPLES = [t for n in (2, 3) for t in itertools.permutations(NAMES, n)]


def mesh_of(names, sizes, types=AxisType.Auto):
    return jax.make_mesh(sizes, names, axis_types=(types,) * len(names))


def numbered(axes, groups):
    """Return what each device hears of the others by every collective, in the order of `axes`."""
    number = jax.lax.axis_index(axes)
    size = 2 ** len(axes)
    ring = spmd.ppermute(number, axes, [(d, (d + 1) % size) for d in range(size)])
    gathered = jax.lax.all_gather(number, axes)
    arriving = jax.lax.all_to_all(
        number * 10 + jnp.arange(2), axes, 0, 0, axis_index_groups=groups, tiled=True
    )
    scattered = jax.lax.psum_scatter(jnp.arange(size), axes, tiled=True)
    return jnp.concatenate([x.reshape(-1) for x in (number, ring, gathered, arriving, scattered)])


@pytest.mark.parametrize("order", list(itertools.permutations(NAMES)), ids="-".join)
def test_every_collective_numbers_devices_as_the_axes_are_named(order):
    mesh = mesh_of(order, (2, 2, 2))
    pairs = [[0, 1], [2, 3], [4, 5], [6, 7]]

    def each():
        return [numbered(axes, pairs[: 2 ** len(axes) // 2])[None] for axes in TUPLES]

    out_specs = [PartitionSpec(axes) for axes in TUPLES]
    heard = jax.jit(
        jax.shard_map(each, mesh=mesh, in_specs=(), out_specs=out_specs, check_vma=False)
    )()
    for axes, rows in zip(TUPLES, heard, strict=True):
        size = 2 ** len(axes)
        for d, row in enumerate(np.asarray(rows)):
            first, lane = d // 2 * 2, d % 2
            arriving = [first * 10 + lane, (first + 1) * 10 + lane]
            want = [d, (d - 1) % size, *range(size), *arriving, d * size]
            assert row.tolist() == want, f"{axes} on a mesh {order}"


def test_the_mesh_in_context_must_be_the_context_parallel_s():
    cp = hcp.ContextParallel(mesh_of(("x", "cp"), (2, 4)), "p2p", "zigzag", None, None, "cp", None)
    x = jnp.zeros((1, 8, 1, 4))
    other = mesh_of(("x", "cp"), (4, 2))
    with (
        jax.set_mesh(other),
        pytest.raises(ValueError, match=r"mesh in context is \(x: 4, cp: 2\)"),
    ):
        hcp.dot_product_attention(x, x, x, cp=cp)
    lacking = mesh_of(("x", "y"), (2, 4))
    with jax.set_mesh(lacking), pytest.raises(ValueError, match="they differ in cp"):
        cp.roll(x, 1)


@pytest.mark.parametrize("context", [False, True], ids=["alone", "set_mesh"])
def test_arrays_go_into_the_layout_and_back_on_explicit_axes(context):
    mesh = mesh_of(("cp", "dp"), (4, 2), AxisType.Explicit)
    cp = hcp.ContextParallel(mesh, "p2p", tp=None, cp_outer="cp", cp_inner=None)
    x = np.arange(2 * 13 * 3, dtype=np.float32).reshape(2, 13, 3)
    with jax.set_mesh(mesh) if context else contextlib.nullcontext():
        for y in (
            cp.shard(x),
            cp.shard(jnp.asarray(x)),
            cp.shard_batch({"x": x, "m": hcp.causal()})["x"],
        ):
            assert jax.typeof(y).sharding.spec == PartitionSpec("dp", "cp", None)
            back = cp.unshard(y, length=13)
            assert jax.typeof(back).sharding.spec == PartitionSpec("dp", None, None)
            assert np.array_equal(back, x)
        assert np.array_equal(cp.unshard(np.asarray(y), length=13), x)
        rolled = cp.roll(np.asarray(y), 16)
        assert np.array_equal(rolled, y)
        assert jax.typeof(cp.positions(13)).sharding.spec == PartitionSpec(None, "cp")
