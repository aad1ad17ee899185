"""shard_buffers: a tree of arrays goes into the layout, each along its own sequence dim."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hcp_jax as hcp

T = 32


@pytest.fixture(scope="module")
def cp():
    return hcp.ContextParallel(hcp.make_mesh(dp=2, cp_outer=2, cp_inner=2), "a2a+p2p")


@pytest.fixture(scope="module")
def buffers():
    x = np.random.default_rng(0).normal(size=(2, T, 4, 8)).astype(np.float32)
    cos = np.cos(np.arange(T)[:, None] * np.ones(4)).astype(np.float32)
    return {
        "x": x,
        "heads first": jnp.asarray(x.transpose(0, 2, 1, 3)),
        "rope": (np.arange(T), cos),
        "rate": 0.5,
        "nothing": None,
    }


DIMS = {"x": 1, "heads first": -2, "rope": 0, "rate": None, "nothing": None}


def test_every_array_is_cut_along_its_dim_and_comes_back(cp, buffers):
    sharded = cp.shard_buffers(buffers, DIMS)
    assert np.array_equal(sharded["rope"][0], cp.positions(T)[0])
    assert np.array_equal(sharded["x"], cp.shard(buffers["x"]))
    assert np.array_equal(sharded["heads first"].transpose(0, 2, 1, 3), sharded["x"])
    assert sharded["heads first"].sharding.is_equivalent_to(cp.sharding(4, 2), 4)
    assert sharded["rope"][1].sharding.is_equivalent_to(cp.sharding(2, 0), 2)
    assert sharded["rate"] == 0.5
    assert sharded["nothing"] is None
    jax.tree.map(np.testing.assert_array_equal, cp.unshard_buffers(sharded, DIMS), buffers)


def test_the_with_form_gives_attention_and_gradients_of_one_device_and_leaves_its_inputs(cp):
    def loss(x, positions, cp):
        angle = positions[None, :, None, None] / 8
        y = x * jnp.cos(angle)
        return jnp.sum(hcp.dot_product_attention(y, y, y, cp=cp, is_causal=True) ** 2)

    x, positions = np.random.default_rng(1).normal(size=(2, T, 4, 8)), np.arange(T)
    x = x.astype(np.float32)
    kept = x.copy()
    gradient = jax.jit(jax.grad(loss), static_argnums=2)
    with hcp.context_parallel(cp, (x, positions), (1, 0)) as sharded:
        here = gradient(*sharded, cp)
        # Nothing is switched: the same function without cp is that of one device.
        alone = gradient(x, positions, None)
    np.testing.assert_allclose(cp.unshard_buffers(here, 1), alone, atol=2e-5)
    assert np.array_equal(x, kept)
    assert not np.allclose(here, alone)  # the layout is not natural order


def test_it_works_inside_jit(cp, buffers):
    there = jax.jit(lambda x: cp.shard_buffers([x], 1))(buffers["x"])
    assert np.array_equal(there[0], cp.shard(buffers["x"]))


@pytest.mark.parametrize(
    ("seq_dims", "told"),
    [
        ([1, 0], "seq_dims does not fit buffers: buffers are .*same containers"),
        ({"x": 1}, "seq_dims does not fit buffers"),
        (DIMS | {"rope": (0, 0, 0)}, "seq_dims does not fit buffers"),
        (
            DIMS | {"x": 4},
            r"seq_dim of buffers\['x'\], of shape \(2, 32, 4, 8\), must be .* got 4",
        ),
        (DIMS | {"x": 1.0}, r"seq_dim of buffers\['x'\]"),
        (DIMS | {"x": 2}, r"one length along their seq_dims, got .*'x'\]\": 4"),
        (DIMS | {"rate": 0}, r"buffers\['rate'\] must be an array, got float.*seq_dim None"),
    ],
)
def test_dims_that_do_not_fit_are_refused_by_name(cp, buffers, seq_dims, told):
    for move in (cp.shard_buffers, cp.unshard_buffers):
        with pytest.raises(ValueError, match=told):
            move(buffers, seq_dims)


def test_arrays_that_cannot_be_cut_are_refused(cp):
    with pytest.raises(ValueError, match=r"buffers\['a'\] has 30 tokens.*Pad all buffers to 32"):
        cp.shard_buffers({"a": np.ones((2, 30))}, 1)
    with pytest.raises(ValueError, match=r"buffers\[0\] is a mask.*cp\.place"):
        cp.shard_buffers([hcp.causal()], 1)
    with pytest.raises(ValueError, match=r"buffers\[0\] is a scalar"):
        cp.shard_buffers([np.zeros(())], 0)
    with pytest.raises(ValueError, match="batch of 1, which dp=2 does not divide"):
        cp.shard_buffers([np.ones((1, T))], 1)
    with (
        pytest.raises(ValueError, match=r"cp must be a hcp_jax\.ContextParallel, got Mesh"),
        hcp.context_parallel(cp.mesh, [np.ones((2, T))], 1),
    ):
        pass
    groups = hcp.ContextParallel(cp.mesh, "a2a", widest_group=4)
    with pytest.raises(NotImplementedError, match=r"cp\.shard_buffers works on streams"):
        groups.shard_buffers([np.ones((2, T))], 1)
