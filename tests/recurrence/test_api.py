"""Recurrences over devices are those of one token after the other, in float64."""

import zlib
from collections import Counter
from functools import partial

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

import hcp_jax as hcp
from hcp_jax.compiled.hlo import collectives
from hcp_jax.cost import traffic
from hcp_jax.recurrence.api import delta_rule, state_space
from tests.recurrence.sequential import sequential

TOLERANCE = 1e-5
RULES = ("state_space", "delta", "delta_per_channel")
# Log decays: none to speak of, all at once, and everything between within one stream.
DECAYS = {"near 1": (-12, -6), "near 0": (1, 4), "mixed": (-8, 4)}


def context(sizes, layout="zigzag"):
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    return hcp.ContextParallel(hcp.make_mesh(**sizes, devices=devices), "p2p", layout=layout)


def random_positions(rng, rows, length):
    """Positions in documents of random lengths, some of one token; row 0 has no border."""
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    for row in positions[1:]:
        starts = np.flatnonzero(rng.random(length) < rng.choice([0.03, 0.3]))
        for start in starts:
            row[start:] = np.arange(length - start)
    return positions


def problem(rule, *, seed, rows=2, length=45, groups=2, heads=4, key=4, value=3, decays="mixed"):
    """Arrays in the order (q, k, v, beta, log_decay), positions and a cotangent."""
    rng = np.random.default_rng(seed)
    q, k, v, dout = (
        rng.standard_normal((rows, length, *size), np.float32)
        for size in ((groups, key), (groups, key), (heads, value), (heads, value))
    )
    if rule != "state_space":
        k /= np.linalg.norm(k, axis=-1, keepdims=True)
    beta = rng.random((rows, length, heads), np.float32)
    if rule == "state_space":
        beta = np.ones_like(beta)
    shape = (rows, length, heads, *([key] if rule == "delta_per_channel" else []))
    log_decay = -np.exp(rng.uniform(*DECAYS[decays], shape)).astype(np.float32)
    return (q, k, v, beta, log_decay), random_positions(rng, rows, length), dout


def op(rule, arrays, positions, **options):
    q, k, v, beta, log_decay = arrays
    if rule == "state_space":
        return state_space(q, k, v * beta[..., None], log_decay, positions, **options)
    return delta_rule(q, k, v, beta, log_decay, positions, **options)


def on_devices(rule, cp, chunk, arrays, positions, dout):
    """Outputs and gradients in natural order, from arrays in cp's layout."""
    length = dout.shape[1]

    @jax.jit
    def run(arrays, positions, dout):
        out, vjp = jax.vjp(lambda *x: op(rule, x, positions, cp=cp, chunk=chunk), *arrays)
        return out, vjp(dout)

    if cp is None:
        return run(arrays, positions, dout)
    placed = [cp.shard(x) for x in arrays]
    return jax.tree.map(
        lambda x: np.asarray(cp.unshard(x, length=length)),
        run(placed, cp.shard(positions), cp.shard(dout)),
    )


def worst(got, expected):
    """The largest error of any array, relative to the array's largest element."""
    errors = jax.tree.map(lambda a, b: np.abs(a - b).max() / np.abs(b).max(), got, expected)
    return max(jax.tree.leaves(errors))


def check(rule, cp, chunk, **sizes):
    arrays, positions, dout = problem(rule, **sizes)
    out, grads = on_devices(rule, cp, chunk, arrays, positions, dout)
    expected_out, expected = sequential(rule != "state_space", arrays, positions, dout)
    if rule == "state_space":  # beta is not an argument of it
        grads, expected = (g[:3] + g[4:] for g in (tuple(grads), tuple(expected)))
    error = worst((out, tuple(grads)), (expected_out, tuple(expected)))
    print(f"worst relative error {error:.1e}")
    assert error < TOLERANCE, error


# One device; both layouts; numbers of devices that are no power of two; heads that C does not
# divide, so that columns of a head are shared out; runs shorter than a chunk, and much longer.
CASES = [
    ("state_space", None, "zigzag", 16, {}),
    ("state_space", {"cp_outer": 2, "cp_inner": 3}, "zigzag", 4, {"decays": "near 1"}),
    pytest.param(
        "state_space",
        {"cp_outer": 8},
        "contiguous",
        64,
        {"heads": 6, "decays": "near 0"},
        marks=pytest.mark.slow,
    ),
    pytest.param("delta", None, "zigzag", 16, {"decays": "near 1"}, marks=pytest.mark.slow),
    pytest.param("delta", {"cp_inner": 3}, "contiguous", 4, {}, marks=pytest.mark.slow),
    ("delta", {"cp_outer": 4, "cp_inner": 2}, "zigzag", 2, {"decays": "near 0", "length": 65}),
    ("delta_per_channel", {"cp_outer": 2, "dp": 2, "tp": 2}, "zigzag", 8, {}),
    ("delta_per_channel", {"cp_inner": 4}, "zigzag", 16, {"decays": "near 1", "length": 130}),
]


@pytest.mark.parametrize(("rule", "sizes", "layout", "chunk", "other"), CASES)
def test_outputs_and_gradients_are_those_of_one_token_after_the_other(
    rule, sizes, layout, chunk, other
):
    cp = None if sizes is None else context(sizes, layout)
    check(rule, cp, chunk, seed=zlib.crc32(repr((rule, sizes)).encode()), **other)


def moved(rule, layout, length, direction):
    """How often each (kind, bytes that one device puts in) runs."""
    cp = context({"cp_outer": 4, "cp_inner": 2}, layout)
    arrays, positions, dout = (
        jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=cp.sharding(x.ndim)), x
        )
        for x in problem(rule, seed=0, rows=1, length=length, heads=6)
    )

    def forward(arrays, positions):
        return op(rule, arrays, positions, cp=cp, chunk=8)

    if direction == "forward":
        lowered = jax.jit(forward).lower(arrays, positions)
    else:  # the gradient alone: XLA may merge equal moves of the two directions
        _, vjp = jax.eval_shape(lambda x, p: jax.vjp(lambda x: forward(x, p), x), arrays, positions)
        lowered = jax.jit(lambda vjp, dout: vjp(dout)).lower(vjp, dout)
    found = Counter()
    for c in collectives(lowered.compile().as_text()):
        found[c.kind, c.bytes] += c.count
    return found


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    ("rule", "layout"),
    [("delta", "zigzag"), pytest.param("state_space", "contiguous", marks=pytest.mark.slow)],
)
def test_what_moves_is_what_the_list_says_and_does_not_grow_with_tokens(rule, layout, direction):
    found = moved(rule, layout, 128, direction)
    if rule == "delta":
        assert found == moved(rule, layout, 512, direction)
    listed = [
        t
        for t in traffic.state_scan_traffic(
            ("cp_outer", "cp_inner"),
            {"cp_outer": 4, "cp_inner": 2},
            runs=2 if layout == "zigzag" else 1,
            rows=1,
            heads=6,
            key_size=4,
            value_size=3,
            matrix=rule == "delta",
        )
        if t.direction == direction
    ]
    assert {kind for kind, _ in found} == {t.kind for t in listed} == {"all-to-all"}
    assert found.total() == sum(t.arrays * t.count for t in listed)
    assert sum(size * count for (_, size), count in found.items()) == sum(t.bytes for t in listed)


@pytest.mark.parametrize("explicit", [pytest.param(False, marks=pytest.mark.slow), True])
def test_on_a_mesh_of_any_order_under_remat_in_a_scan_over_layers(explicit):
    kinds = (AxisType.Explicit if explicit else AxisType.Auto,) * 3
    mesh = jax.make_mesh((2, 2, 2), ("tp", "cp_inner", "cp_outer"), axis_types=kinds)
    cp = hcp.ContextParallel(mesh, "p2p", dp=None)
    (q, k, v, beta, g), positions, dout = problem("delta", seed=1, value=4)

    def two_layers(cp, q, k, v, beta, g, positions):
        layer = jax.checkpoint(lambda v: delta_rule(q, k, v, beta, g, positions, cp=cp, chunk=8))
        if explicit:  # a result's type says that tp cuts its heads, so a scan could not carry it
            return layer(layer(v))
        return jax.lax.scan(lambda v, _: (layer(v), None), v, None, length=2)[0]

    def loss(cp, arrays, positions, dout):
        return (two_layers(cp, *arrays, positions) * dout).sum()

    arrays = (q, k, v, beta, g)
    expected = jax.jit(jax.grad(partial(loss, None)))(arrays, positions, dout)
    placed = [cp.shard(x) for x in (*arrays, positions, dout)]
    got = jax.jit(jax.grad(partial(loss, cp)))(tuple(placed[:5]), *placed[5:])
    got = tuple(np.asarray(cp.unshard(x, length=v.shape[1])) for x in got)
    assert worst(got, expected) < TOLERANCE


def test_inside_the_caller_s_own_shard_map():
    cp = context({"cp_outer": 2, "cp_inner": 2})
    arrays, positions, dout = problem("state_space", seed=2)
    placed = [cp.shard(x) for x in (*arrays, positions)]

    def local(*x):
        return op("state_space", x[:5], x[5], cp=cp, chunk=8)

    specs = tuple(cp.spec(x.ndim) for x in placed)
    mapped = jax.shard_map(
        local, mesh=cp.mesh, in_specs=specs, out_specs=cp.spec(4), check_vma=False
    )
    out = np.asarray(cp.unshard(jax.jit(mapped)(*placed), length=dout.shape[1]))
    assert worst(out, sequential(False, arrays, positions, dout)[0]) < TOLERANCE


@pytest.mark.slow
def test_work_and_memory_are_linear_in_tokens():
    def loss(arrays, positions):
        return op("delta_per_channel", arrays, positions, chunk=16).sum()

    def counted(length):
        compiled = (
            jax.jit(jax.grad(loss))
            .lower(*problem("delta_per_channel", seed=0, length=length)[:2])
            .compile()
        )
        return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes

    # The smaller one is long enough for what does not grow to be little.
    for short, long in zip(counted(1024), counted(4096), strict=True):
        assert 3.5 * short < long < 4.2 * short


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": np.zeros((2, 8, 2, 3))}, "q and k must have one shape"),
        (
            {"v": np.zeros((2, 8, 3, 4))},
            "v has 3 heads, which must be a multiple of the 2 of q and k",
        ),
        ({"beta": np.zeros((2, 8, 1))}, "beta must have the shape"),
        ({"log_decay": np.zeros((2, 8, 4, 3))}, "log_decay must have the shape"),
        ({"positions": np.zeros((3, 8), int)}, "positions must have the shape"),
        ({"chunk": 24}, "chunk must be a power of two, got 24"),
        ({"chunk": 0}, "chunk must be"),
    ],
)
def test_a_wrong_call_is_refused(change, message):
    arrays = dict(
        zip(
            ("q", "k", "v", "beta", "log_decay", "positions"),
            (np.zeros(s) for s in [(2, 8, 2, 4)] * 2 + [(2, 8, 4, 4)] + [(2, 8, 4)] * 2 + [(1, 8)]),
            strict=True,
        )
    )
    with pytest.raises(ValueError, match=message):
        delta_rule(**(arrays | change))


def test_what_a_context_cannot_do_is_refused():
    ones = np.ones((1, 8, 4, 4), np.float32)
    flat = np.arange(8)[None]
    with pytest.raises(ValueError, match="tp=8 cannot cut 4 heads"):
        state_space(ones, ones, ones, ones[..., 0], flat, cp=context({"tp": 8}))
    cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=8), "p2p", widest_group=4)
    with pytest.raises(ValueError, match=r"give order=mask\.intervals\.end"):
        state_space(ones, ones, ones, ones[..., 0], flat, cp=cp)
    with pytest.raises(ValueError, match=r"8 tokens are not a whole layout over 8 devices"):
        state_space(ones, ones, ones, ones[..., 0], flat, cp=context({"cp_outer": 8}))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_random_problems_on_random_meshes(seed):
    rng = np.random.default_rng(seed)
    sizes = [
        None,
        {"cp_inner": 2},
        {"cp_outer": 3},
        {"cp_outer": 2, "cp_inner": 2},
        {"cp_outer": 2, "cp_inner": 3},
        {"cp_outer": 4, "cp_inner": 2},
        {"cp_outer": 2, "cp_inner": 2, "tp": 2},
    ]
    picked = sizes[rng.integers(len(sizes))]
    layout = str(rng.choice(["zigzag", "contiguous"]))
    groups, share = (int(x) for x in rng.integers(1, 4, 2))
    if picked and "tp" in picked:
        share *= 2
    check(
        RULES[seed % 3],
        None if picked is None else context(picked, layout),
        int(2 ** rng.integers(0, 7)),
        seed=seed,
        length=int(rng.integers(1, 200)),
        groups=groups,
        heads=groups * share,
        key=int(rng.integers(1, 9)),
        value=int(rng.integers(1, 9)),
        decays=list(DECAYS)[rng.integers(3)],
    )
