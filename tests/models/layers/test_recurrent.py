"""Mamba-2, gated delta net and KDA: equal to transformers' layers, and the same on every mesh."""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hcp_jax as hcp
from hcp_jax.compiled.hlo import collectives
from hcp_jax.models.layers.gated_delta import GatedDeltaNet
from hcp_jax.models.layers.kda import KDA
from hcp_jax.models.layers.mamba2 import Mamba2
from hcp_jax.models.layers.recurrent import Tokens
from hcp_jax.models.recurrent_specs import GatedDeltaSpec, KDASpec, Mamba2Spec

B, T, D = 2, 45, 16
MIXERS = {
    "mamba2": (
        Mamba2,
        Mamba2Spec(
            hidden_size=D,
            num_heads=4,
            head_size=4,
            state_size=3,
            num_groups=2,
            chunk=8,
            dtype="float32",
        ),
    ),
    "gated_delta": (
        GatedDeltaNet,
        GatedDeltaSpec(
            hidden_size=D,
            num_key_heads=2,
            num_value_heads=4,
            key_size=4,
            value_size=3,
            chunk=8,
            dtype="float32",
        ),
    ),
    "kda": (KDA, KDASpec(hidden_size=D, num_heads=4, head_size=4, chunk=8, dtype="float32")),
}
POSITIONS = np.stack(
    [np.concatenate([np.arange(n) for n in (1, 2, 20, 1, 21)]), np.arange(T)]
).astype(np.int32)


@functools.cache
def new(name):
    """A mixer whose every parameter is random, also those that are born as ones or zeros."""
    kind, config = MIXERS[name]
    graph, state = nnx.split(nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    shapes = nnx.to_pure_dict(state)
    return graph, jax.tree.map(lambda x: 0.5 * rng.standard_normal(x.shape, np.float32), shapes)


@functools.cache
def inputs():
    x, dy = jax.random.normal(jax.random.key(7), (2, B, T, D))
    return np.asarray(x), np.asarray(dy)


def run(name, cp, specs=None):
    """Outputs and gradients of inputs and parameters, in natural order."""
    graph, params = new(name)
    x, dy = inputs()

    @jax.jit
    def step(params, x, positions, dy):
        def mix(params, x):
            return nnx.merge(graph, params)(x, Tokens(positions), cp=cp)

        y, vjp = jax.vjp(mix, params, x)
        return y, *vjp(dy)

    if cp is None:
        return step(params, x, POSITIONS, dy)
    y, dparams, dx = step(params, cp.shard(x), cp.shard(POSITIONS), cp.shard(dy))
    return cp.unshard(y, length=T), dparams, cp.unshard(dx, length=T)


@functools.cache
def alone(name):
    return run(name, None)


@pytest.mark.parametrize(
    ("name", "sizes", "layout"),
    [
        ("mamba2", {"cp_outer": 2, "tp": 4}, "zigzag"),  # tp cuts groups' heads
        pytest.param("mamba2", {"cp_inner": 8}, "contiguous", marks=pytest.mark.slow),
        ("gated_delta", {"dp": 2, "cp_outer": 2, "cp_inner": 2}, "zigzag"),
        ("kda", {"cp_outer": 4, "tp": 2}, "zigzag"),
    ],
)
def test_a_mixer_is_the_same_on_every_mesh(name, sizes, layout):
    cp = hcp.ContextParallel(hcp.make_mesh(**sizes), "p2p", layout=layout)
    for got, expected in zip(
        jax.tree.leaves(run(name, cp)), jax.tree.leaves(alone(name)), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", MIXERS)
def test_packed_documents_come_out_as_if_alone(name):
    graph, params = new(name)
    x, _ = inputs()
    y = alone(name)[0]
    mix = jax.jit(lambda x: nnx.merge(graph, params)(x, Tokens(jnp.arange(x.shape[1])[None])))
    np.testing.assert_allclose(mix(x[:1, 3:23]), y[:1, 3:23], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "sizes", "layout"),
    [
        ("mamba2", {"cp_inner": 4, "tp": 2}, "contiguous"),
        ("gated_delta", {"dp": 2, "cp_outer": 2, "cp_inner": 2}, "zigzag"),
    ],
)
def test_the_list_of_what_a_mixer_moves_is_what_its_program_moves(name, sizes, layout):
    cp = hcp.ContextParallel(hcp.make_mesh(**sizes), "p2p", layout=layout)
    graph, params = new(name)
    x = jax.ShapeDtypeStruct((B, 64, D), jnp.float32, sharding=cp.sharding(3))
    positions = jax.ShapeDtypeStruct((B, 64), jnp.int32, sharding=cp.sharding(2))
    mix = jax.jit(lambda x, positions: nnx.merge(graph, params)(x, Tokens(positions), cp=cp))
    found, listed = Counter(), Counter()
    for c in collectives(mix.lower(x, positions).compile().as_text()):
        found[c.kind] += c.count * c.bytes
    for t in MIXERS[name][1].traffic(cp, rows=B, tokens=64):
        if t.direction == "forward":
            listed[t.kind] += t.count * t.bytes
    found.pop("all-reduce", None)  # the projections' sums over tp
    assert found == listed


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="num_heads=3 must be a multiple of num_groups=2"):
        Mamba2Spec(hidden_size=8, num_heads=3, num_groups=2)
    with pytest.raises(ValueError, match="num_value_heads=3 must be a multiple of num_key_heads=2"):
        GatedDeltaSpec(hidden_size=8, num_key_heads=2, num_value_heads=3)
    with pytest.raises(ValueError, match="head_size"):
        KDASpec(hidden_size=8, num_heads=2, head_size=0)
    with pytest.raises(ValueError, match="chunk must be a power of two, got 24"):
        KDASpec(hidden_size=8, num_heads=2, chunk=24)
