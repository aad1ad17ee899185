"""The gradients of the Mosaic kernels, against the reference in float64, in JAX's interpreter.

The interpreter is slow: each case is to have as many of a kernel's ways in it as it can.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hcp_jax.mask as masks
from hcp_jax import compat
from hcp_jax.kernels import core, mosaic_backward, reference
from hcp_jax.layout import KeyRuns, single_run
from hcp_jax.mask import Intervals

TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3}

INTERPRETED = pytest.param(
    True,
    id="interpreted",
    marks=pytest.mark.skipif(
        not compat.HAS_MOSAIC_INTERPRETER, reason="needs the interpreter of jax 0.11 or later"
    ),
)
COMPILED = pytest.param(False, id="compiled", marks=pytest.mark.gpu)
EITHER = pytest.mark.parametrize("interpret", [INTERPRETED, COMPILED])


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and numerics of a call."""

    t: int = 150
    s: int = 150
    n: int = 1
    k: int = 1
    h: int = 64
    b: int = 1
    dtype: str = "bfloat16"
    scale: float = 0.125
    cap: float | None = None

    def arrays(self):
        rng = np.random.default_rng(0)
        of_queries, of_keys = (self.b, self.t, self.n, self.h), (self.b, self.s, self.k, self.h)
        shapes = [of_queries, of_keys, of_keys, of_queries]
        return [jnp.asarray(rng.standard_normal(shape), self.dtype) for shape in shapes]


def check(case: Case, intervals: Intervals, runs: KeyRuns, interpret: bool):
    """dq, dk and dv are the reference's in float64, and the same call gives the same bits."""
    q, k, v, dout = arrays = case.arrays()
    kind = "cpu" if interpret else jax.devices()[0].device_kind
    spec = core.CoreSpec("mosaic", case.scale, case.cap, kind, interpret)
    with jax.enable_x64(True):
        exact = [jnp.asarray(np.asarray(x, np.float64)) for x in arrays]
        out, lse = reference.forward(spec, *exact[:3], intervals, runs)
        delta = jnp.sum(exact[3] * out, axis=-1)
        expected = reference.backward(spec, *exact[:3], intervals, runs, exact[3], lse, delta)
        expected = [np.asarray(x) for x in expected]
        lse, delta = np.asarray(lse, np.float32), np.asarray(delta, np.float32)
    grads = jax.jit(functools.partial(mosaic_backward.backward, spec))
    call = functools.partial(grads, q, k, v, intervals, runs, dout, lse, delta)
    got = call()
    for name, a, b in zip(("dq", "dk", "dv"), got, expected, strict=True):
        assert a.dtype == jnp.float32, name
        assert a.shape == b.shape, name
        # Not a number, where nobody wrote, is caught as well.
        tolerance = TOLERANCE[case.dtype] * max(1, abs(b).max())
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance, err_msg=name)
    if not interpret:
        for a, b in zip(got, call(), strict=True):
            np.testing.assert_array_equal(a, b)
    return expected


@EITHER
def test_packed_documents_and_grouped_heads(interpret):
    """Several blocks of both sides, neither length a multiple of them; some queries see nothing."""
    documents = np.repeat(np.arange(6), [40, 1, 90, 60, 14, 65])
    mask = masks.causal() & masks.documents(documents, padding_id=3)
    case = Case(t=270, s=270, n=4, k=2)
    dq, *_ = check(case, mask.intervals(270), single_run(270), interpret)
    assert not dq[:, 131:191].any()


@EITHER
@pytest.mark.slow
def test_keys_in_runs_and_a_mask_per_row(interpret):
    """Runs out of order, one empty, the last one cut off by padding; float16."""
    runs = KeyRuns(np.array([150, 0, 7, 40], np.int32), np.array([0, 70, 70, 75, 180], np.int32))
    rows = [masks.causal().intervals(256), masks.sliding_window(20).intervals(256)]
    intervals = Intervals(*(np.concatenate(x) for x in zip(*rows, strict=True)))
    case = Case(t=256, s=200, n=2, b=2, dtype="float16")
    _, dk, dv = check(case, intervals, runs, interpret)
    assert not dk[:, 180:].any()
    assert not dv[:, 180:].any()


@EITHER
@pytest.mark.slow
def test_soft_cap_and_negative_scale(interpret):
    case = Case(scale=-0.2, cap=3.0)
    check(case, masks.sliding_window(70).intervals(150), single_run(150), interpret)


@EITHER
@pytest.mark.slow
@pytest.mark.parametrize("h", [128, 256])
def test_large_heads(h, interpret):
    """At 256, dk and dv are kernels of their own."""
    check(Case(h=h, n=2), masks.causal().intervals(150), single_run(150), interpret)


@EITHER
@pytest.mark.slow
def test_nothing_is_seen(interpret):
    case = Case(t=130, s=70)
    expected = check(case, masks.lengths(0).intervals(130), single_run(70), interpret)
    assert not any(x.any() for x in expected)
