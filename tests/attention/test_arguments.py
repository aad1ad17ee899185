"""The op's words: those of jax that are intervals mean what they do there, others are refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hcp_jax as hcp
from tests import oracle

T, S = 12, 20
X, Y = oracle.inputs(T, 4, 2, 8, 8), oracle.inputs(S, 4, 2, 8, 8)
SHORT = {
    "query_seq_lengths": np.array([9, 12], np.int32),
    "key_value_seq_lengths": np.array([20, 7], np.int32),
}
WORDS = {
    "one window": {"local_window_size": 3},
    "two sides": {"local_window_size": (4, 2)},
    "causal window": {"local_window_size": (5, 3), "is_causal": True},
    "lengths": SHORT,
    "all": {**SHORT, "local_window_size": (9, 9), "is_causal": True},
}


@pytest.fixture(scope="module")
def cp():
    mesh = hcp.make_mesh(cp_outer=2, cp_inner=2, devices=jax.devices()[:4])
    return hcp.ContextParallel(mesh, layout="contiguous")


@pytest.mark.parametrize("words", WORDS)
def test_jax_s_arguments_mean_what_they_mean_in_jax(words, cp):
    options = WORDS[words]
    want = np.asarray(jax.nn.dot_product_attention(X.q, Y.k, Y.v, **options))
    sees = np.ones((2, T, 1, 1), bool)
    if "lengths" in words or words == "all":
        # Where no key is seen jax gives a mean of values that nobody asked for.
        lengths = np.minimum(SHORT["query_seq_lengths"], T)
        sees = (np.arange(T) < lengths[:, None])[..., None, None]
    if words == "all":
        reach = SHORT["key_value_seq_lengths"] + 9
        sees = sees & (np.arange(T) < reach[:, None])[..., None, None]
    for context in (None, cp):
        q, k, v = X.q, Y.k, Y.v
        if context is not None:
            q, k, v = (context.shard(a) for a in (q, k, v))
        got = np.asarray(hcp.dot_product_attention(q, k, v, cp=context, **options))
        assert oracle.relative(got * sees, want * sees) <= 2e-6
        assert not np.any(got * ~sees)


def test_batch_dims_may_be_none_or_several():
    attend = functools.partial(hcp.dot_product_attention, is_causal=True, return_residual=True)
    out, lse = attend(*X[:3])
    single = attend(*(a[1] for a in X[:3]))
    many = attend(*(a[:, None] for a in X[:3]))
    assert np.array_equal(single[0], out[1])
    assert np.array_equal(single[1], lse[1])
    assert np.array_equal(many[0], out[:, None])
    assert np.array_equal(many[1], lse[:, None])


@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 4), (2, 4, 0), (2, 0, 0)])
def test_no_rows_queries_or_keys_give_nothing_or_zeros(shape, cp):
    b, t, s = shape
    q, k = jnp.ones((b, t, 4, 8)), jnp.ones((b, s, 2, 8))

    def loss(q, k, v, sinks, context):
        out, lse = hcp.dot_product_attention(
            q, k, v, cp=context, sinks=sinks, return_residual=True, is_causal=True
        )
        assert out.shape == q.shape
        assert lse.shape == q.shape[:3]
        return jnp.sum(out) + jnp.sum(lse), (out, lse)

    for context in (None, cp):
        grad = jax.grad(loss, (0, 1, 2, 3), has_aux=True)
        (dq, dk, dv, dsinks), (out, lse) = grad(q, k, k, jnp.ones(4), context)
        assert not any(np.any(x) for x in (out, dq, dk, dv))
        assert np.all(np.asarray(lse) == 1)  # nothing but the sink
        assert np.all(np.asarray(dsinks) == b * t)
    alone = hcp.dot_product_attention(q, k, k, return_residual=True)
    assert np.all(np.asarray(alone[1]) == -np.inf)


BAD = {
    "logits_soft_cap must be .*got 0.0. None means no cap": {"logits_soft_cap": 0.0},
    "logits_soft_cap must be .*got -1": {"logits_soft_cap": -1},
    "logits_soft_cap must be .*got nan": {"logits_soft_cap": float("nan")},
    "logits_soft_cap must be .*got inf": {"logits_soft_cap": np.inf},
    "logits_soft_cap must be .*got 1e-40": {"logits_soft_cap": 1e-40},
    "logits_soft_cap must be .*got True": {"logits_soft_cap": True},
    r"scale must be a finite .*got nan. None means 1 / sqrt\(H\)": {"scale": np.nan},
    "scale must be a finite .*got -inf": {"scale": -np.inf},
    "scale must be a finite .*got '1'": {"scale": "1"},
    "floats of shape .*got int64 of shape": {"sinks": np.zeros(4, int)},
    "sinks must be an array, got list": {"sinks": [0.0] * 4},
    r"local_window_size \(left\) must be an integer >= 0, got -1": {"local_window_size": (-1, 0)},
    r"local_window_size \(right\) must be .* got 1.5": {"local_window_size": (1, 1.5)},
    r"must be \(left, right\) or one integer": {"local_window_size": (1, 2, 3)},
    "query_seq_lengths: .* got float64": {"query_seq_lengths": [1.5, 2.0]},
    "key_value_seq_lengths: .* got -1": {"key_value_seq_lengths": [3, -1]},
    "the mask has 3 rows": {"query_seq_lengths": [1, 2, 3]},
    "is_causal must be True or False, got 'no'": {"is_causal": "no"},
    "return_residual must be True or False, got 1": {"return_residual": 1},
    "cp must be a hcp_jax.ContextParallel, got str": {"cp": "p2p"},
    "implementation must be a name": {"implementation": 3},
    r"boolean matrix .* hcp.from_dense\(mask\)": {"mask": np.ones((T, T), bool)},
    "takes no bias": {"bias": np.zeros((1, 4, T, T))},
}


@pytest.mark.parametrize("message", BAD)
def test_invalid_arguments_are_refused(message):
    with pytest.raises(ValueError, match=message):
        hcp.dot_product_attention(*X[:3], **BAD[message])


def test_non_arrays_and_arrays_without_heads_are_refused():
    with pytest.raises(ValueError, match="k must be an array, got list"):
        hcp.dot_product_attention(X.q, [1.0], X.v)
    with pytest.raises(ValueError, match="at least one head"):
        hcp.dot_product_attention(X.q[..., :0], X.k[..., :0], X.v)
    with pytest.raises(ValueError, match="logits_soft_cap must be a Python number"):
        jax.jit(lambda cap: hcp.dot_product_attention(*X[:3], logits_soft_cap=cap))(1.0)


MODES = {
    "strict dtypes": lambda: jax.numpy_dtype_promotion("strict"),
    "64 bits": lambda: jax.enable_x64(True),
    "no jit": jax.disable_jit,
    "leaks": jax.checking_leaks,
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_the_op_works_in_every_mode_of_jax(mode, cp):
    ids = np.array([[1] * 5 + [0] * 2 + [2] * 5])
    options = {
        "mask": hcp.documents(ids, padding_id=0),
        "local_window_size": (5, 2),
        "logits_soft_cap": 2.0,
        "return_residual": True,
    }

    def loss(q, k, v, sinks, context, impl):
        out, lse = hcp.dot_product_attention(
            q, k, v, sinks=sinks, cp=context, implementation=impl, **options
        )
        return jnp.sum(out * out) + jnp.sum(jnp.where(lse == -jnp.inf, 0, lse))

    def gradients(context, impl):
        cut = [jnp.asarray(a) if context is None else context.shard(a) for a in X[:3]]
        grads = jax.grad(loss, (0, 1, 2, 3))(*cut, jnp.zeros(4, jnp.float32), context, impl)
        return [
            np.asarray(g if context is None or g.ndim == 1 else context.unshard(g)) for g in grads
        ]

    if mode == "leaks":
        # jax's checker takes all_to_all, all_gather and psum for leaks: in jax 0.12 alone the
        # gradient of a jitted shard_map of any of them fails so.
        cp = dataclasses.replace(cp, comm_type="p2p")
    want = gradients(None, "reference")
    with MODES[mode]():
        for context in (None, cp):
            got = gradients(context, "blockwise")
            assert all(oracle.relative(a, b) <= 1e-5 for a, b in zip(got, want, strict=True))
