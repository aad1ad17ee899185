"""The counted FLOPs of a recurrence are those of the products that it computes."""

import math

import jax
import jax.numpy as jnp
import pytest

from hcp_jax.models.recurrent_specs import GatedDeltaSpec, KDASpec, Mamba2Spec
from hcp_jax.recurrence.api import delta_rule, state_space

T = 512
SPECS = [
    Mamba2Spec(hidden_size=8, num_heads=4, head_size=32, state_size=64, num_groups=2, chunk=64),
    GatedDeltaSpec(hidden_size=8, num_key_heads=2, num_value_heads=4, key_size=64, value_size=32),
    KDASpec(hidden_size=8, num_heads=4, head_size=64),
]


def product_flops(jaxpr, times=1):
    """FLOPs of all matrix products of a jaxpr, those of its loops as often as they run."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2 * times * eqn.outvars[0].aval.size * math.prod(shape[d] for d in contracted)
        turns = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += product_flops(inner, times * turns)
    return total


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_the_flops_of_chunks_are_those_of_the_program(spec):
    r = spec.recurrence
    q = jnp.zeros((1, T, r.key_heads, r.key_size))
    v = jnp.zeros((1, T, r.heads, r.value_size))
    per_head = jnp.zeros((1, T, r.heads))
    decay = jnp.zeros((1, T, r.heads, r.key_size)) if r.channel_decays else per_head
    positions = jnp.arange(T, dtype=jnp.int32)[None]

    def run(q, v, beta, decay):
        if r.matrix:
            return delta_rule(q, q, v, beta, decay, positions, chunk=r.chunk)
        return state_space(q, q, v, decay, positions, chunk=r.chunk)

    counted = product_flops(jax.make_jaxpr(run)(q, v, per_head, decay).jaxpr)
    assert counted == pytest.approx(T * r.chunk_flops, rel=0.1)
