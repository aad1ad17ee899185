"""What a step is said to move is what the compiled program moves."""

import functools

import jax
import numpy as np
import pytest

from hcp_jax.attention.api import dot_product_attention
from hcp_jax.compiled import hlo
from hcp_jax.cost.traffic import EXCHANGE_HEADS, GATHER_KV, RING_HOP, total
from hcp_jax.models.config import ModelConfig
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.parallel.mesh import make_mesh
from hcp_jax.sequence.mask import causal
from hcp_jax.train.metrics import traffic

T = 64
MODEL = ModelConfig(
    vocab_size=264,
    num_layers=4,
    hidden_size=32,
    intermediate_size=64,
    num_heads=8,
    num_kv_heads=2,
    compute_dtype="float32",
)


def sent_by(program, *args):
    """(by all-to-alls, by anything else): bytes that a device sends in a compiled program."""
    found = hlo.collectives(program.lower(*args).compile().as_text())
    exchanges = [c for c in found if c.kind == "all-to-all"]
    return tuple(
        sum(c.sent_bytes * c.count for c in group)
        for group in (exchanges, [c for c in found if c not in exchanges])
    )


@pytest.mark.parametrize("comm_type", ["a2a+p2p", "a2a+all_gather", "p2p", "a2a"])
def test_attention_sends_what_is_told(comm_type):
    cp = ContextParallel(make_mesh(dp=1, cp_outer=4, cp_inner=2), comm_type)
    moved = traffic.layer_traffic(cp, MODEL.specs[0].mixer, batch_size=2, seq_len=T)

    def told(direction):
        exchange, kv = (EXCHANGE_HEADS,), (RING_HOP, GATHER_KV)
        return total(moved, exchange, direction), total(moved, kv, direction)

    q, k = (cp.shard(np.ones((2, T, heads, 4), np.float32)) for heads in (8, 2))

    def attend(q, k, v):
        return dot_product_attention(q, k, v, cp=cp, mask=causal())

    assert sent_by(jax.jit(attend), q, k, k) == told("forward")
    # Two programs: in one, the compiler may keep what forward received for backward.
    out, back = jax.jit(functools.partial(jax.vjp, attend))(q, k, k)
    assert sent_by(jax.jit(lambda back, dout: back(dout)), back, out) == told("backward")


def test_layers_of_one_comm_type_are_told_together():
    cp = ContextParallel(make_mesh(cp_outer=4, cp_inner=2), ("p2p", "p2p", "a2a", "p2p"))
    lines = list(traffic.describe(cp, MODEL, batch_size=2, seq_len=T, num_params=1024))
    assert [line.split(":")[0] for line in lines] == [
        "layers 0-1, 3 (p2p), each",
        "layer 2 (a2a), each",
        "gradients, summed over 8 devices",
    ]
    assert "in 7 hops" in lines[0]
    assert "K/V" not in lines[1]
    assert lines[2].endswith(" 7 KiB")
    *_, line = traffic.describe(cp, MODEL, batch_size=2, seq_len=T, num_params=1024, fsdp=True)
    assert line.endswith(" 10.5 KiB")


def test_one_device_sends_nothing():
    cp = ContextParallel(make_mesh(devices=jax.devices()[:1]))
    (line,) = traffic.describe(cp, MODEL, batch_size=2, seq_len=T, num_params=1024)
    assert line == "layers 0-3 (a2a+p2p), each: nothing"
