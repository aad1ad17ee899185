"""Group layouts: every document on its group is what it is alone on one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import hcp_jax as hcp
from hcp_jax import dynamic
from hcp_jax.attention import grouped
from hcp_jax.compiled.hlo import collectives
from hcp_jax.dynamic import Microbatch
from hcp_jax.parallel.microbatch import abstract_microbatch, place_microbatch
from hcp_jax.sequence.groupings import group_of_device
from hcp_jax.sequence.layout import KeyRuns, key_index
from tests import oracle

M = 13  # places of a device; odd, since nothing needs it even
T = 8 * M  # tokens that the oracle is given: the documents of a microbatch, and some that are none
HEADS = (8, 2, 8, 12)  # GQA, values wider than keys
MESHES = {
    "8 flat": {"cp_outer": 8},
    "2x4": {"cp_outer": 2, "cp_inner": 4},
    "dp2 2x2": {"dp": 2, "cp_outer": 2, "cp_inner": 2},
    "tp2 2x2": {"tp": 2, "cp_outer": 2, "cp_inner": 2},
    "3x2 of 6": {"cp_outer": 3, "cp_inner": 2},
    "inner first": {"cp_inner": 2, "cp_outer": 2, "dp": 2, "tp": 1},
}


@functools.cache
def context(mesh: str, comm_type: str, layout: tuple[int, ...], head_groups: int = 1):
    sizes = MESHES[mesh]
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    if mesh == "inner first":  # the reverse of the order in which groups count devices
        types = (AxisType.Explicit, AxisType.Auto, AxisType.Explicit, AxisType.Auto)
        made = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types)
    else:
        made = hcp.make_mesh(**sizes, devices=devices)
    return hcp.ContextParallel(made, comm_type, head_groups=head_groups, groups=layout)


def microbatches(layout, seed: int) -> list[tuple[Microbatch, tuple[int, ...]]]:
    """Random documents as the scheduler puts them on a layout: full, and with groups left empty."""
    rng = np.random.default_rng(seed)
    widest, places = max(layout) * M, sum(layout) * M
    lengths = [widest]
    while sum(lengths) < 1.3 * places:
        lengths.append(int(rng.integers(1, rng.choice([M, widest]) + 1)))
    plan = dynamic.schedule(lengths, sum(layout), M, menu=[layout])
    return [(mb, plan.lengths) for mb in plan.microbatches]


@functools.cache
def expected(lengths: tuple[int, ...], heads, seed, soft_cap, sinks, window) -> tuple:
    """(inputs, answer) of documents one behind the other, each alone; after them, nothing."""
    rng = np.random.default_rng(seed)
    n, k, h, hv = heads
    shapes = [(1, T, n, h), (1, T, k, h), (1, T, k, hv), (n,), (1, T, n, hv), (1, T, n)]
    x = oracle.Inputs(*(rng.normal(size=shape).astype(np.float32) for shape in shapes))
    x.dlse[:, sum(lengths) :] = 0
    ids = np.repeat(np.arange(len(lengths) + 1), [*lengths, T - sum(lengths)])
    i, j = np.arange(T)[:, None], np.arange(T)
    dense = (ids[:, None] == ids) & (j <= i) & (j > i - window) & (ids < len(lengths))[:, None]
    return x, oracle.attention(x, dense[None], soft_cap=soft_cap, sinks=sinks)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def run(cp, soft_cap, use_sinks, implementation, sinks, batch):
    def loss(q, k, v, sinks):
        out, lse = hcp.dot_product_attention(
            *(q, k, v),
            cp=cp,
            mask=batch["mask"],
            sinks=sinks if use_sinks else None,
            logits_soft_cap=soft_cap,
            implementation=implementation,
            return_residual=True,
        )
        seen = jnp.where(lse == -jnp.inf, 0, lse)
        return jnp.sum(out * batch["dout"]) + jnp.sum(seen * batch["dlse"]), (out, lse)

    arrays = batch["q"], batch["k"], batch["v"], sinks
    (_, aux), grads = jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)(*arrays)
    return *aux, *grads


def assert_exact(
    cp, microbatch, lengths, *, heads=HEADS, soft_cap=None, sinks=False, window=None, impl=None
):
    """Every document's out, lse, dq, dk and dv are those it has alone; padding has none."""
    held = [d for group in microbatch.documents for d in group]
    own = tuple(lengths[d] for d in held)
    x, want = expected(own, heads, len(held), soft_cap, sinks, window or T)
    packed = dynamic.pack(microbatch, lengths, M)
    inside = packed.document >= 0
    first = dict(zip(held, np.cumsum(own) - own, strict=True))
    natural = np.array([first.get(d, 0) for d in packed.document.flat]) + packed.position.flat
    natural = natural.reshape(inside.shape)

    def buffers(a):
        # What lies where no token is must not matter.
        return np.where(inside.reshape(*inside.shape, *[1] * (a.ndim - 2)), a[0][natural], 50.0)

    arrays = {name: buffers(a) for name, a in x._asdict().items() if a.ndim > 1}
    arrays["dlse"][~inside] = 0  # a sink is seen by padding, too
    batch = place_microbatch(cp, packed, arrays, sliding_window=window)
    out, lse, dq, dk, dv, dsinks = run(cp, soft_cap, sinks, impl, x.sinks, batch)
    found = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    errors = {"dsinks": oracle.relative(dsinks, want.dsinks)} if sinks else {}
    for name, a in found.items():
        a = np.asarray(a).reshape(*inside.shape, *a.shape[2:])
        nothing = -np.inf if name == "lse" and not sinks else 0
        if not (name == "lse" and sinks):
            assert np.all(a[~inside] == nothing), f"{name} of padding"
        alone = np.zeros(getattr(want, name).shape[1:], np.float64)
        alone[natural[inside]] = a[inside]
        errors[name] = oracle.relative(alone[: sum(own)], getattr(want, name)[0, : sum(own)])
    assert max(errors.values()) <= 2e-6, f"{cp.comm_type}, {cp.groups}: {errors}"


@pytest.mark.parametrize(
    ("mesh", "layout"),
    [
        ("8 flat", (4, 2, 1, 1)),
        ("dp2 2x2", (8,)),
        ("2x4", (4, 4)),
        ("2x4", (1, 2, 5)),
        ("dp2 2x2", (2, 2, 2, 2)),
        ("8 flat", (4, 2, 2)),
        ("dp2 2x2", (1,) * 8),
        ("tp2 2x2", (2, 1, 1)),
        ("3x2 of 6", (3, 2, 1)),
        ("inner first", (4, 2, 1, 1)),
    ],
)
def test_a_document_in_the_ring_of_its_group_is_what_it_is_alone(mesh, layout):
    for microbatch, lengths in microbatches(layout, seed=0):
        assert_exact(context(mesh, "p2p", layout), microbatch, lengths)


@pytest.mark.parametrize(
    ("mesh", "layout", "heads", "size"),
    [
        ("2x4", (4, 4), HEADS, 4),
        ("2x4", (8,), (2, 1, 8, 8), 2),  # as many as there are heads
        ("dp2 2x2", (4, 2, 2), HEADS, 2),
        ("2x4", (6, 2), HEADS, 2),
        ("2x4", (4, 2, 1, 1), HEADS, 1),
        ("tp2 2x2", (2, 2), HEADS, 2),
        ("3x2 of 6", (4, 2), HEADS, 2),
        ("inner first", (4, 2, 2), HEADS, 2),
    ],
)
def test_heads_are_exchanged_inside_equal_parts_of_all_groups(mesh, layout, heads, size):
    cp = context(mesh, "a2a+p2p", layout)
    assert grouped.exchange_size(cp, heads[0] // cp.axis_size(cp.tp)) == size
    for microbatch, lengths in microbatches(layout, seed=1):
        assert_exact(cp, microbatch, lengths, heads=heads)


@pytest.mark.parametrize(("mesh", "layout"), [("2x4", (4, 4)), ("dp2 2x2", (2, 2, 2, 2))])
def test_groups_that_are_one_exchange_each_need_no_ring(mesh, layout):
    cp = context(mesh, "a2a", layout)
    for microbatch, lengths in microbatches(layout, seed=2):
        assert_exact(cp, microbatch, lengths)


def test_soft_cap_sinks_window_and_head_groups_go_with_groups():
    cp = context("2x4", "a2a+p2p", (4, 2, 2), head_groups=2)
    for microbatch, lengths in microbatches((4, 2, 2), seed=3):
        more = {"soft_cap": 3.0, "sinks": True, "window": 5}
        assert_exact(cp, microbatch, lengths, heads=(8, 4, 8, 8), **more)


@pytest.mark.slow
@pytest.mark.parametrize(("comm_type", "layout"), [("p2p", (4, 2, 1, 1)), ("a2a+p2p", (4, 2, 2))])
def test_the_triton_kernels_compute_groups_too(comm_type, layout):
    cp = context("2x4", comm_type, layout)
    for microbatch, lengths in microbatches(layout, seed=4):
        assert_exact(cp, microbatch, lengths, heads=(4, 2, 16, 16), impl="triton")


@pytest.mark.parametrize("comm_type", ["p2p", "a2a+p2p"])
def test_groups_without_documents_give_zeros(comm_type):
    layout = (4, 2, 2)
    for documents in (((), (0,), ()), ((), (), ())):
        assert_exact(context("2x4", comm_type, layout), Microbatch(layout, documents), (17,))


@functools.cache
def moved(layout, comm_type="p2p", backward=False):
    """The collectives of float32 attention on a group layout, or of its gradient."""
    cp = context("dp2 2x2", comm_type, layout)
    batch = abstract_microbatch(cp, M, {})

    def attend(q, k, v):
        return hcp.dot_product_attention(q, k, v, cp=cp, mask=mask)

    mask, shape = batch["mask"], batch["positions"].shape
    q, k = (
        jax.ShapeDtypeStruct((*shape, heads, 8), np.float32, sharding=cp.sharding(4))
        for heads in (8, 2)
    )
    mask = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), mask)
    if not backward:
        return collectives(jax.jit(attend).lower(q, k, k).compile().as_text())
    out, vjp = jax.eval_shape(lambda *x: jax.vjp(attend, *x), q, k, k)
    return collectives(jax.jit(lambda vjp, dout: vjp(dout)).lower(vjp, out).compile().as_text())


def leaves_its_group(collective, layout) -> bool:
    first, _ = group_of_device(layout)
    return any(len(set(first[list(members)])) > 1 for members in collective.groups)


@pytest.mark.parametrize(
    ("layout", "comm_type", "hops"),
    [((4, 2, 1, 1), "p2p", 3), ((8,), "p2p", 7), ((1,) * 8, "p2p", 0), ((4, 2, 2), "a2a+p2p", 1)],
)
def test_one_ppermute_per_hop_serves_all_groups(layout, comm_type, hops):
    exchanges = 4 if comm_type == "a2a+p2p" else 0
    for backward, arrays in ((False, 2), (True, 4)):
        found = moved(layout, comm_type, backward)
        permutes = [c for c in found if c.kind == "collective-permute"]
        assert sum(c.count for c in permutes) == arrays * hops
        assert sum(c.count for c in found if c.kind == "all-to-all") == exchanges
        assert {c.kind for c in found} <= {"collective-permute", "all-to-all"}
        assert not [c for c in found if leaves_its_group(c, layout)]


def test_a_finished_group_sends_nothing():
    turning = [[len(ring) for ring in c.groups] for c in moved((4, 2, 1, 1))]
    assert sorted(turning) == [[4], [4], [4], [4], [4, 2], [4, 2]]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_member_s_key_runs_are_its_devices_one_behind_the_other(size):
    packed = dynamic.pack(Microbatch((6,), ((0, 1, 2),)), (30, 11, 20), M)
    alone = [np.asarray(key_index(KeyRuns(*rows), M)) for rows in zip(*packed.runs, strict=True)]
    members = grouped.member_runs(KeyRuns(*packed.runs), size, M)
    for m, rows in enumerate(zip(*members, strict=True)):
        together = np.concatenate(alone[m * size : (m + 1) * size])
        assert np.array_equal(key_index(KeyRuns(*rows), size * M), together)


def test_unsupported_calls_with_groups_are_refused():
    layout = (4, 2, 2)
    cp = context("2x4", "p2p", layout)
    empty = dynamic.pack(Microbatch(layout, ((), (), ())), (), 4)
    batch = place_microbatch(cp, empty, {"x": np.zeros((8, 4, 8, 8))})
    x, mask = batch["x"], batch["mask"]

    def attend(x=x, mask=mask, is_causal=False, **changes):
        here = dataclasses.replace(cp, **changes)
        hcp.dot_product_attention(x, x, x, cp=here, mask=mask, is_causal=is_causal)

    with pytest.raises(ValueError, match=r"placed for .*\(4, 2, 2\)\), but .*\(2, 4, 2\)"):
        attend(groups=(2, 4, 2))
    with pytest.raises(ValueError, match="placed for .*but attention runs in .*groups=None"):
        attend(groups=None)
    for natural in (None, hcp.causal()):
        with pytest.raises(ValueError, match="placed for no layout, .*place_microbatch"):
            attend(mask=natural)
    with pytest.raises(ValueError, match="has placed cannot be joined"):
        attend(is_causal=True)
    with pytest.raises(ValueError, match=r"must be \[dp=1, a multiple of 8, "):
        attend(x=jnp.concatenate([x, x]))
    with pytest.raises(NotImplementedError, match="groups of one size that divides the 8 heads"):
        attend(comm_type="a2a")
