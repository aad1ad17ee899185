import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hcp_jax as hcp
from hcp_jax.models.config import ModelConfig
from hcp_jax.models.layers.mlp import MLP

CONFIG = ModelConfig(
    vocab_size=8,
    num_layers=1,
    hidden_size=8,
    intermediate_size=64,
    num_heads=2,
    num_kv_heads=2,
    compute_dtype="float32",
)
B, T = 2, 48


def run(config, params, x, cp=None):
    graph, _ = nnx.split(MLP(config.specs[0].ffn, rngs=nnx.Rngs(0)))
    return nnx.merge(graph, params)(x, cp)


@functools.cache
def problem():
    params = nnx.to_pure_dict(nnx.state(MLP(CONFIG.specs[0].ffn, rngs=nnx.Rngs(0))))
    return params, jax.random.normal(jax.random.key(1), (B, T, CONFIG.hidden_size))


def grads(config, params, x, cp=None):
    def loss(params, x):
        y = run(config, params, x, cp)
        return jnp.sum(jnp.sin(y)), y

    (_, y), of_both = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)
    return y, of_both


@pytest.mark.parametrize(
    "sizes", [None, {"cp_outer": 4, "cp_inner": 2}, {"dp": 2, "tp": 2, "cp_outer": 2}], ids=str
)
def test_in_chunks_it_is_what_it_is_at_once(sizes):
    params, x = problem()
    y, (dparams, dx) = grads(CONFIG, params, x)
    chunked = dataclasses.replace(CONFIG, mlp_chunk=6)
    cp = None if sizes is None else hcp.ContextParallel(hcp.make_mesh(**sizes), comm_type="p2p")
    placed = x if cp is None else cp.shard(x)
    got_y, (got_dparams, got_dx) = grads(chunked, params, placed, cp)
    if cp is not None:
        got_y, got_dx = cp.unshard(got_y), cp.unshard(got_dx)
    for got, expected in zip(
        jax.tree.leaves((got_y, got_dx, got_dparams)),
        jax.tree.leaves((y, dx, dparams)),
        strict=True,
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_the_wide_activations_of_a_sequence_never_exist():
    length, chunk = 4096, 16
    config = dataclasses.replace(CONFIG, mlp_chunk=chunk, intermediate_size=1024)
    cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=8), comm_type="p2p")

    def temporaries(config):
        graph, params = nnx.split(
            nnx.eval_shape(lambda: MLP(config.specs[0].ffn, rngs=nnx.Rngs(0)))
        )
        x = jax.ShapeDtypeStruct((1, length, 8), jnp.float32, sharding=cp.sharding(3))

        def loss(params, x):
            return jnp.sum(nnx.merge(graph, params)(x, cp) ** 2)

        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(nnx.to_pure_dict(params), x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    wide = 4 * length // 8 * config.intermediate_size
    assert temporaries(dataclasses.replace(config, mlp_chunk=None)) > 2 * wide
    assert temporaries(config) < wide / 2


def test_gradients_of_chunks_add_up_in_float32():
    config = dataclasses.replace(CONFIG, mlp_chunk=1, compute_dtype="bfloat16")
    shapes = {"gate_proj": (8, 64), "up_proj": (8, 64), "down_proj": (64, 8)}
    params = {name: {"kernel": jnp.full(shape, 1 / 8)} for name, shape in shapes.items()}
    x = jnp.ones((1, 4096, 8), jnp.bfloat16)

    def loss(params):
        return jnp.sum(run(config, params, x).astype(jnp.float32))

    got = jax.jit(jax.grad(loss))(params)["down_proj"]["kernel"]
    # 4096 times silu(1); a bfloat16 sum would stick at a few hundred.
    np.testing.assert_allclose(got, 4096 * jax.nn.silu(1.0), rtol=0.01)
