"""The check of recurrent layers passes what is right, and fails a scan that forgets."""

import jax
import jax.numpy as jnp
import pytest

import hcp_jax as hcp
from hcp_jax.models.config import ModelConfig
from hcp_jax.models.recurrent_specs import GatedDeltaConfig
from hcp_jax.recurrence import scan
from hcp_jax.verify import recurrences

MODEL = ModelConfig(
    vocab_size=8,
    num_layers=2,
    hidden_size=16,
    intermediate_size=32,
    num_heads=4,
    num_kv_heads=2,
    layers="GA",
    gated_delta=GatedDeltaConfig(
        num_key_heads=1, num_value_heads=2, key_size=4, value_size=4, chunk=8
    ),
    compute_dtype="float32",
)


@pytest.mark.slow
def test_a_state_that_does_not_arrive_is_found(monkeypatch):
    cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=2, devices=jax.devices()[:2]), "p2p")
    (right,) = recurrences.checks(cp, MODEL, 61)
    assert right.passed
    assert right.cells["layers"] == "0"
    monkeypatch.setattr(scan, "_entering", lambda a, b, stream, reverse: jnp.zeros_like(b))
    jax.clear_caches()
    (wrong,) = recurrences.checks(cp, MODEL, 61)
    assert not wrong.passed
    jax.clear_caches()
