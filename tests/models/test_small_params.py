"""Gradients of norms and biases, summed over the devices once for all layers."""

import functools
import math

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import hcp_jax as hcp
from hcp_jax.compiled import hlo
from hcp_jax.models.config import ModelConfig
from hcp_jax.models.layers import decoder
from hcp_jax.models.transformer import abstract_model, init_params

CONFIG = ModelConfig(
    vocab_size=32,
    num_layers=3,
    hidden_size=16,
    intermediate_size=24,
    num_heads=4,
    num_kv_heads=2,
    qkv_bias=True,
    qk_norm=True,
    compute_dtype="float32",
    remat="attention",
)
T = 16


def loss(cp, params, tokens, wanted):
    model = nnx.merge(abstract_model(CONFIG)[0], params)
    positions = jax.numpy.broadcast_to(jax.numpy.arange(T), tokens.shape)
    if cp is not None:
        positions = cp.shard(positions)
    return jax.numpy.sum(model(tokens, positions, cp=cp) * wanted)


def test_no_layer_sums_the_gradients_of_norms_and_biases_over_devices():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 32, (2, T)).astype(np.int32)
    wanted = rng.normal(size=(2, T, 16)).astype(np.float32)
    params = jax.jit(functools.partial(init_params, CONFIG))(jax.random.key(0))
    gradient = jax.grad(loss, argnums=1)
    expected = jax.jit(functools.partial(gradient, None))(params, tokens, wanted)

    cp = hcp.ContextParallel(hcp.make_mesh(dp=2, cp_outer=2, cp_inner=2), "a2a+p2p")
    whole = NamedSharding(cp.mesh, PartitionSpec())
    program = (
        jax.jit(functools.partial(gradient, cp), out_shardings=whole)
        .lower(jax.device_put(params, whole), cp.shard(tokens), cp.shard(wanted))
        .compile()
    )
    found = program(jax.device_put(params, whole), cp.shard(tokens), cp.shard(wanted))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())

    layers = jax.tree_util.tree_leaves_with_path(params["layers"])
    matrices = sum(
        math.prod(p.shape) * 4
        for path, p in layers
        if decoder.rule(tuple(key.key for key in path)).fsdp
    )
    sums = [c for c in hlo.collectives(program.as_text()) if c.kind == "all-reduce"]
    # jax 0.10 sums over dp and over cp one after the other.
    assert {c.bytes * c.count for c in sums if c.count > 1} == {matrices}
