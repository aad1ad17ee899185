"""Boolean matrices that are one interval per query become masks; others are refused by row."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hcp_jax as hcp
from tests.sequence.test_mask import dense, masks

T = 37


@given(masks, st.sampled_from(["TS", "BTS", "B1TS", "BNTS"]), st.sampled_from([bool, np.float32]))
def test_a_mask_comes_back_from_its_matrix(mask, shape, dtype):
    want = dense(mask)
    given_as = {
        "TS": want[0],
        "BTS": np.repeat(want, 2, 0),
        "B1TS": np.repeat(want, 2, 0)[:, None],
        "BNTS": np.broadcast_to(want[:, None], (2, 3, T, T)),
    }[shape].astype(dtype)
    got = dense(hcp.from_dense(given_as))
    assert np.array_equal(got, np.broadcast_to(want, got.shape))


def test_one_query_or_one_key_stands_for_all():
    keys = np.array([[True, True, False, False], [False, True, True, True]])[:, None, None]
    want = np.broadcast_to(keys[:, 0], (2, 4, 4))
    assert np.array_equal(dense(hcp.from_dense(keys), 4), want)
    queries = np.array([[True], [False], [True], [True]])
    assert np.array_equal(dense(hcp.from_dense(queries), 4)[0], np.repeat(queries, 4, 1))


def test_flax_s_causal_mask_is_the_causal_mask():
    for dtype in (jnp.float32, bool):
        mask = hcp.from_dense(nn.make_causal_mask(jnp.ones((2, 9)), dtype=dtype))
        assert np.array_equal(dense(mask, 9)[0], np.tri(9, dtype=bool))


GAP = np.tri(4, dtype=bool)
GAP[2] = [True, False, True, False]
TWO_HEADS = np.stack([np.tri(4, dtype=bool), np.ones((4, 4), bool)])[None]
REFUSED = {
    "query 2 of row 0 .* no single interval": GAP,
    "query 2 of row 1 .* no single interval": np.stack([np.tri(4, dtype=bool), GAP]),
    "query 0 of row 0 .* differ between heads": TWO_HEADS,
    "query 0 of row 0 .* biases": np.where(np.tri(4) > 0, 0, -np.inf),
    r"needs a boolean mask .* got bool of shape \(4,\)": np.ones(4, bool),
    "got <U1 of shape": np.full((2, 2), "a"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_matrix_without_intervals_is_refused_naming_the_first_query(message):
    with pytest.raises(ValueError, match=message):
        hcp.from_dense(REFUSED[message])


def test_a_traced_matrix_is_checked_when_the_program_runs():
    numbers = jax.jit(lambda mask: hcp.from_dense(mask).intervals(4, xp=jnp))
    start, end = numbers(np.tri(4, dtype=bool))
    assert np.asarray(start).tolist() == [[0, 0, 0, 0]]
    assert np.asarray(end).tolist() == [[1, 2, 3, 4]]
    with pytest.raises(Exception, match="query 2 of row 0 cannot be an interval mask"):
        jax.block_until_ready(numbers(GAP))  # on jax 0.10 and 0.12 alike: the error is jaxlib's
