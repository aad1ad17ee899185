"""The blockwise core against the dense one, block edges and all; dispatch between cores."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hcp_jax as hcp
from hcp_jax.kernels import blockwise
from hcp_jax.kernels.core import CoreSpec, Problem, attend, attend_grads, describe, resolve
from hcp_jax.sequence.layout import KeyRuns
from hcp_jax.sequence.mask import Intervals
from tests.kernels.runs import single_run

B, T, S, N, K, H = 2, 21, 27, 4, 2, 4


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK", 8)


@functools.partial(jax.jit, static_argnums=0)
def both(spec: CoreSpec, q, k, v, intervals, runs, dout):
    partial = attend(spec, q, k, v, intervals, runs)
    delta = jnp.sum(partial.out * dout, -1)
    return partial, attend_grads(spec, q, k, v, intervals, runs, dout, partial.lse, delta)


def inputs(dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = [(B, T, N, H), (B, S, K, H), (B, S, K, H + 2), (B, T, N, H + 2)]
    return [rng.normal(size=shape).astype(dtype) for shape in shapes]


@st.composite
def problems(draw):
    """Any intervals, and any runs: gaps, overlaps of blocks, padding at the end, empty runs."""
    cuts = sorted(draw(st.integers(0, S)) for _ in range(3))
    starts = [draw(st.integers(0, 40)) for _ in range(2)]
    row = st.lists(st.tuples(st.integers(0, 70), st.integers(-2, 30)), min_size=T, max_size=T)
    pairs = np.array(draw(row), np.int32)
    intervals = Intervals(pairs[None, :, 0], pairs[None, :, 0] + pairs[None, :, 1])
    return intervals, KeyRuns(np.array(starts, np.int32), np.array(cuts, np.int32))


@given(problems())
@settings(max_examples=40)
def test_blockwise_computes_what_the_dense_core_does(problem):
    intervals, runs = problem
    q, k, v, dout = inputs()
    got, want = (
        both(CoreSpec(name, 0.4, 2.5), q, k, v, intervals, runs, dout)
        for name in ("blockwise", "reference")
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        sees = np.isfinite(b)
        np.testing.assert_array_equal(np.asarray(a)[~sees], np.asarray(b)[~sees])
        atol = 2e-6 * max(1, np.abs(np.asarray(b)[sees]).max(initial=0))
        np.testing.assert_allclose(np.asarray(a)[sees], np.asarray(b)[sees], rtol=0, atol=atol)


def test_keys_that_no_query_sees_are_not_touched():
    q, k, v, dout = inputs()
    k[:, 16:], v[:, 16:] = np.nan, np.nan  # whole blocks of poison behind what is visible
    intervals = Intervals(np.zeros((1, T), np.int32), np.full((1, T), 10, np.int32))
    partial, grads = both(CoreSpec("blockwise", 1.0), q, k, v, intervals, single_run(S), dout)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((partial, grads)))


def test_partials_are_float32_whatever_comes_in():
    q, k, v, _ = map(jnp.asarray, inputs(jnp.bfloat16))
    for name in ("blockwise", "reference"):
        spec = CoreSpec(name, 1.0)
        partial = attend(spec, q, k, v, hcp.causal().intervals(T, S), single_run(S))
        assert {x.dtype for x in partial} == {jnp.dtype("float32")}


PROBLEM = Problem("float32", N, K, H, H, "cpu", "cpu")


def test_the_core_on_a_cpu_is_blockwise():
    assert resolve(None, PROBLEM) == "blockwise"
    assert resolve("reference", PROBLEM) == "reference"


def test_the_core_is_described_by_the_devices_and_not_by_this_process():
    assert describe("gpu", "NVIDIA H200") == "triton (tiles for H200)"
    assert "'Tesla X' has none of its own" in describe("gpu", "Tesla X")


def test_an_unsupported_implementation_says_why_and_names_alternatives(monkeypatch):
    monkeypatch.setattr(blockwise, "unsupported", lambda problem: "it is tired")
    with pytest.raises(
        NotImplementedError, match=r"'blockwise' cannot do this call: it is tired.*reference"
    ):
        resolve("blockwise", PROBLEM)


def test_an_unknown_implementation_names_the_nearest():
    with pytest.raises(
        ValueError, match="unknown implementation 'referense'.* did you mean 'reference'"
    ):
        resolve("referense", PROBLEM)
