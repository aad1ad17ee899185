"""Masks: intervals say what the boolean matrices of the definitions say, and compose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hcp_jax as hcp
from hcp_jax.attention import arguments
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
    st.builds(lambda w, r: hcp.sliding_window(w, right=r), st.integers(1, 50), st.integers(0, 9)),
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
def test_invalid_masks_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_masks_that_do_not_say_where_keys_end_look_ahead():
    queries_alone = arguments.combined_mask(None, False, np.array([3]), None, None)
    for mask in (hcp.bidirectional(), hcp.prefix_lm(2), hcp.chunked_local(2), queries_alone):
        assert mask.looks_ahead
        assert not (mask & hcp.lengths(3)).looks_ahead
        assert not (hcp.causal() & mask).looks_ahead


def test_masks_of_different_lengths_do_not_join():
    mask = hcp.documents(np.zeros(4, int)) & hcp.documents(np.zeros(5, int))
    with pytest.raises(ValueError, match=r"streams of different lengths \[4, 5\]"):
        mask.intervals(8)


def test_a_placed_mask_does_not_join():
    cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=4, cp_inner=2))
    with pytest.raises(ValueError, match="before shard_batch"):
        cp.place(hcp.causal(), 16) & hcp.causal()


@st.composite
def packed_rows(draw):
    """Two rows of documents, with padding (one id of any dtype) before, between and after them."""
    dtype = draw(st.sampled_from([np.int8, np.uint8, np.int32, np.int64, np.uint64]))
    ids = st.integers(int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
    padding = draw(ids)
    rows = []
    for _ in range(2):
        row = []
        for name in draw(st.lists(ids.filter(lambda i: i != padding), max_size=6, unique=True)):
            row += [padding] * draw(st.integers(0, 3)) + [name] * draw(st.integers(1, 8))
        rows.append((row + [padding] * T)[:T])
    return np.array(rows, dtype), padding


@given(packed_rows())
def test_padding_may_stand_anywhere_and_ids_may_be_any_integers(case):
    ids, padding = case
    real = ids != padding
    want = (ids[:, :, None] == ids[:, None]) & real[:, :, None]
    assert np.array_equal(dense(hcp.documents(ids, padding_id=padding)), want)
    plain = dense(hcp.documents(np.where(real, np.cumsum(real, axis=1), 0), padding_id=0))
    assert np.array_equal(plain.any(2), real)


def test_traced_padding_is_that_of_the_host():
    ids = np.array([[1, 1, 1, 0, 2, 2, 0, 0], [0, 7, 0, 0, 7, 9, 9, 0]])[:1]
    rows = np.concatenate([ids, [[0, 7, 0, 0, 3, 9, 9, 0]]]).astype(np.int32)
    host = hcp.documents(rows, padding_id=0).intervals(8)
    traced = jax.jit(lambda ids: hcp.documents(ids, padding_id=0).intervals(8, xp=jnp))(rows)
    sees = np.asarray(host.end) > host.start
    for a, b in zip(host, traced, strict=True):
        assert np.array_equal(np.asarray(a)[sees], np.asarray(b)[sees])
    assert np.array_equal(sees, np.asarray(traced.end) > traced.start)


def test_padding_inside_a_document_is_refused():
    with pytest.raises(ValueError, match="Padding inside a document"):
        hcp.documents([1, 1, 0, 1], padding_id=0)
    with pytest.raises(ValueError, match="If 0 is the id of padding, pass it as padding_id"):
        hcp.documents([1, 0, 2, 0])


@pytest.mark.parametrize("x64", [False, True])
def test_ids_beyond_int32_are_not_taken_for_each_other(x64):
    ids = np.array([2**32 + 1, 2**32 + 1, 1, 1, 2**40])
    with jax.enable_x64(x64):
        mask = hcp.documents(ids)
        numbers = jax.jit(lambda mask: mask.intervals(5, xp=jnp))(mask)
    assert np.asarray(numbers.start).tolist() == [[0, 0, 2, 2, 4]]
    assert np.asarray(numbers.end).tolist() == [[2, 2, 4, 4, 5]]


def test_numbers_beyond_int32_are_its_limits():
    everything = np.ones((1, 5, 5), bool)
    assert np.array_equal(dense(hcp.sliding_window(2**40), 5), np.tril(everything))
    assert np.array_equal(dense(hcp.sliding_window(2**40, right=2**40), 5), everything)
    for mask in (hcp.chunked_local(2**40), hcp.prefix_lm(2**40), hcp.lengths(2**40)):
        assert np.array_equal(dense(mask, 5), everything)
        assert np.array_equal(dense(mask, 5, xp=jnp), everything)
    far = hcp.intervals([[-(2**40)] * 5], [[2**40] * 5])
    assert np.array_equal(dense(far, 5), everything)


def test_a_window_has_two_sides():
    i, j = np.arange(T)[:, None], np.arange(T)[None]
    for left, right in ((0, 0), (3, 2), (0, 5), (50, 1)):
        mask = hcp.sliding_window(left + 1, right=right)
        assert np.array_equal(dense(mask)[0], (j >= i - left) & (j <= i + right))


def test_masks_of_no_tokens_are_empty():
    nothing = [hcp.documents([]), hcp.intervals([[]], [[]]), hcp.causal(), hcp.lengths(0)]
    for mask in nothing:
        for xp in (np, jnp):
            assert mask.intervals(0, xp=xp).start.shape == (1, 0)


def test_intervals_may_be_shapes_where_a_program_is_only_compiled():
    shape = jax.ShapeDtypeStruct((1, 8), np.int32)
    assert jax.tree.leaves(hcp.intervals(shape, shape)) == [shape, shape]
    with pytest.raises(ValueError, match="one shape"):
        hcp.intervals(shape, jax.ShapeDtypeStruct((1, 9), np.int32))
