"""The gradients of the Mosaic kernels, interpreted, against the reference in float64.

JAX's interpreter is slow: each case is to have as many of a kernel's ways in it as it can.
tests/kernels/test_mosaic.py holds the gradients to many more on a GPU.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hcp_jax.sequence.mask as masks
from hcp_jax.kernels import core, reference, tiles
from hcp_jax.sequence.layout import KeyRuns
from hcp_jax.sequence.mask import Intervals
from tests.kernels import test_triton
from tests.kernels.runs import single_run
from tests.kernels.test_mosaic import RUNS, Case, any_intervals, needs_interpreter


@functools.cache
def _grads(case: test_triton.Case):
    return jax.jit(functools.partial(core.attend_grads, case.spec(True)))


def check(case: test_triton.Case, intervals: Intervals, runs: KeyRuns):
    """dq, dk and dv are the reference's; those are returned."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    arrays = case.arrays()
    with jax.enable_x64(True):
        *exact, dout = (np.asarray(x, np.float64) for x in arrays)
        out, lse = reference.forward(case.spec(True), *exact, intervals, runs)
        delta = jnp.sum(dout * out, axis=-1)
        grads = reference.backward(case.spec(True), *exact, intervals, runs, dout, lse, delta)
        expected = [np.asarray(x) for x in grads]
        lse, delta = (np.asarray(x, np.float32) for x in (lse, delta))
    got = _grads(case)(*arrays[:3], intervals, runs, arrays[3], lse, delta)
    jax.block_until_ready(got)
    assert not gpu_callbacks.get_races().races_found  # accesses that no barrier orders
    for name, a, b in zip(("dq", "dk", "dv"), got, expected, strict=True):
        assert a.dtype == jnp.float32, name
        assert a.shape == b.shape, name
        # The interpreter's memory is not a number where nobody wrote.
        tolerance = test_triton.TOLERANCE[case.dtype] * max(1, abs(b).max())
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance, err_msg=name)
    return expected


@needs_interpreter
def test_packed_documents_and_grouped_heads():
    """Several rounds of items, lengths that are no multiple of a block, queries that see nothing."""
    ids = np.repeat(np.arange(5), [40, 1, 60, 60, 90])
    mask = masks.causal() & masks.documents(ids, padding_id=2)
    dq, *_ = check(Case(t=251, s=251, n=4, k=2), mask.intervals(251), single_run(251))
    assert not dq[:, 41:101].any()


@needs_interpreter
@pytest.mark.slow
def test_runs_out_of_order_any_intervals_and_a_mask_per_row():
    case = Case(t=140, s=190, n=2, b=2, dtype="float16", cap=2.0, scale=-0.1)
    _, dk, _ = check(case, any_intervals(140, rows=2), RUNS)
    assert not dk[:, 181:].any()


@needs_interpreter
@pytest.mark.slow
@pytest.mark.parametrize("h", [128, 256])
def test_large_heads(h):
    """At 256, dk and dv are kernels of their own."""
    case = Case(t=80, s=140, h=h, hv=h, scale=0.1)
    check(case, masks.causal().intervals(80, 140), single_run(140))


@needs_interpreter
@pytest.mark.slow
def test_nothing_is_seen():
    grads = check(Case(t=130, s=70), masks.lengths(0).intervals(130), single_run(70))
    assert not any(x.any() for x in grads)


def test_a_tile_whose_warpgroups_do_not_hold_64_rows_each_is_refused():
    case = Case(t=128, s=128)
    q, k, v, dout = case.arrays()
    mask, stats = masks.causal().intervals(128), [jnp.zeros((1, 128, case.n))] * 2
    tile = tiles.Tile(64, 64, 8, 2)
    spec = dataclasses.replace(case.spec(True), tiles=tiles.Tiles(tile, tile, tile))
    with pytest.raises(ValueError, match="8 warps hold 128 rows, the tile's block 64"):
        core.attend_grads(spec, q, k, v, mask, single_run(128), dout, *stats)
