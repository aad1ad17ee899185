"""The Triton kernels against the reference in float64: interpreted anywhere, compiled on a GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hcp_jax.sequence.mask as masks
from hcp_jax.kernels import core, reference, triton, triton_kernels
from hcp_jax.sequence.layout import KeyRuns
from hcp_jax.sequence.mask import Intervals
from tests import oracle
from tests.kernels.runs import single_run

TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2, "float16": 2e-3}

INTERPRETED = pytest.param(True, id="interpreted")
COMPILED = pytest.param(False, id="compiled", marks=pytest.mark.gpu)
EITHER = pytest.mark.parametrize("interpret", [INTERPRETED, COMPILED])


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and numerics of a call; those of one case share compiled functions."""

    t: int = 80
    s: int = 80
    n: int = 2
    k: int = 1
    h: int = 16
    hv: int = 16
    b: int = 1
    dtype: str = "float32"
    scale: float = 0.25
    cap: float | None = None
    implementation: str = "triton"

    def spec(self, interpret: bool) -> core.CoreSpec:
        kind = "cpu" if interpret else jax.devices()[0].device_kind
        return core.CoreSpec(self.implementation, self.scale, self.cap, kind, interpret)

    def arrays(self, seed: int = 0):
        rng = np.random.default_rng(seed)
        shapes = [
            (self.b, self.t, self.n, self.h),
            (self.b, self.s, self.k, self.h),
            (self.b, self.s, self.k, self.hv),
            (self.b, self.t, self.n, self.hv),
        ]
        return [jnp.asarray(rng.standard_normal(shape), self.dtype) for shape in shapes]


def _call(spec: core.CoreSpec, q, k, v, dout, intervals, runs, lse, delta):
    partial = core.attend(spec, q, k, v, intervals, runs)
    return *partial, *core.attend_grads(spec, q, k, v, intervals, runs, dout, lse, delta)


@functools.cache
def _kernels(case: Case, interpret: bool):
    return jax.jit(functools.partial(_call, case.spec(interpret)))


@functools.cache
def _oracle(case: Case):
    spec = case.spec(True)

    def run(q, k, v, dout, intervals, runs):
        out, lse = reference.forward(spec, q, k, v, intervals, runs)
        delta = jnp.sum(dout * out, axis=-1)
        grads = reference.backward(spec, q, k, v, intervals, runs, dout, lse, delta)
        return out, lse, *grads, delta

    return jax.jit(run)


def check(case: Case, intervals: Intervals, runs: KeyRuns, interpret: bool, seed: int = 0):
    """Outputs and gradients are those of the reference in float64, and every element is written."""
    arrays = case.arrays(seed)
    with jax.enable_x64(True):
        exact = (np.asarray(x, np.float64) for x in arrays)
        *expected, delta = map(np.asarray, _oracle(case)(*exact, intervals, runs))
    lse, delta = (jnp.asarray(x, jnp.float32) for x in (expected[1], delta))
    if not interpret:
        _poison(expected)
    got = _kernels(case, interpret)(*arrays, intervals, runs, lse, delta)
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, expected, strict=True):
        assert a.dtype == jnp.float32, name
        assert a.shape == b.shape, name
        a, sees = np.asarray(a), np.isfinite(b)
        np.testing.assert_array_equal(a[~sees], b[~sees], err_msg=name)
        tolerance = (2e-6 if name == "lse" else TOLERANCE[case.dtype]) * max(
            1, abs(b[sees]).max(initial=0)
        )
        np.testing.assert_allclose(a[sees], b[sees], rtol=0, atol=tolerance, err_msg=name)


def _poison(outputs):
    """Leave memory of these sizes full of NaN, which outputs are likely to get next."""
    jax.block_until_ready([jnp.full(x.shape, jnp.nan, jnp.float32) for x in outputs])


DOCUMENTS = np.repeat(np.arange(7), [9, 1, 23, 16, 4, 14, 13])

MASKS = {
    "causal": masks.causal(),
    "bidirectional": masks.bidirectional(),
    "documents": masks.documents(DOCUMENTS),
    "packed": masks.causal() & masks.documents(DOCUMENTS),
    "padded": masks.causal() & masks.documents(DOCUMENTS, padding_id=3),
    "window": masks.sliding_window(11),
    "prefix": masks.prefix_lm(37),
    "chunked": masks.chunked_local(24),
    "chunked causal": masks.chunked_local(24) & masks.causal(),
    "lengths": masks.lengths(49),
    "mixture": masks.causal() & masks.documents(DOCUMENTS) & masks.sliding_window(6),
    "nothing": masks.lengths(0),
}


@EITHER
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_every_mask_gives_the_references_values_and_gradients(mask, interpret):
    check(Case(), mask.intervals(80), single_run(80), interpret)


SHAPES = {
    "more keys than queries, MHA": Case(t=37, s=91, n=3, k=3),
    "more queries than keys, GQA": Case(t=91, s=37, n=6, k=2),
    "one query, MQA": Case(t=1, s=75, n=5, k=1),
    "one key, negative scale": Case(t=33, s=1, scale=-0.3),
    "a mask for each row, soft cap": Case(b=2, cap=2.0),
    "no scale": Case(scale=0.0),
    "h64, GQA, bfloat16": Case(h=64, hv=64, n=4, k=2, dtype="bfloat16", scale=64**-0.5),
    "h16 v48, float16, soft cap": Case(h=16, hv=48, dtype="float16", cap=5.0),
    "h80": Case(h=80, hv=80, scale=80**-0.5),
    "h96, float16": Case(h=96, hv=96, dtype="float16", scale=96**-0.5),
    "h128, bfloat16": Case(h=128, hv=128, dtype="bfloat16", scale=128**-0.5),
    "h192 v128": Case(h=192, hv=128, scale=192**-0.5),
    "h256, bfloat16": Case(h=256, hv=256, dtype="bfloat16", scale=256**-0.5),
}


@EITHER
@pytest.mark.slow
@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES.keys())
def test_every_shape_gives_the_references_values_and_gradients(case, interpret):
    rng = np.random.default_rng(1)
    rows = case.b if case.b > 1 else 1
    ids = np.sort(rng.integers(0, 4, (rows, case.t)), axis=1)
    mask = masks.documents(ids, padding_id=2)
    check(case, mask.intervals(case.t, case.s), single_run(case.s), interpret)


# A stream of 160 in four chunks on two devices (zigzag): each holds 80 keys in two runs.
HOPS = {"early": (0, 120), "late": (40, 80)}


@EITHER
@pytest.mark.parametrize("queries", HOPS.values(), ids=HOPS.keys())
@pytest.mark.parametrize("keys", HOPS.values(), ids=HOPS.keys())
@pytest.mark.parametrize("name", ["causal", "packed", "window"])
def test_a_hop_of_a_zigzag_ring_sees_its_keys_and_no_others(name, queries, keys, interpret):
    mask = {
        "causal": masks.causal(),
        "packed": masks.causal() & masks.documents(np.repeat(np.arange(4), [30, 55, 50, 25])),
        "window": masks.sliding_window(45),
    }[name]
    whole = mask.intervals(160)
    index = np.concatenate([np.arange(start, start + 40) for start in queries])
    intervals = Intervals(whole.start[:, index], whole.end[:, index])
    runs = KeyRuns(np.asarray(keys, np.int32), np.asarray([0, 40, 80], np.int32))
    check(Case(), intervals, runs, interpret)


@EITHER
def test_runs_shorter_than_a_block_and_padding_after_them(interpret):
    runs = KeyRuns(np.asarray([900, 7, 450, 30], np.int32), np.asarray([0, 5, 5, 12, 71], np.int32))
    rng = np.random.default_rng(2)
    start, end = np.sort(rng.integers(0, 910, (2, 1, 80)).astype(np.int32), axis=0)
    check(Case(), Intervals(start, end), runs, interpret)


@st.composite
def _intervals_and_runs(draw):
    lengths = draw(st.lists(st.integers(0, 40), min_size=3, max_size=3))
    offsets = np.minimum(np.cumsum([0, *lengths]), 80).astype(np.int32)
    gaps = draw(st.lists(st.integers(0, 50), min_size=3, max_size=3))
    order = draw(st.permutations(range(3)))
    starts, at = np.zeros(3, np.int32), 0
    for gap, run in zip(gaps, order, strict=True):
        starts[run] = at + gap
        at = starts[run] + offsets[run + 1] - offsets[run]
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    bounds = rng.integers(0, at + 10, (2, 1, 80)).astype(np.int32)
    match draw(st.sampled_from(["any", "sorted", "monotone", "wide"])):
        case "sorted":  # no empty ones, in any order
            bounds = np.sort(bounds, axis=0)
        case "monotone":
            bounds = np.sort(np.sort(bounds, axis=0), axis=2)
        case "wide":  # whole blocks without a mask, some queries empty
            bounds = np.where(rng.random((1, 1, 80)) < 0.8, [[[0]], [[at]]], bounds)
    return Intervals(*bounds.astype(np.int32)), KeyRuns(starts, offsets)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(drawn=_intervals_and_runs(), seed=st.integers(0, 100))
def test_any_intervals_and_any_runs(drawn, seed):
    check(Case(), *drawn, interpret=True, seed=seed)


def test_memory_that_the_interpreter_does_not_write_is_nan(monkeypatch):
    """So the comparisons above would see an element that a kernel forgets."""
    monkeypatch.setattr(triton_kernels, "_store", lambda *_: None)
    q, k, v, _ = Case().arrays()
    intervals = masks.causal().intervals(80)
    out, lse = triton.forward(Case().spec(True), q, k, v, intervals, single_run(80))
    assert np.isnan(out).all()
    assert np.isfinite(lse).all()


def test_values_that_no_query_sees_do_not_matter():
    """Not even where they share a block with values that are seen."""
    case = Case()
    q, k, v, dout = case.arrays()
    intervals = masks.lengths(50).intervals(80)
    stats = jnp.zeros((1, 80, 2))
    run = _kernels(case, True)
    expected = run(q, k, v, dout, intervals, single_run(80), stats, stats)
    k, v = k.at[:, 50:].set(1e4), v.at[:, 50:].set(-1e4)
    got = run(q, k, v, dout, intervals, single_run(80), stats, stats)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_it_works_inside_shard_map():
    case = Case(b=2)
    intervals, runs = masks.causal().intervals(80), single_run(80)
    mesh = jax.make_mesh((2,), ("dp",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.P("dp")

    def run(q, k, v, dout, lse, delta):
        return _call(case.spec(True), q, k, v, dout, intervals, runs, lse, delta)

    arrays = (*case.arrays(), jnp.ones((2, 80, 2)), jnp.ones((2, 80, 2)))
    sharded = jax.shard_map(run, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    one_row = jax.jit(run)
    expected = [one_row(*(x[row : row + 1] for x in arrays)) for row in range(2)]
    got = jax.jit(sharded)(*arrays)
    for a, *b in zip(got, *expected, strict=True):
        # The interpreter's programs are XLA's, which rounds differently around a shard_map.
        assert oracle.relative(a, np.concatenate(b)) <= 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_same_call_gives_the_same_bits(dtype):
    """No atomics, no order that may change.

    Races and stray accesses are for compute-sanitizer to find, on a GPU machine:

        HCP_TEST_PLATFORM=gpu XLA_PYTHON_CLIENT_ALLOCATOR=platform \\
            compute-sanitizer --tool memcheck python -m pytest tests/kernels/test_triton.py \\
            -n 0 -m gpu -k "mask or zigzag"

    and the same with `--tool racecheck`. The allocator named gives every array an allocation of its
    own, without which memcheck cannot tell one array from its neighbour.
    """
    case = Case(t=1000, s=1000, n=8, k=2, h=128, hv=128, dtype=dtype)
    q, k, v, dout = case.arrays()
    intervals = (masks.causal() & masks.sliding_window(700)).intervals(1000)
    lse, delta = jnp.ones((1, 1000, 8)) * 4, jnp.ones((1, 1000, 8))
    run = _kernels(case, False)
    first = run(q, k, v, dout, intervals, single_run(1000), lse, delta)
    for _ in range(5):
        again = run(q, k, v, dout, intervals, single_run(1000), lse, delta)
        for a, b in zip(first, again, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "float64"}, "bfloat16, float16, float32, not float64"),
        ({"head_size": 72}, "head sizes that are multiples of 16 up to 256, not 72"),
        ({"v_head_size": 512}, "v head sizes that are multiples of 16 up to 256, not 512"),
        ({"platform": "tpu"}, "NVIDIA GPUs and, interpreted, on CPUs, not on tpu"),
    ],
)
def test_unsupported_calls_say_why(change, reason):
    problem = core.Problem("bfloat16", 8, 2, 128, 128, "gpu", "NVIDIA H200")
    assert triton.unsupported(problem) is None
    with pytest.raises(NotImplementedError, match=reason):
        core.resolve("triton", dataclasses.replace(problem, **change))
