"""Attention inside the caller's own shard_map: over other axes or over the cp axes themselves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import hcp_jax as hcp
from tests import oracle

T = 16
X = oracle.inputs(T, 4, 2, 16, 16)
ROWS, WHOLE = PartitionSpec("data"), PartitionSpec()
TRACKED = pytest.mark.parametrize("check_vma", [True, False])


def mesh_of(sizes, **explicit):
    types = tuple(AxisType.Explicit if n in explicit else AxisType.Auto for n in sizes)
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types, devices=devices)


@functools.cache
def expected():
    dense = np.tril(np.ones((1, T, T), bool))
    return oracle.attention(X._replace(dlse=0 * X.dlse), dense, sinks=True)


def attend(cp, q, k, v, sinks, mask, implementation=None):
    return hcp.dot_product_attention(
        q, k, v, cp=cp, mask=mask, sinks=sinks, implementation=implementation
    )


def results(mapped, mask, *arrays):
    """Return the output of a shard_map and its gradients, taken from outside of it."""

    def loss(q, k, v, sinks, dout, mask):
        out = mapped(q, k, v, sinks, mask)
        return jnp.sum(out * dout), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))(*arrays, mask)
    return out, *grads


def assert_expected(found, unshard=np.asarray):
    want = expected()
    want = (want.out, want.dq, want.dk, want.dv, want.dsinks)
    found = [*map(unshard, found[:4]), found[4]]
    errors = list(map(oracle.relative, found, want))
    assert max(errors) <= 2e-6, errors


@TRACKED
@pytest.mark.parametrize("implementation", ["reference", "blockwise", "triton"])
def test_one_device_s_attention_in_a_shard_map_over_the_batch(implementation, check_vma):
    mapped = jax.shard_map(
        functools.partial(attend, None, implementation=implementation),
        mesh=mesh_of({"data": 2}),
        in_specs=(ROWS, ROWS, ROWS, WHOLE, WHOLE),
        out_specs=ROWS,
        check_vma=check_vma,
    )
    assert_expected(results(mapped, hcp.causal(), *X[:5]))


def test_gradients_may_be_taken_inside_of_a_tracked_shard_map():
    def grads(q, k, v, sinks, dout):
        def loss(q, k, v, sinks):
            return jnp.sum(attend(None, q, k, v, sinks, hcp.causal()) * dout)

        return jax.grad(loss, (0, 1, 2, 3))(q, k, v, sinks)

    mapped = jax.shard_map(
        grads,
        mesh=mesh_of({"data": 2}),
        in_specs=(ROWS, ROWS, ROWS, WHOLE, ROWS),
        out_specs=(ROWS, ROWS, ROWS, WHOLE),
    )
    assert_expected([expected().out, *jax.jit(mapped)(*X[:5])])


@TRACKED
@pytest.mark.parametrize("explicit", [(), ("cp_inner", "pp")], ids=["auto", "mixed"])
@pytest.mark.parametrize("comm_type", ["p2p", "a2a+all_gather"])
def test_attention_and_roll_in_a_pipeline(comm_type, explicit, check_vma):
    mesh = mesh_of({"cp_inner": 2, "pp": 2, "cp_outer": 2}, **dict.fromkeys(explicit))
    cp = hcp.ContextParallel(mesh, comm_type, dp=None, tp=None)

    def stage(q, k, v, sinks, mask):
        out = attend(cp, q, k, v, sinks, mask)
        return cp.roll(cp.roll(out, 3), -3) + 0 * cp.positions(T)[..., None, None]

    pp = PartitionSpec("pp")
    mapped = jax.shard_map(
        stage,
        mesh=mesh,
        in_specs=(pp, pp, pp, WHOLE, WHOLE),
        out_specs=pp,
        axis_names={"pp"},
        check_vma=check_vma,
    )
    with jax.set_mesh(mesh):
        q, k, v, dout = (
            jax.device_put(np.asarray(cp.shard(a)), NamedSharding(mesh, pp))
            for a in (X.q, X.k, X.v, X.dout)
        )
        mask = hcp.causal() if explicit else cp.place(hcp.causal(), T)
        found = results(mapped, mask, q, k, v, X.sinks, dout)
    assert_expected(found, lambda a: cp.unshard(np.asarray(a)))


@TRACKED
@pytest.mark.parametrize("comm_type", ["p2p", "all_gather", "a2a+p2p"])
def test_where_the_cp_axes_are_manual_the_op_takes_a_device_s_own_arrays(comm_type, check_vma):
    mesh = mesh_of({"cp_inner": 2, "dp": 2, "cp_outer": 2})
    cp = hcp.ContextParallel(mesh, comm_type, tp=None)
    cut = cp.spec(2)

    def step(q, k, v, sinks, mask):
        out = attend(cp, q, k, v, sinks, mask)
        assert q.shape[:2] == out.shape[:2] == (1, T // 4)
        index = cp.positions(T)
        rolled = cp.roll(index, -1)
        right = jnp.all(rolled == (index + 1) % T)
        return jnp.where(right, out, jnp.nan)

    placed = comm_type != "p2p"
    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=(cut, cut, cut, WHOLE, WHOLE), out_specs=cut, check_vma=check_vma
    )
    arrays = (cp.shard(X.q), cp.shard(X.k), cp.shard(X.v), X.sinks, cp.shard(X.dout))
    mask = cp.place(hcp.causal(), T) if placed else hcp.causal()
    assert_expected(results(mapped, mask, *arrays), cp.unshard)
