"""Masks: intervals say what the boolean matrices of the definitions say, and compose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hcp_jax as hcp
from tests import oracle

T = 37


def dense(mask: hcp.Mask, length: int = T, xp=np) -> np.ndarray:
    start, end = mask.intervals(length, xp=xp)
    key = np.arange(length)
    return (np.asarray(start)[:, :, None] <= key) & (key < np.asarray(end)[:, :, None])


@pytest.mark.parametrize("name", oracle.masks(T))
def test_intervals_say_what_the_definition_says(name):
    case = oracle.masks(T)[name]
    assert np.array_equal(dense(case.mask), case.dense)
    assert np.array_equal(dense(case.mask, xp=jnp), case.dense)
    traced = jax.jit(lambda mask: mask.intervals(T, xp=jnp))(case.mask)
    assert all(np.array_equal(a, b) for a, b in zip(traced, case.mask.intervals(T), strict=True))


masks = st.one_of(
    st.just(hcp.causal()),
    st.just(hcp.bidirectional()),
    st.builds(hcp.sliding_window, st.integers(1, 50)),
    st.builds(hcp.chunked_local, st.integers(1, 50)),
    st.builds(hcp.prefix_lm, st.integers(0, 50)),
    st.builds(hcp.lengths, st.integers(0, 50)),
    st.builds(
        lambda cuts: hcp.documents(np.searchsorted(np.sort(cuts), np.arange(T), side="right")),
        st.lists(st.integers(0, T), max_size=6),
    ),
)


@given(masks, masks, masks)
def test_joining_masks_joins_what_they_show(a, b, c):
    assert np.array_equal(dense(a & b & c), dense(a) & dense(b) & dense(c))


@given(masks)
def test_intervals_stay_inside_the_stream(mask):
    start, end = mask.intervals(T)
    assert start.dtype == end.dtype == np.int32
    assert np.all(start >= 0)
    assert np.all(start <= end)
    assert np.all(end <= T)


def test_queries_past_the_mask_see_nothing_and_are_not_seen():
    mask = hcp.documents(np.zeros(5, int))
    assert dense(mask, 8)[:, 5:].sum() == 0
    assert dense(mask, 8)[:, :, 5:].sum() == 0


def test_a_mask_is_a_pytree_whose_arrays_are_leaves():
    mask = hcp.causal() & hcp.documents(np.zeros(4, int)) & hcp.sliding_window(2)
    assert len(jax.tree.leaves(mask)) == 1
    assert hash(hcp.causal() & hcp.sliding_window(3)) == hash(hcp.causal() & hcp.sliding_window(3))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: hcp.documents(np.array([1, 1, 2, 1])),
            "row 0 are not sorted into runs: id 1 comes",
        ),
        (lambda: hcp.documents(np.zeros(3)), r"segment_ids must be integers, got float64"),
        (lambda: hcp.documents(np.zeros((1, 2, 3), int)), r"of shape \(1, 2, 3\)"),
        (
            lambda: hcp.sliding_window(0),
            "window of sliding_window must be a positive integer, got 0",
        ),
        (
            lambda: hcp.chunked_local(-1),
            "chunk of chunked_local must be a positive integer, got -1",
        ),
        (lambda: hcp.prefix_lm(np.zeros((2, 2), int)), "one number, or one per row"),
        (lambda: hcp.intervals(np.zeros((1, 3), int), np.zeros((1, 4), int)), "one shape"),
        (lambda: hcp.intervals(np.zeros((1, 3)), np.zeros((1, 3))), "must be integers"),
    ],
)
def test_masks_that_cannot_be_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_masks_of_different_lengths_do_not_join():
    mask = hcp.documents(np.zeros(4, int)) & hcp.documents(np.zeros(5, int))
    with pytest.raises(ValueError, match=r"streams of different lengths \[4, 5\]"):
        mask.intervals(8)


def test_a_placed_mask_does_not_join():
    cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=4, cp_inner=2))
    with pytest.raises(ValueError, match="before shard_batch"):
        cp.place(hcp.causal(), 16) & hcp.causal()
