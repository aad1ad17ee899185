"""Layouts are permutations; zigzag shares causal work out evenly."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hcp_jax as hcp
from hcp_jax.kernels.key_index import key_index
from hcp_jax.sequence import layout as lay

layouts = st.sampled_from(lay.LAYOUTS)
sizes = st.integers(1, 12)


@given(layouts, sizes, st.integers(1, 5), st.integers(0, 2))
def test_to_layout_and_back_is_the_identity(layout, cp_size, chunk, dim):
    shape = [2, 3, 2]
    shape[dim] = chunk * lay.runs_per_device(layout) * cp_size
    x = np.arange(np.prod(shape)).reshape(shape)
    y = lay.to_layout(x, cp_size, layout, dim)
    assert np.array_equal(lay.from_layout(y, cp_size, layout, dim), x)


@given(layouts, sizes, st.integers(0, 100))
def test_padded_length_is_the_least_that_fits(layout, cp_size, length):
    chunks = lay.runs_per_device(layout) * cp_size
    padded = lay.padded_length(length, cp_size, layout)
    assert padded % chunks == 0
    assert length <= padded < length + chunks


def test_zigzag_gives_device_c_chunks_c_and_its_mirror():
    index = lay.global_index(24, 3, "zigzag").reshape(3, 2, 4)
    assert index[:, 0, 0].tolist() == [0, 4, 8]
    assert index[:, 1, 0].tolist() == [20, 16, 12]


@given(sizes, st.integers(1, 6))
def test_zigzag_gives_every_device_equal_causal_work(cp_size, chunk):
    length = 2 * cp_size * chunk
    start, end = hcp.causal().intervals(length)
    pairs = lay.to_layout(end - start, cp_size, "zigzag", 1).reshape(cp_size, -1).sum(axis=1)
    assert len(set(pairs.tolist())) == 1


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_zigzag_gives_every_device_equal_causal_work_at_every_hop(ring, inner, chunk):
    cp_size, length = ring * inner, 2 * ring * inner * chunk
    _, end = hcp.causal().intervals(length)
    queries = lay.to_layout(end, cp_size, "zigzag", 1).reshape(ring, -1)
    keys = lay.global_index(length, cp_size, "zigzag").reshape(ring, -1)
    for hop in range(ring):
        work = [int(np.sum(keys[(p - hop) % ring] < queries[p][:, None])) for p in range(ring)]
        assert len(set(work)) == 1, (hop, work)


@given(layouts, st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
@settings(max_examples=20)  # each has shapes of its own, and compiles
def test_ring_runs_say_where_every_key_is(layout, ring, inner, chunk):
    cp_size = ring * inner
    length = lay.runs_per_device(layout) * cp_size * chunk
    index = lay.global_index(length, cp_size, layout)
    for ring_size in {ring, 1}:
        runs = lay.ring_runs(length, cp_size, layout, ring_size)
        for rank, held in enumerate(index.reshape(ring_size, -1)):
            of_rank = lay.KeyRuns(runs.starts[rank], runs.offsets)
            assert np.array_equal(key_index(of_rank, held.size), held)


def test_runs_that_meet_are_one():
    assert lay.ring_runs(64, 8, "contiguous", 4).starts.tolist() == [[0], [16], [32], [48]]
    assert lay.ring_runs(64, 8, "contiguous", 1).starts.tolist() == [[0]]
    assert lay.ring_runs(64, 8, "zigzag", 8).starts.shape == (8, 2)


def test_padding_keys_have_no_index():
    runs = lay.KeyRuns(np.array([10, 3], np.int32), np.array([0, 2, 4], np.int32))
    assert key_index(runs, 6).tolist() == [10, 11, 3, 4, -1, -1]


def test_a_length_that_chunks_do_not_divide_is_refused():
    with pytest.raises(
        ValueError, match="dim 0 has 10 tokens, which 8 chunks do not divide; pad it to 16"
    ):
        lay.to_layout(np.arange(10), 4, "zigzag", 0)
