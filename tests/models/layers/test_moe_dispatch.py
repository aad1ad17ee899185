"""What is said to travel to experts is what the compiled program sends."""

import jax
import numpy as np
from flax import nnx

import hcp_jax as hcp
from hcp_jax.compiled import hlo
from hcp_jax.cost import experts
from hcp_jax.cost.traffic import EXPERT_DISPATCH, total
from hcp_jax.models.layers.moe import MoE
from hcp_jax.models.layers.moe_dispatch import Dispatch
from hcp_jax.models.specs import MoESpec

SPEC = MoESpec(
    hidden_size=12,
    num_experts=8,
    top_k=2,
    intermediate_size=8,
    router="softmax",
    norm_topk=True,
    scaling=1.0,
    groups=1,
    topk_groups=1,
    correction=False,
    shared=None,
    shared_gate=False,
    activation="silu",
    depth=1,
    dtype="float32",
)


def test_one_round_sends_what_is_told(monkeypatch):
    monkeypatch.setattr(experts, "ROOM", 8.0)  # so that there is no second round
    cp = hcp.ContextParallel(hcp.make_mesh(dp=2, cp_outer=2, cp_inner=2), ep=4)
    dispatch = Dispatch(cp.expert_axes, cp.ep, rows=2 * 16)
    assert (cp.expert_axes, dispatch.rounds) == (("cp_outer", "cp_inner"), 1)
    told = dispatch.traffic(12, 4)
    graph, state = nnx.split(MoE(SPEC, rngs=nnx.Rngs(0)))
    x = cp.shard(np.ones((4, 32, 12), np.float32), dim=1)
    real = cp.shard(np.ones((4, 32), bool), dim=1)

    def treat(state, x):
        return nnx.merge(graph, state).treat(x, real, cp)[0]

    def sent(program, *args):
        found = hlo.collectives(program.lower(*args).compile().as_text())
        return sum(c.sent_bytes * c.count for c in found if c.kind == "all-to-all")

    assert sent(jax.jit(treat), state, x) == total(told, (EXPERT_DISPATCH,), "forward")
    out, back = jax.jit(lambda *args: jax.vjp(treat, *args))(state, x)
    backward = jax.jit(lambda back, dout: back(dout))
    assert sent(backward, back, out) == total(told, (EXPERT_DISPATCH,), "backward")


def test_a_round_has_room_for_an_even_load_and_rounds_for_any():
    dispatch = Dispatch(("cp_inner",), 8, rows=1024)
    assert (dispatch.slots, dispatch.rounds) == (160, 7)
    assert dispatch.slots * dispatch.rounds >= 1024
    assert Dispatch(("cp_inner",), 8, rows=1).slots == 1
