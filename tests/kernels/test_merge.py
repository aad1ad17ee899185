"""Merging partials: exact, in any order, safe where nothing was seen."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hcp_jax.kernels.merge import Partial, merge, softmax_weight


def partial_of(logits, values) -> Partial:
    """The partial of one query against these keys, from the definition."""
    if not len(logits):
        return Partial(jnp.zeros((1, 1, 1, 2)), jnp.full((1, 1, 1), -jnp.inf))
    weights = jax.nn.softmax(jnp.asarray(logits))
    return Partial((weights @ values)[None, None, None], jax.nn.logsumexp(logits)[None, None, None])


@given(st.lists(st.floats(-30, 30, width=32), max_size=9), st.data())
def test_merging_parts_in_any_cut_gives_the_whole(logits, data):
    logits = np.array(logits, np.float32)
    values = np.random.default_rng(0).normal(size=(len(logits), 2)).astype(np.float32)
    a, b = sorted(data.draw(st.integers(0, len(logits))) for _ in range(2))
    parts = [partial_of(logits[s], values[s]) for s in (slice(a), slice(a, b), slice(b, None))]
    whole = partial_of(logits, values)
    for merged in (merge(merge(*parts[:2]), parts[2]), merge(parts[0], merge(*parts[1:]))):
        # Of the values and of one nat, since means and logarithms may come out near zero.
        np.testing.assert_allclose(merged.out, whole.out, rtol=2e-6, atol=2e-6)
        np.testing.assert_allclose(merged.lse, whole.lse, rtol=2e-6, atol=2e-6)


def test_two_empty_parts_make_an_empty_one():
    empty = partial_of([], None)
    merged = merge(empty, empty)
    assert np.all(merged.lse == -np.inf)
    assert not np.any(merged.out)


def test_an_empty_part_weighs_nothing():
    assert softmax_weight(jnp.array(-jnp.inf), jnp.array(-jnp.inf)) == 0
    assert softmax_weight(jnp.array(-jnp.inf), jnp.array(3.0)) == 0
