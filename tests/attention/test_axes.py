"""Attention, roll and the layout on meshes of any axis order, names and types."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import hcp_jax as hcp
from hcp_jax.cost.traffic import STRATEGIES
from tests import oracle

T, S = 13, 21  # padded to 16 and 24
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
ROLES = ("dp", "tp", "cp_outer", "cp_inner")
FOREIGN = {"dp": "data", "tp": "model", "cp_outer": "ring", "cp_inner": "seq"}


def context(comm_type, order, *, explicit=(), names=None, layout="zigzag", dp=1):
    """Return a context on a mesh whose axes stand in `order`; those in `explicit` are Explicit."""
    names = names or {role: role for role in ROLES}
    sizes = {"dp": dp, "tp": 2 // dp, "cp_outer": 2, "cp_inner": 2, "other": 1}
    types = tuple(EXPLICIT if role in explicit else AUTO for role in order)
    mesh = jax.make_mesh(
        [sizes[role] for role in order],
        [names.get(role, role) for role in order],
        axis_types=types,
        devices=jax.devices()[: int(np.prod([sizes[role] for role in order]))],
    )
    return hcp.ContextParallel(mesh, comm_type, layout, **names)


@functools.cache
def problem(length=T, key_length=S):
    """Return inputs of cross attention, a mask as library and oracle write it, and the answer."""
    rng = np.random.default_rng(length * 100 + key_length)
    shapes = {"q": (2, length, 8, 8), "k": (2, key_length, 2, 8), "v": (2, key_length, 2, 8)}
    shapes |= {"sinks": (8,), "dout": (2, length, 8, 8), "dlse": (2, length, 8)}
    x = oracle.Inputs(**{n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()})
    start = rng.integers(0, key_length, (2, length)).astype(np.int32)
    end = np.minimum(start + rng.integers(0, key_length, (2, length)), key_length).astype(np.int32)
    key = np.arange(key_length)
    dense = (start[:, :, None] <= key) & (key < end[:, :, None])
    return x, hcp.intervals(start, end), oracle.attention(x, dense, sinks=True, soft_cap=3.0)


@functools.partial(jax.jit, static_argnums=0)
def run(cp, x, mask):
    def loss(q, k, v, sinks):
        out, lse = hcp.dot_product_attention(
            q, k, v, cp=cp, mask=mask, sinks=sinks, logits_soft_cap=3.0, return_residual=True
        )
        return jnp.sum(out * x.dout) + jnp.sum(lse * x.dlse), (out, lse)

    (_, results), grads = jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)(*x[:4])
    return (*results, *grads), cp.roll(x.q, -3), cp.roll(x.q, 2) * cp.positions(T)[..., None, None]


def assert_right(cp, *, placed=True):
    """Outputs, gradients and rolls are those of the oracle, and have the types of `cp.spec`."""
    x, mask, want = problem()
    cut = oracle.Inputs(*(cp.shard(a) if a.ndim > 1 else a for a in x))
    here = cp.place(mask, T, key_length=S) if placed else mask
    found, rolled, weighed = run(cp, cut, here)
    types = dict(zip(cp.mesh.axis_names, cp.mesh.axis_types, strict=True))
    explicit = {name for name, kind in types.items() if kind == EXPLICIT}
    for a in (found[0], rolled):
        assert names_in(jax.typeof(a).sharding.spec) <= explicit
        on_seq = jax.typeof(a).sharding.spec[1] or ()
        on_seq = (on_seq,) if isinstance(on_seq, str) else on_seq
        assert on_seq == tuple(axis for axis in cp.cp_axes if axis in explicit)
    lengths = (T, T, T, S, S)
    found = [cp.unshard(a, length=n) for a, n in zip(found[:5], lengths, strict=True)] + [found[5]]
    errors = dict(zip(want._fields, map(oracle.relative, found, want), strict=True))
    assert max(errors.values()) <= 2e-6, errors
    padded = np.pad(x.q, ((0, 0), (0, 3), (0, 0), (0, 0)))
    assert np.array_equal(cp.unshard(rolled), np.roll(padded, -3, axis=1))
    index = np.arange(16, dtype=np.float32)[None, :, None, None]
    assert np.array_equal(cp.unshard(weighed), np.roll(padded, 2, axis=1) * index)


def names_in(spec):
    return set(jax.tree.leaves(tuple(spec)))


TABLE = {
    # strategy -> the mesh's axes from the slowest to the fastest, and those that are Explicit
    "p2p": (("cp_inner", "tp", "cp_outer", "dp"), ()),
    "all_gather": (("cp_inner", "dp", "cp_outer", "tp"), ROLES),
    "a2a": (("tp", "cp_inner", "cp_outer", "dp"), ("cp_outer", "tp")),
    "a2a+p2p": (("cp_inner", "cp_outer", "tp", "dp"), ROLES),
    "a2a+all_gather": (("dp", "cp_inner", "tp", "cp_outer"), ("cp_inner",)),
}


@pytest.mark.parametrize("comm_type", STRATEGIES)
def test_every_strategy_is_exact_on_meshes_of_any_order_and_type(comm_type):
    order, explicit = TABLE[comm_type]
    layout = "contiguous" if comm_type == "p2p" else "zigzag"
    cp = context(comm_type, order, explicit=explicit, layout=layout)
    assert_right(cp, placed=comm_type != "p2p")


@pytest.mark.slow
@pytest.mark.parametrize("order", list(itertools.permutations(ROLES)), ids="-".join)
def test_every_order_is_exact(order):
    rng = np.random.default_rng(list(map(ROLES.index, order)))
    explicit = [role for role in ROLES if rng.random() < 0.5]
    names = FOREIGN if rng.random() < 0.5 else None
    cp = context(
        str(rng.choice(list(STRATEGIES))),
        order,
        explicit=explicit,
        names=names,
        layout=str(rng.choice(["zigzag", "contiguous"])),
        dp=int(rng.choice([1, 2])),
    )
    with jax.set_mesh(cp.mesh):
        assert_right(cp, placed=bool(rng.random() < 0.5))


def test_set_mesh_foreign_names_and_axes_of_no_role_change_nothing():
    order = ("cp_inner", "other", "dp", "cp_outer", "tp")
    cp = context("p2p", order, explicit=("dp", "cp_inner", "other"), names=FOREIGN, dp=2)
    with jax.set_mesh(cp.mesh):
        assert_right(cp)


def test_a_ring_goes_round_in_the_order_of_the_axes_not_of_the_mesh():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("inner", "outer"))
    cp = hcp.ContextParallel(
        mesh, "p2p", "contiguous", dp=None, tp=None, cp_outer="outer", cp_inner="inner"
    )
    q = cp.shard(np.zeros((1, 4, 1, 4), np.float32))
    v = cp.shard(np.arange(4, dtype=np.float32).reshape(1, 4, 1, 1))
    out = hcp.dot_product_attention(q, q, v, cp=cp, is_causal=True)
    assert np.allclose(np.asarray(cp.unshard(out)).ravel(), [0, 0.5, 1, 1.5])


def test_one_device_s_attention_takes_arrays_of_explicit_type():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(EXPLICIT,) * 2)
    x = oracle.inputs(T, 4, 2, 8, 8)
    cut = NamedSharding(mesh, PartitionSpec("data", None, "model"))
    q, k, v = (jax.device_put(np.concatenate([a, a]), cut) for a in x[:3])
    attend = functools.partial(hcp.dot_product_attention, is_causal=True)
    out = attend(q, k, v)
    assert jax.typeof(out).sharding.spec == PartitionSpec("data", None, "model", None)
    plain = jax.nn.dot_product_attention(*x[:3], is_causal=True)
    assert oracle.relative(np.asarray(out)[2:], plain) <= 2e-6
    grad = jax.jit(jax.grad(lambda q: jnp.sum(attend(q, k, v) ** 2)))(q)
    assert jax.typeof(grad).sharding.spec == jax.typeof(q).sharding.spec
