"""`attention_fn(cp)` in Flax's own modules: as it is, and against the same module on one device."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hcp_jax as hcp
from tests.oracle import relative

X = np.random.default_rng(0).normal(size=(2, 48, 32)).astype(np.float32)
CAUSAL = nn.make_causal_mask(jnp.ones((2, 48)))


@pytest.fixture(scope="module")
def cp():
    return hcp.ContextParallel(hcp.make_mesh(cp_outer=4, cp_inner=2))


def test_nnx_attention_computes_what_it_does_on_one_device(cp):
    def layer(**options):
        return nnx.MultiHeadAttention(8, 32, decode=False, rngs=nnx.Rngs(0), **options)

    ours = layer(attention_fn=hcp.attention_fn(cp, mask=hcp.causal()))

    def loss(layer, x):
        return jnp.sum(layer(x) ** 2)

    plain = layer()
    assert relative(cp.unshard(ours(cp.shard(X))), plain(jnp.asarray(X), mask=CAUSAL)) <= 2e-6
    got = nnx.grad(loss)(ours, cp.shard(X))
    want = nnx.grad(lambda layer, x: jnp.sum(layer(x, mask=CAUSAL) ** 2))(plain, jnp.asarray(X))
    # Of the largest gradient: that of the key's bias is nothing but rounding.
    got, want = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(g)]) for g in (got, want))
    assert relative(got, want) <= 2e-6


def test_linen_attention_computes_what_it_does_on_one_device(cp):
    plain = nn.MultiHeadDotProductAttention(8)
    params = plain.init(jax.random.key(0), X)
    ours = nn.MultiHeadDotProductAttention(8, attention_fn=hcp.attention_fn(cp))
    got = ours.apply(params, cp.shard(X), mask=hcp.causal())
    assert relative(cp.unshard(got), plain.apply(params, jnp.asarray(X), mask=CAUSAL)) <= 2e-6


def test_an_init_with_a_length_that_has_no_layout_says_which_length_does(cp):
    layer = nn.MultiHeadDotProductAttention(8, attention_fn=hcp.attention_fn(cp))
    with pytest.raises(ValueError, match="input of `init` needs such a length, too: give it 16"):
        layer.init(jax.random.key(0), jnp.ones((2, 7, 32)))


def test_masks_of_the_function_and_of_the_call_join():
    x = jnp.asarray(X).reshape(2, 48, 4, 8)
    both = hcp.attention_fn(mask=hcp.causal())(x, x, x, mask=hcp.sliding_window(5))
    one = hcp.attention_fn()(x, x, x, mask=hcp.causal() & hcp.sliding_window(5))
    assert np.array_equal(both, one)


def test_further_batch_dims_are_kept():
    x = jnp.asarray(X).reshape(1, 2, 48, 4, 8)
    attend = hcp.attention_fn(mask=hcp.causal())
    assert np.array_equal(attend(x, x, x)[0], attend(x[0], x[0], x[0]))


def test_the_dtype_asked_for_is_computed_in():
    x = jnp.asarray(X).reshape(2, 48, 4, 8)
    assert hcp.attention_fn()(x, x, x, dtype=jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bias": np.zeros((2, 4, 48, 48))}, ValueError, "takes no bias"),
        ({"dropout_rate": 0.1}, NotImplementedError, r"attention dropout \(rate 0.1\)"),
        ({"module": nn.Dense(1)}, NotImplementedError, "none can be sown"),
    ],
)
def test_what_needs_the_matrix_of_weights_is_refused(options, error, message):
    x = jnp.asarray(X).reshape(2, 48, 4, 8)
    with pytest.raises(error, match=message):
        hcp.attention_fn()(x, x, x, **options)


def test_dropout_that_is_off_is_no_reason_to_refuse():
    x = jnp.asarray(X).reshape(2, 48, 4, 8)
    hcp.attention_fn()(x, x, x, dropout_rate=0.1, deterministic=True)
