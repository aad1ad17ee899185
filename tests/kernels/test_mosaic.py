"""The Mosaic kernels: what they say they can do, the forward interpreted, all of it on a GPU.

JAX's interpreter of Mosaic GPU kernels is slow: a case of it is to have as many of the kernel's ways
in it as it can. On a Hopper GPU the kernels are held to what the Triton kernels are held to.
"""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hcp_jax.sequence.mask as masks
from hcp_jax import compat
from hcp_jax.kernels import core, mosaic, mosaic_blocks, reference, tiles
from hcp_jax.kernels.block_map import key_blocks, map_over_keys, query_blocks
from hcp_jax.kernels.mosaic_call import Masks, Visits, longest_first
from hcp_jax.sequence.layout import KeyRuns
from hcp_jax.sequence.mask import Intervals
from tests.kernels import test_triton
from tests.kernels.runs import single_run

Case = functools.partial(
    test_triton.Case, h=64, hv=64, dtype="bfloat16", scale=0.125, implementation="mosaic"
)
needs_interpreter = pytest.mark.skipif(
    not compat.HAS_MOSAIC_INTERPRETER, reason="needs the interpreter of jax 0.11 or later"
)

RUNS = KeyRuns(
    np.asarray([900, 7, 7, 450, 30], np.int32), np.asarray([0, 55, 55, 67, 102, 181], np.int32)
)


def any_intervals(t: int, rows: int = 1, seed: int = 0) -> Intervals:
    """Over the keys of `RUNS`, some empty."""
    return Intervals(*np.random.default_rng(seed).integers(0, 960, (2, rows, t)).astype(np.int32))


def attend(case: test_triton.Case, intervals: Intervals, runs: KeyRuns):
    """The forward alone, interpreted."""
    q, k, v, _ = case.arrays()
    return core.attend(case.spec(True), q, k, v, intervals, runs)


def check_forward(case: test_triton.Case, intervals: Intervals, runs: KeyRuns):
    q, k, v, _ = case.arrays()
    exact = (x.astype(jnp.float32) for x in (q, k, v))
    expected = reference.forward(case.spec(True), *exact, intervals, runs)
    got = attend(case, intervals, runs)
    for name, a, b in zip(("out", "lse"), got, expected, strict=True):
        assert a.dtype == jnp.float32, name
        assert a.shape == b.shape, name
        a, sees = np.asarray(a), np.isfinite(b)
        np.testing.assert_array_equal(a[~sees], b[~sees], err_msg=name)
        tolerance = 4e-6 if name == "lse" else test_triton.TOLERANCE[case.dtype]
        np.testing.assert_allclose(a[sees], b[sees], rtol=0, atol=tolerance, err_msg=name)


@needs_interpreter
def test_packed_documents_grouped_heads_and_a_mask_per_row():
    """Several rounds of items, lengths that are no multiple of a block, queries that see nothing."""
    ids = np.repeat([[0, 1, 2, 3], [0, 0, 4, 3]], [90, 40, 61, 60], axis=1)
    intervals = (masks.causal() & masks.documents(ids, padding_id=3)).intervals(251)
    check_forward(Case(t=251, s=251, n=4, k=2, b=2), intervals, single_run(251))


@needs_interpreter
def test_runs_out_of_order_and_any_intervals():
    case = Case(t=140, s=190, dtype="float16", cap=2.0)
    check_forward(case, any_intervals(140), RUNS)


@needs_interpreter
@pytest.mark.parametrize(
    ("h", "scale", "mask"), [(128, 0.1, masks.bidirectional()), (256, -0.1, masks.causal())]
)
def test_large_heads(h, scale, mask):
    check_forward(Case(h=h, hv=h, scale=scale), mask.intervals(80), single_run(80))


@needs_interpreter
def test_queries_that_see_nothing():
    out, lse = attend(Case(t=130, s=70), masks.lengths(0).intervals(130), single_run(70))
    assert not np.asarray(out).any()
    assert (np.asarray(lse) == -np.inf).all()


@needs_interpreter
def test_a_race_is_noticed(monkeypatch, caplog):
    """So there is none in the tests above: here values are let go of before they are used."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, interpret_pallas_call

    take, release = mosaic_blocks.Queue.take, mosaic_blocks.Queue.release

    def take_and_release(queue, step):
        slot = take(queue, step)
        release(queue, step)
        return slot

    monkeypatch.setattr(mosaic_blocks.Queue, "take", take_and_release)
    monkeypatch.setattr(mosaic_blocks.Queue, "release", lambda *_: None)
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # jax 0.12 raises, 0.11 takes a note
        jax.block_until_ready(
            attend(Case(t=200, s=300), masks.causal().intervals(200, 300), single_run(300))
        )
    assert gpu_callbacks.get_races().races_found or "RACE DETECTED" in caplog.text
    interpret_pallas_call.reset_gpu_interpret_mode_state()


@needs_interpreter
def test_several_cpu_devices_get_an_error_that_says_what_to_use():
    mesh = jax.make_mesh((2,), ("dp",), axis_types=(jax.sharding.AxisType.Auto,))
    case, rows = Case(b=2), jax.P("dp")
    run = functools.partial(
        mosaic.forward,
        case.spec(True),
        intervals=masks.causal().intervals(80),
        runs=single_run(80),
    )
    sharded = jax.shard_map(run, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    with pytest.raises(NotImplementedError, match="one CPU device at a time.*'blockwise'"):
        jax.eval_shape(sharded, *case.arrays()[:3])


def test_a_block_visits_its_span_once_and_masks_its_ends():
    """Blocks with the longest span come first."""
    runs, intervals = single_run(900), masks.sliding_window(500).intervals(900)
    queries, keys = query_blocks(intervals, 64), key_blocks(runs, 900, 64)
    block_map = map_over_keys(queries, keys, True)
    work = longest_first(block_map.spans)
    refs = Masks(None, None, None, block_map.order, work.reshape(1, -1))
    lengths = []
    for rank in range(work.shape[1]):
        visits = Visits.load(refs, 0, rank)
        first, full_first, full_last, last = np.asarray(block_map.spans[0, visits.block])
        indices = visits.at(jnp.arange(visits.steps))[0].tolist()
        assert sorted(indices) == list(range(first, last))
        assert indices[: int(visits.full)] == list(range(full_first, full_last))
        lengths.append(len(indices))
    assert lengths == sorted(lengths, reverse=True)
    assert sorted(np.asarray(work[0, :, 0])) == list(range(work.shape[1]))


def test_the_parts_of_a_block_are_all_its_steps_in_order():
    """Of all heads that pass, those that need no mask first, whatever part they fall into."""
    mask = masks.sliding_window(500).intervals(900)
    block_map = map_over_keys(query_blocks(mask, 64), key_blocks(single_run(900), 900, 64), True)
    refs = Masks(None, None, None, block_map.order, longest_first(block_map.spans).reshape(1, -1))
    whole = Visits.load(refs, 0, 2, heads=3)
    expected = np.stack(whole.at(jnp.arange(whole.steps)), axis=1)
    assert len({*map(tuple, expected.tolist())}) == len(expected) > 3 * 7
    parts = [Visits.load(refs, 0, 2, 3, jnp.int32(i), 7) for i in range(7)]
    got = [np.stack(part.at(jnp.arange(part.steps)), axis=1) for part in parts]
    np.testing.assert_array_equal(np.concatenate(got), expected)
    unmasked = np.concatenate([np.arange(part.steps) < part.full for part in parts])
    np.testing.assert_array_equal(unmasked, np.arange(whole.steps) < whole.full)


def test_implementation_none_does_not_choose_mosaic_yet():
    """Not before it has passed on a GPU."""
    problem = core.Problem("bfloat16", 8, 2, 128, 128, "gpu", "NVIDIA H200")
    assert core.resolve("mosaic", problem) == "mosaic"
    assert core.resolve(None, problem) == "triton"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "float32"}, "bfloat16 and float16, not float32"),
        ({"head_size": 96, "v_head_size": 96}, "head sizes 64, 128, 256, not 96"),
        ({"v_head_size": 64}, r"v heads as large as k's \(128\), not 64"),
        ({"platform": "tpu"}, "Hopper GPUs and, interpreted, on CPUs, not on tpu"),
        ({"device_kind": "NVIDIA A100"}, r"wgmma and TMA \(H100, H200\), which 'NVIDIA A100' has"),
    ],
)
def test_unsupported_calls_say_why(change, reason):
    problem = core.Problem("bfloat16", 8, 2, 128, 128, "gpu", "NVIDIA H200")
    assert mosaic.unsupported(problem) is None
    with pytest.raises(NotImplementedError, match=f"{reason}.*These can: .*blockwise"):
        core.resolve("mosaic", dataclasses.replace(problem, **change))


# On a Hopper GPU. Lengths of several blocks; documents that begin and end within blocks.

DOCUMENTS = np.repeat(np.arange(7), [130, 1, 200, 17, 64, 88, 200])
LENGTH = len(DOCUMENTS)

MASKS = {
    "causal": masks.causal(),
    "bidirectional": masks.bidirectional(),
    "documents": masks.documents(DOCUMENTS),
    "packed": masks.causal() & masks.documents(DOCUMENTS),
    "padded": masks.causal() & masks.documents(DOCUMENTS, padding_id=2),
    "window": masks.sliding_window(150),
    "prefix": masks.prefix_lm(300),
    "chunked": masks.chunked_local(96),
    "chunked causal": masks.chunked_local(224) & masks.causal(),
    "lengths": masks.lengths(450),
    "mixture": masks.causal() & masks.documents(DOCUMENTS) & masks.sliding_window(60),
    "nothing": masks.lengths(0),
}


@pytest.mark.gpu
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_every_mask_gives_the_references_values_and_gradients(mask):
    test_triton.check(
        Case(t=LENGTH, s=LENGTH), mask.intervals(LENGTH), single_run(LENGTH), interpret=False
    )


SHAPES = {
    "more keys than queries, MHA": Case(t=137, s=491, n=3, k=3),
    "more queries than keys, GQA": Case(t=491, s=137, n=6, k=2),
    "one query, MQA": Case(t=1, s=375, n=5),
    "one key, negative scale": Case(t=233, s=1, scale=-0.3),
    "a mask for each row, soft cap": Case(t=300, s=300, b=2, cap=2.0),
    "no scale": Case(t=300, s=300, scale=0.0),
    "h128, GQA": Case(t=700, s=700, h=128, hv=128, n=8, k=2, scale=128**-0.5),
    "h128, float16, soft cap": Case(t=700, s=700, h=128, hv=128, dtype="float16", cap=5.0),
    "h256": Case(t=700, s=700, h=256, hv=256, scale=256**-0.5),
    "h256, float16, GQA": Case(t=300, s=300, h=256, hv=256, n=4, k=2, dtype="float16"),
    "many items": Case(t=2000, s=2000, n=32, k=4, b=2),
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES.keys())
def test_every_shape_gives_the_references_values_and_gradients(case):
    ids = np.sort(np.random.default_rng(1).integers(0, 4, (case.b, case.t)), axis=1)
    mask = masks.documents(ids, padding_id=2)
    test_triton.check(case, mask.intervals(case.t, case.s), single_run(case.s), interpret=False)


@pytest.mark.gpu
@pytest.mark.parametrize("queries", test_triton.HOPS.values(), ids=test_triton.HOPS.keys())
@pytest.mark.parametrize("keys", test_triton.HOPS.values(), ids=test_triton.HOPS.keys())
def test_a_hop_of_a_zigzag_ring_sees_its_keys_and_no_others(queries, keys):
    """A stream of 1280 in four chunks on two devices."""
    whole = (masks.causal() & masks.sliding_window(700)).intervals(1280)
    index = np.concatenate([np.arange(8 * start, 8 * start + 320) for start in queries])
    intervals = Intervals(whole.start[:, index], whole.end[:, index])
    runs = KeyRuns(8 * np.asarray(keys, np.int32), np.asarray([0, 320, 640], np.int32))
    test_triton.check(Case(t=640, s=640), intervals, runs, interpret=False)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(8))
def test_any_intervals_and_runs(seed):
    test_triton.check(
        Case(t=300, s=190, n=4, k=2), any_intervals(300, seed=seed), RUNS, interpret=False
    )


@pytest.mark.gpu
@pytest.mark.parametrize("h", tiles.MOSAIC_HEAD_SIZES)
def test_the_same_call_gives_the_same_bits(h):
    """No atomics, no order that may change. `test_triton` says how to look for races with tools."""
    case = Case(t=3000, s=3000, n=8, k=2, h=h, hv=h)
    q, k, v, dout = case.arrays()
    intervals = (masks.causal() & masks.sliding_window(1700)).intervals(3000)
    lse, delta = jnp.ones((1, 3000, 8)) * 4, jnp.ones((1, 3000, 8))
    run = jax.jit(functools.partial(test_triton._call, case.spec(False)))
    first = run(q, k, v, dout, intervals, single_run(3000), lse, delta)
    for _ in range(20):
        again = run(q, k, v, dout, intervals, single_run(3000), lse, delta)
        for a, b in zip(first, again, strict=True):
            np.testing.assert_array_equal(a, b)
