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


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_matrices_that_flax_builds_are_masks_in_natural_order(layout):
    cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=4, cp_inner=2), layout=layout)
    x = jnp.asarray(X).reshape(2, 48, 4, 8)
    tokens = np.arange(48)[None] < np.array([[48], [20]])
    padded = nn.combine_masks(CAUSAL, nn.make_attention_mask(np.ones((2, 48)), tokens))
    for mask in (CAUSAL, padded):
        want = jax.nn.dot_product_attention(x, x, x, mask=mask.astype(bool))
        got = hcp.attention_fn(cp)(*(cp.shard(a) for a in (x, x, x)), mask=mask)
        assert relative(cp.unshard(got), want) <= 2e-6


@pytest.mark.parametrize("jit", [False, True])
def test_decoding_with_a_cache_gives_what_the_whole_sequence_gives(jit):
    layer = nnx.MultiHeadAttention(
        4, 32, decode=True, rngs=nnx.Rngs(0), attention_fn=hcp.attention_fn()
    )
    x = jnp.asarray(X[:, :6])
    whole = layer(x, mask=nn.make_causal_mask(x[..., 0]), decode=False)
    layer.init_cache(x.shape)
    step = nnx.jit(lambda layer, x: layer(x)) if jit else lambda layer, x: layer(x)
    steps = [step(layer, x[:, i : i + 1]) for i in range(6)]
    assert relative(jnp.concatenate(steps, axis=1), whole) <= 2e-6


def test_decoding_under_masks_that_count_queries_or_over_devices_is_refused(cp):
    q, k = jnp.ones((2, 1, 4, 8)), jnp.ones((2, 16, 4, 8))
    cached = jnp.ones((2, 1, 1, 16), bool)
    with pytest.raises(ValueError, match="looks like decoding with a cache"):
        hcp.attention_fn(mask=hcp.causal())(q, k, k, mask=cached)
    with pytest.raises(NotImplementedError, match="cannot be cut over 8 devices"):
        hcp.attention_fn(cp)(q, k, k, mask=cached)


def test_shapes_are_checked_before_unsupported_options():
    x = jnp.asarray(X).reshape(2, 48, 4, 8)
    attend = hcp.attention_fn()
    for wrong, message in (
        (x[:1], "batch dims must match"),
        (x[0], "same rank"),
        (x[..., :4], "depths must match"),
        (x[:, :, :3], "must be a multiple"),
    ):
        with pytest.raises(ValueError, match=message):
            attend(x, wrong, wrong, dropout_rate=0.1)
    with pytest.raises(ValueError, match=r"does not broadcast to \[\*B, N, T, S\]"):
        attend(x, x, x, mask=np.ones((2, 1, 48, 47)))
    with pytest.raises(ValueError, match="logits_soft_cap must be"):
        hcp.attention_fn(logits_soft_cap=0.0)
    with pytest.raises(ValueError, match="mask must be a hcp_jax.Mask"):
        hcp.attention_fn(mask=CAUSAL)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"mask": np.arange(48)[None] % 2 == np.zeros((48, 1))},
            ValueError,
            "query 0 of row 0 .* no single interval",
        ),
        ({"bias": np.zeros((2, 4, 48, 48))}, ValueError, "takes no bias"),
        ({"dropout_rate": 0.1}, NotImplementedError, r"attention dropout \(rate 0.1\)"),
        ({"module": nn.Dense(1)}, NotImplementedError, "none can be sown"),
    ],
)
def test_options_that_need_the_matrix_of_weights_are_refused(options, error, message):
    x = jnp.asarray(X).reshape(2, 48, 4, 8)
    with pytest.raises(error, match=message):
        hcp.attention_fn()(x, x, x, **options)


def test_disabled_dropout_is_accepted():
    x = jnp.asarray(X).reshape(2, 48, 4, 8)
    hcp.attention_fn()(x, x, x, dropout_rate=0.1, deterministic=True)


def test_flax_grouped_heads_give_what_flax_gives(cp):
    options = {"num_heads": 8, "num_kv_heads": 2, "in_features": 32, "decode": False}
    plain = nnx.MultiHeadAttention(**options, rngs=nnx.Rngs(0))
    ours = nnx.MultiHeadAttention(**options, rngs=nnx.Rngs(0), attention_fn=hcp.attention_fn(cp))
    want = plain(jnp.asarray(X), mask=CAUSAL)
    assert relative(cp.unshard(ours(cp.shard(X), mask=CAUSAL)), want) <= 2e-6


def test_keys_of_another_input_and_arrays_without_batch_are_attended_to():
    q, kv = X[0, :3], X[0, 3:12]
    plain = nn.MultiHeadAttention(8)
    ours = nn.MultiHeadAttention(8, attention_fn=hcp.attention_fn())
    params = plain.init(jax.random.key(0), q, kv)
    want = plain.apply(params, q, kv)
    assert want.shape == (3, 32)
    assert relative(ours.apply(params, q, kv), want) <= 2e-6
    assert not np.array_equal(ours.apply(params, q, kv[::-1] * 2), want)


def test_a_query_depends_on_its_past_and_on_nothing_else(cp):
    """Flax's test of the receptive field, with tokens cut over the devices."""
    attend = hcp.attention_fn(cp)

    @jax.jit
    @jax.grad
    def moved_by(x, chosen):
        return jnp.sum(attend(x, x, x, mask=CAUSAL[:1]) * chosen)

    x = cp.shard(X[:1].reshape(1, 48, 8, 4))
    for place in (0, 13, 47):
        chosen = (np.arange(48) == place).astype(np.float32)[None, :, None, None]
        gradient = np.abs(cp.unshard(moved_by(x, cp.shard(chosen)))[0]).max(axis=(1, 2))
        assert np.array_equal(gradient > 1e-7, np.arange(48) <= place)
