"""Groups: every document on its group is what it is alone on one device."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import hcp_jax as hcp
from hcp_jax import dynamic
from hcp_jax.attention.strategy import compose
from hcp_jax.compiled.hlo import collectives
from hcp_jax.dynamic import Microbatch
from hcp_jax.kernels.key_index import key_index
from hcp_jax.parallel.microbatch import abstract_microbatch, place_microbatch
from hcp_jax.sequence.groupings import source_members
from hcp_jax.sequence.layout import KeyRuns
from hcp_jax.sequence.placement import Groups
from tests import oracle

M = 13  # slots of a device; odd, since nothing needs it even
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
def context(mesh: str, comm_type: str, widest: int, head_groups: int = 1):
    sizes = MESHES[mesh]
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    if mesh == "inner first":  # the reverse of the order in which groups count devices
        types = (AxisType.Explicit, AxisType.Auto, AxisType.Explicit, AxisType.Auto)
        made = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types)
    else:
        made = hcp.make_mesh(**sizes, devices=devices)
    return hcp.ContextParallel(made, comm_type, head_groups=head_groups, widest_group=widest)


def microbatches(grouping, lanes: int, seed: int) -> list[tuple[Microbatch, tuple[int, ...]]]:
    """Return random documents for a grouping: one group full, one empty; then nearly nothing."""
    rng = np.random.default_rng(seed)
    lengths: list[int] = []
    documents = []
    for group, size in enumerate(grouping):
        most = size * M
        empty = group == len(grouping) - 1 and group > 0
        total = most if group == 0 else 0 if empty else int(rng.integers(1, most + 1))
        borders = np.unique([0, *rng.integers(0, total + 1, 3), total])
        documents.append(tuple(range(len(lengths), len(lengths) + borders.size - 1)))
        lengths += np.diff(borders).tolist()
    rest = ((),) * (len(grouping) - 1)
    return [
        (Microbatch(grouping, tuple(documents), lanes), tuple(lengths)),
        (Microbatch(grouping, ((0,), *rest), lanes), (5,)),
    ]


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
    assert max(errors.values()) <= 2e-6, f"{cp.comm_type}, {microbatch.grouping}: {errors}"


# One program for each row; it serves every grouping of the row.
PROGRAMS = [
    ("8 flat", "p2p", 8, HEADS, [(8,), (4, 4), (4, 2, 1, 1), (1,) * 8, (2, 2, 4)]),
    ("8 flat", "p2p", 4, HEADS, [(4, 4), (2, 2, 2, 1, 1), (1, 1, 2, 4)]),
    ("dp2 2x2", "p2p", 8, HEADS, [(8,), (4, 2, 2)]),
    ("dp2 2x2", "p2p", 1, HEADS, [(1,) * 8]),
    ("tp2 2x2", "p2p", 4, HEADS, [(4,), (2, 1, 1)]),
    ("3x2 of 6", "p2p", 6, HEADS, [(6,), (2, 2, 2), (2, 1, 1, 2)]),
    ("inner first", "p2p", 4, HEADS, [(4, 2, 1, 1), (4, 4)]),
    ("2x4", "a2a+p2p", 8, HEADS, [(8,), (4, 4)]),
    ("2x4", "a2a+p2p", 4, HEADS, [(4, 4)]),
    ("2x4", "a2a+p2p", 8, (2, 1, 8, 8), [(8,), (4, 2, 2)]),  # lanes of 2: as many as heads
    ("2x4", "a2a+p2p", 2, HEADS, [(2,) * 4]),
    ("dp2 2x2", "a2a+p2p", 8, HEADS, [(8,), (4, 2, 2), (2,) * 4]),
    ("tp2 2x2", "a2a+p2p", 4, HEADS, [(4,), (2, 2)]),
    ("3x2 of 6", "a2a+p2p", 6, HEADS, [(6,), (2, 2, 2)]),
    ("inner first", "a2a+p2p", 8, HEADS, [(4, 2, 2)]),
    ("dp2 2x2", "a2a", 4, HEADS, [(4, 4)]),
    ("8 flat", "all_gather", 8, HEADS, [(8,), (4, 2, 1, 1)]),
    ("dp2 2x2", "all_gather", 4, HEADS, [(4, 4), (2, 1, 1, 4)]),
    ("2x4", "a2a+all_gather", 8, HEADS, [(8,), (4, 4)]),
    ("dp2 2x2", "a2a+all_gather", 4, HEADS, [(4, 2, 2)]),
]


@pytest.mark.parametrize(("mesh", "comm_type", "widest", "heads", "groupings"), PROGRAMS)
def test_a_document_in_its_group_is_what_it_is_alone(mesh, comm_type, widest, heads, groupings):
    cp = context(mesh, comm_type, widest)
    before = run._cache_size()
    whole = compose(cp, heads[0] // cp.axis_size(cp.tp)).lanes.size
    for seed, grouping in enumerate(groupings):
        lanes = math.gcd(whole, *grouping)
        for microbatch, lengths in microbatches(grouping, lanes, seed):
            assert_exact(cp, microbatch, lengths, heads=heads)
    assert run._cache_size() == before + 1  # one program for all of them


def test_soft_cap_sinks_window_and_head_groups_go_with_groups():
    cp = context("2x4", "a2a+p2p", 8, head_groups=2)
    for microbatch, lengths in microbatches((4, 4), 4, seed=3):
        more = {"soft_cap": 3.0, "sinks": True, "window": 5}
        assert_exact(cp, microbatch, lengths, heads=(8, 8, 8, 8), **more)


@pytest.mark.slow
@pytest.mark.parametrize(("comm_type", "lanes"), [("p2p", 1), ("a2a+p2p", 4)])
def test_the_triton_kernels_compute_groups_too(comm_type, lanes):
    cp = context("2x4", comm_type, 8)
    for microbatch, lengths in microbatches((4, 4), lanes, seed=4):
        assert_exact(cp, microbatch, lengths, heads=(4, 2, 16, 16), impl="triton")


@pytest.mark.parametrize("comm_type", ["p2p", "a2a+p2p"])
def test_groups_without_documents_give_zeros(comm_type):
    cp, lanes = context("2x4", comm_type, 8), {"p2p": 1, "a2a+p2p": 4}[comm_type]
    assert_exact(cp, Microbatch((4, 4), ((), (0,)), lanes), (17,))
    assert_exact(cp, Microbatch((4, 4), ((), ()), lanes), (17,))


@functools.cache
def moved(mesh, widest, comm_type, backward=False):
    """Return the collectives of float32 attention with groups, or of its gradient."""
    cp = context(mesh, comm_type, widest)
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


@pytest.mark.parametrize(
    ("mesh", "comm_type", "widest"),
    [("8 flat", "p2p", 4), ("2x4", "p2p", 8), ("2x4", "p2p", 1), ("dp2 2x2", "a2a+p2p", 8)],
)
def test_a_program_sends_what_its_traffic_lists(mesh, comm_type, widest):
    cp = context(mesh, comm_type, widest)
    listed = compose(cp, 8).traffic(tokens=M, heads=8, kv_heads=2, head_size=8, item_bytes=4)
    for direction in ("forward", "backward"):
        found = moved(mesh, widest, comm_type, direction == "backward")
        wanted = [t for t in listed if t.direction == direction]
        assert sum(c.count * c.bytes for c in found) == sum(t.count * t.bytes for t in wanted)
        assert {c.kind for c in found} == {t.kind for t in wanted}
        for c in found:  # nothing leaves its block of the widest group
            assert all(len({d // widest for d in members}) == 1 for members in c.groups)


def test_hops_inside_a_host_come_before_those_that_leave_it():
    across = [
        any(len({d // 4 for d in members}) > 1 for members in c.groups)
        for c in moved("2x4", 8, "p2p")
    ]
    # Of seven hops of K and V, one takes those of the other host; the others stay inside.
    assert (sum(across), len(across)) == (2, 14)


@pytest.mark.parametrize("sources", [2, 3, 6])
def test_the_runs_of_a_source_are_its_devices_one_after_the_other(sources):
    packed = dynamic.pack(Microbatch((6,), ((0, 1, 2),)), (30, 11, 20), M)
    alone = [np.asarray(key_index(KeyRuns(*rows), M)) for rows in zip(*packed.runs, strict=True)]
    runs, size = Groups(6, 6).source_runs(packed.runs, M, sources, 0, np), 6 // sources
    for m, rows in enumerate(zip(*runs, strict=True)):
        together = np.concatenate(alone[m * size : (m + 1) * size])
        assert np.array_equal(key_index(KeyRuns(*rows), size * M), together)


@pytest.mark.parametrize("radices", [(2, 2, 2), (3, 2), (2, 3, 2), (5,), ()])
def test_a_walk_visits_every_member_once_and_small_blocks_first(radices):
    size = int(np.prod(radices, dtype=int))
    sources = np.array([source_members(radices, hop) for hop in range(size)])
    assert np.array_equal(np.sort(sources, axis=0), np.tile(np.arange(size)[:, None], size))
    block = 1
    for radix in (1, *radices):
        block *= radix
        assert np.array_equal(
            sources[:block] // block, np.tile(np.arange(size) // block, (block, 1))
        )


def test_unsupported_calls_with_groups_are_refused():
    cp = context("2x4", "p2p", 4)
    empty = dynamic.pack(Microbatch((4, 2, 2), ((), (), ())), (), 4)
    batch = place_microbatch(cp, empty, {"x": np.zeros((8, 4, 8, 8))})
    x, mask = batch["x"], batch["mask"]

    def attend(x=x, mask=mask, is_causal=False, **changes):
        here = dataclasses.replace(cp, **changes)
        hcp.dot_product_attention(x, x, x, cp=here, mask=mask, is_causal=is_causal)

    with pytest.raises(ValueError, match="placed for groups of up to 4 .*but .* groups of up to 8"):
        attend(widest_group=8)
    with pytest.raises(ValueError, match="placed for .*but attention runs in a zigzag layout"):
        attend(widest_group=None)
    for natural in (None, hcp.causal()):
        with pytest.raises(ValueError, match="in natural order, .*place_microbatch"):
            attend(mask=natural)
    with pytest.raises(ValueError, match="has placed cannot be joined"):
        attend(is_causal=True)
    with pytest.raises(ValueError, match=r"must be \[dp=1, a multiple of 8, "):
        attend(x=jnp.concatenate([x, x]))
    odd = jnp.zeros((1, 32, 6, 8))
    with pytest.raises(NotImplementedError, match="comm_type='a2a' keeps a document on devices"):
        hcp.dot_product_attention(
            *(odd, odd, odd), cp=dataclasses.replace(cp, comm_type="a2a"), mask=mask
        )
