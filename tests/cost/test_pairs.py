"""Pairs counted from intervals, against counting them one by one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hcp_jax as hcp
from hcp_jax.cost.pairs import causal_chunk_pairs, chunk_pairs, merge_chunks, pairs_by_hop
from hcp_jax.sequence.layout import global_index
from hcp_jax.sequence.mask import Intervals

MASKS = {
    "causal": hcp.causal(),
    "window": hcp.causal() & hcp.sliding_window(5),
    "documents": hcp.causal() & hcp.documents(np.repeat([0, 1, 2, 3], [10, 3, 30, 5])),
    "prefix": hcp.prefix_lm(7),
    "padding": hcp.causal() & hcp.lengths(31),
}


def dense(intervals):
    start, end = (np.asarray(x)[0] for x in intervals)
    keys = np.arange(start.size)
    return (keys >= start[:, None]) & (keys < end[:, None])


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("chunks", [1, 3, 8, 16])
def test_every_mask_is_counted_exactly(name, chunks):
    intervals = MASKS[name].intervals(48)
    size = 48 // chunks
    counted = dense(intervals).reshape(chunks, size, chunks, size).sum(axis=(1, 3))
    assert (chunk_pairs(intervals, chunks) == counted).all()


@pytest.mark.parametrize("window", [None, 1, 5, 6, 13, 48, 60])
@pytest.mark.parametrize("chunks", [1, 3, 8, 16, 48])
def test_causal_pairs_by_formula_are_those_that_are_counted(chunks, window):
    mask = hcp.causal() if window is None else hcp.causal() & hcp.sliding_window(window)
    counted = chunk_pairs(mask.intervals(48), chunks)
    assert (causal_chunk_pairs(48, chunks, window) == counted).all()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 24), st.integers(0, 24)), min_size=24, max_size=24))
def test_any_intervals_are_counted_exactly(bounds):
    start, end = np.sort(np.array(bounds, np.int32), axis=1).T
    intervals = Intervals(start[None], end[None])
    assert (
        chunk_pairs(intervals, 6) == dense(intervals).reshape(6, 4, 6, 4).sum(axis=(1, 3))
    ).all()


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize(("cp", "ring"), [(4, 4), (4, 2), (6, 3), (8, 1)])
def test_hops_see_what_visits_them(layout, cp, ring):
    intervals = MASKS["documents"].intervals(48)
    chunks = 2 * cp if layout == "zigzag" else cp
    found = pairs_by_hop(chunk_pairs(intervals, chunks), cp, layout, ring)
    index = global_index(48, cp, layout).reshape(ring, -1)
    visible = dense(intervals)
    for rank in range(ring):
        for hop in range(ring):
            keys = index[(rank - hop) % ring]
            assert found[rank, hop] == visible[np.ix_(index[rank], keys)].sum()


def test_zigzag_gives_every_device_the_same_number_of_pairs():
    table = chunk_pairs(hcp.causal().intervals(2**14), 16)
    assert len(set(pairs_by_hop(table, 8, "zigzag", 8).sum(axis=1).tolist())) == 1
    assert (
        len(
            set(
                pairs_by_hop(chunk_pairs(hcp.causal().intervals(2**14), 8), 8, "contiguous", 8)
                .sum(axis=1)
                .tolist()
            )
        )
        == 8
    )


def test_coarse_tables_are_sums_of_fine_ones():
    intervals = MASKS["documents"].intervals(48)
    assert (merge_chunks(chunk_pairs(intervals, 16), 4) == chunk_pairs(intervals, 4)).all()


def test_a_length_that_chunks_do_not_divide_is_an_error():
    with pytest.raises(ValueError, match="divide"):
        chunk_pairs(hcp.causal().intervals(10), 4)
