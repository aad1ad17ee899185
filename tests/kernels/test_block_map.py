"""The kernels visit every block pair that a mask shows, and no others."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hcp_jax.sequence.mask as masks
from hcp_jax.kernels.block_map import key_blocks, map_over_keys, map_over_queries, query_blocks
from hcp_jax.sequence.layout import KeyRuns, chunk_order
from hcp_jax.sequence.mask import Intervals
from tests.kernels.runs import single_run


def _visible(intervals: Intervals, runs: KeyRuns, length: int) -> np.ndarray:
    """`[B1, T, S]`, from the definition."""
    index = np.full(length, -1)
    for run, start in enumerate(runs.starts):
        places = np.arange(runs.offsets[run], runs.offsets[run + 1])
        index[places] = start + places - runs.offsets[run]
    start, end = (np.asarray(x)[..., None] for x in intervals)
    return (start <= index) & (index < end) & (index >= 0)


def _maps(intervals, runs, length, block_q, block_k):
    """Both block maps as booleans (visited, visited without a mask), `[B1, Q, K]`."""
    queries = query_blocks(intervals, block_q)
    keys = key_blocks(runs, length, block_k)
    one_run = runs.starts.shape[0] == 1
    over_keys = _pairs(map_over_keys(queries, keys, one_run))
    over_queries = _pairs(map_over_queries(queries, keys))
    return over_keys, tuple(x.swapaxes(1, 2) for x in over_queries)


def _pairs(block_map):
    order, spans = np.asarray(block_map.order), np.asarray(block_map.spans)
    rows, others, _ = spans.shape
    visited = np.zeros((rows, others, order.shape[1]), bool)
    full = np.zeros_like(visited)
    for row in range(rows):
        numbers = order[row % order.shape[0]]
        for other in range(others):
            first, full_first, full_last, last = spans[row, other]
            assert first <= full_first <= full_last <= last
            visited[row, other, numbers[first:last]] = True
            full[row, other, numbers[full_first:full_last]] = True
    return visited, full


def _blocks(intervals, runs, length, block_q, block_k):
    """(some pair visible, all visible but to queries that see nothing at all), `[B1, Q, K]`."""
    visible = _visible(intervals, runs, length)
    rows, t, s = visible.shape
    pad = ((0, 0), (0, -t % block_q), (0, -s % block_k))
    shape = (rows, -(-t // block_q), block_q, -(-s // block_k), block_k)
    some = np.pad(visible, pad).reshape(shape).any((2, 4))
    ignored = (intervals.end <= intervals.start)[..., None]
    return some, np.pad(visible | ignored, pad, constant_values=True).reshape(shape).all((2, 4))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    blocks=st.sampled_from([(8, 8), (16, 4), (4, 16)]),
    empties=st.booleans(),
    wide=st.booleans(),
)
def test_every_visible_pair_is_visited_and_every_masked_one_masked(seed, blocks, empties, wide):
    t, s, rng = 53, 47, np.random.default_rng(seed)
    offsets = np.sort(np.concatenate([[0], rng.integers(0, s + 1, 3)])).astype(np.int32)
    runs = KeyRuns((100 * rng.permutation(3)).astype(np.int32), offsets)
    bounds = rng.integers(0, 300, (2, 2, t)).astype(np.int32)
    if not empties:
        bounds = np.sort(bounds, axis=0)
    if wide:
        bounds = np.where(rng.random(t) < 0.9, np.asarray([0, 300])[:, None, None], bounds)
    intervals = Intervals(*bounds.astype(np.int32))
    some, every = _blocks(intervals, runs, s, *blocks)
    for visited, full in _maps(intervals, runs, s, *blocks):
        assert not (some & ~visited).any()
        assert not (full & ~every).any()


DOCUMENTS = np.repeat(np.arange(9), [50, 3, 90, 41, 72, 20, 110, 64, 62])

MASKS = {
    "causal": masks.causal(),
    "bidirectional": masks.bidirectional(),
    "documents": masks.documents(DOCUMENTS),
    "packed": masks.causal() & masks.documents(DOCUMENTS),
    "window": masks.sliding_window(70),
    "prefix": masks.prefix_lm(200),
    "chunked": masks.chunked_local(96),
}


@pytest.mark.parametrize("inner", [1, 4], ids=["ring", "ring of all-to-alls"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_a_device_of_a_zigzag_ring_visits_no_block_in_vain(mask, inner):
    """Also if an all-to-all has gathered several chunks, which are then out of order."""
    size, block = 8, 8
    chunk = 512 // (2 * size)
    order = chunk_order(size, "zigzag").reshape(size // inner, -1)
    whole = mask.intervals(512)
    for mine in order:
        index = (mine[:, None] * chunk + np.arange(chunk)).reshape(-1)
        intervals = Intervals(whole.start[:, index], whole.end[:, index])
        for theirs in order:
            runs = KeyRuns(
                (theirs * chunk).astype(np.int32),
                (np.arange(theirs.size + 1) * chunk).astype(np.int32),
            )
            some, every = _blocks(intervals, runs, index.size, block, block)
            for visited, full in _maps(intervals, runs, index.size, block, block):
                np.testing.assert_array_equal(visited, some)
                np.testing.assert_array_equal(full, some & every)


def test_packed_documents_cost_what_they_contain():
    """Sixteen documents in a stream cost a sixteenth of the dense causal stream, and the edges."""
    length, documents, block = 4096, 16, 32
    ids = np.repeat(np.arange(documents), length // documents)
    runs = single_run(length)
    dense, packed = (
        [visited.sum() for visited, _ in _maps(m.intervals(length), runs, length, block, block)]
        for m in (masks.causal(), masks.causal() & masks.documents(ids))
    )
    blocks = length // documents // block
    assert packed == [documents * blocks * (blocks + 1) // 2] * 2
    assert dense == [(length // block) * (length // block + 1) // 2] * 2


def test_queries_that_see_nothing_neither_visit_nor_mask():
    start, end = np.zeros((2, 1, 64), np.int32)
    end[:, 5:29] = 64
    (visited, full), _ = _maps(Intervals(start, end), single_run(64), 64, 16, 16)
    np.testing.assert_array_equal(visited[0].sum(axis=1), [4, 4, 0, 0])
    np.testing.assert_array_equal(full, visited)
