"""What is said to travel to experts is what the compiled program sends."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import hcp_jax as hcp
from hcp_jax.compiled import aot, hlo
from hcp_jax.cost import experts
from hcp_jax.cost.traffic import EXPERT_DISPATCH, total
from hcp_jax.models.layers.moe import MoE
from hcp_jax.models.layers.moe_dispatch import Dispatch
from hcp_jax.models.layers.moe_documents import RoutedTokens
from hcp_jax.models.specs import MoESpec
from tests.kernels import absent

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


@pytest.mark.parametrize("parts", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_one_round_sends_what_is_told(monkeypatch, parts):
    monkeypatch.setattr(experts, "ROOM", 8.0)  # so that there is no second round
    cp = hcp.ContextParallel(hcp.make_mesh(dp=2, cp_outer=2, cp_inner=2), ep=4)
    dispatch = Dispatch(cp.expert_axes, cp.ep, rows=2 * 16, parts=parts)
    assert (cp.expert_axes, dispatch.rounds) == (("cp_outer", "cp_inner"), parts)
    told = dispatch.traffic(12, 4)
    graph, state = nnx.split(MoE(dataclasses.replace(SPEC, dispatch_parts=parts), rngs=nnx.Rngs(0)))
    x = cp.shard(np.ones((4, 32, 12), np.float32), dim=1)
    real = cp.shard(np.ones((4, 32), bool), dim=1)

    def treat(state, x):
        return nnx.merge(graph, state).treat(x, RoutedTokens(real), cp)[0]

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
    halves = Dispatch(("cp_inner",), 8, rows=1024, parts=2)
    assert (halves.slots, halves.rounds) == (80, 13)
    assert halves.traffic(12, 4)[0].sent_bytes * 2 == dispatch.traffic(12, 4)[0].sent_bytes


@pytest.mark.slow
def test_one_part_travels_while_experts_compute_another(monkeypatch):
    """Compiled for 64 H200: of two halves, the second arrives and the first returns behind experts."""
    monkeypatch.setattr(Dispatch, "rounds", property(lambda self: self.parts))
    gpus = absent.devices("h200", hosts=8, gpus_per_host=8)
    mesh = hcp.make_mesh(cp_outer=8, cp_inner=8, devices=gpus)
    cp = hcp.ContextParallel(mesh, ep=8)

    def like(spec, shape, dtype="bfloat16"):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def hidden(parts):
        """Return how many of the exchanges of rows experts hide, and of how many."""
        own = {"dispatch_parts": parts, "dtype": "bfloat16", "num_experts": 32}
        own["product"] = "triton"
        spec = dataclasses.replace(SPEC, hidden_size=256, intermediate_size=256, **own)
        graph, state = nnx.split(nnx.eval_shape(lambda: MoE(spec, rngs=nnx.Rngs(0))))
        state = jax.tree_util.tree_map_with_path(
            lambda path, p: like(
                PartitionSpec(cp.expert_axes if "experts" in str(path) else None), p.shape, p.dtype
            ),
            nnx.to_pure_dict(state),
        )
        x, real = like(cp.spec(3), (1, 2**16, 256)), like(cp.spec(2), (1, 2**16), bool)

        def step(state, x, real, dout):
            def treat(state, x):
                return nnx.merge(graph, state).treat(x, RoutedTokens(real), cp)[0]

            out, back = jax.vjp(treat, state, x)
            return out, back(jax.lax.optimization_barrier((dout, out))[0])

        compiled = aot.compile_for(step, state, x, real, x, flags=hcp.xla_flags("h200"))
        module = hlo.parse(compiled.as_text())
        rows = [
            (c, module.computations[c.computation].by_name)
            for c in hlo.module_collectives(module)
            if c.kind == "all-to-all" and c.bytes > 2**16
        ]
        behind = [any("expert_product" in names[n].op_name for n in c.between) for c, names in rows]
        return sum(behind), len(behind)

    whole, halves = hidden(1), hidden(2)
    assert (whole[1], halves[1]) == (4, 8)
    assert whole[0] <= 1  # in backward, gradients of weights need no exchange
    assert halves[0] >= 4
