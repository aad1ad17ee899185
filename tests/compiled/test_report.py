"""Facts of programs compiled for 64 H200s that are not here: what is hidden, moved and held."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

import hcp_jax as hcp
from hcp_jax import hardware
from hcp_jax.compiled import aot, hlo, report
from hcp_jax.hardware import Cluster
from hcp_jax.models.config import ModelConfig
from hcp_jax.planner import audit

LLAMA3_8B = ModelConfig(
    vocab_size=128256,
    num_layers=32,
    hidden_size=4096,
    intermediate_size=14336,
    num_heads=32,
    num_kv_heads=8,
)
H200 = hardware.gpu("h200")
FLAGS = hcp.xla_flags(H200.device_kind)
MIB = 2**20
RINGS = [
    pytest.param(64, 1, "p2p", marks=pytest.mark.slow),
    pytest.param(8, 8, "a2a+p2p", marks=pytest.mark.slow),
]


@functools.cache
def compiled(outer, inner, comm_type, tokens_per_device=16384, widest=None):
    """(program, what was found in it)."""
    size = outer * inner
    cluster = Cluster(H200, max(1, size // 8), min(8, size))
    mesh = hcp.make_mesh(cp_outer=outer, cp_inner=inner, devices=aot.devices(cluster))
    cp = hcp.ContextParallel(mesh, comm_type, widest_group=widest)
    seq_len = size * tokens_per_device
    program = audit.compile_attention(cp, LLAMA3_8B, seq_len, 1, FLAGS)
    return program, audit.read_model(program, cp, cluster, LLAMA3_8B, seq_len)


def found(*ring, **size):
    return compiled(*ring, **size)[1]


@pytest.mark.parametrize(("outer", "inner", "comm_type"), RINGS)
def test_every_hop_of_a_million_tokens_is_hidden_behind_attention(outer, inner, comm_type):
    seen = found(outer, inner, comm_type)
    # Forward K and V; backward K and V, dK and dV.
    assert seen.ring_hops == 6 * (outer - 1)
    assert seen.ring_hops_hidden == seen.ring_hops
    assert {m.link for m in seen.collectives if m.what == "ring"} == {"between hosts"}


@pytest.mark.parametrize(("outer", "inner", "comm_type"), RINGS)
def test_the_ring_sends_what_the_algorithm_says(outer, inner, comm_type):
    k_or_v = 2**20 // outer * (8 // inner) * 128 * 2
    ring = [m for m in found(outer, inner, comm_type).collectives if m.what == "ring"]
    sent = {m.bytes: m.count for m in ring}
    assert sent == {k_or_v: 4 * (outer - 1), 2 * k_or_v: 2 * (outer - 1)}


@pytest.mark.slow
def test_the_program_does_not_grow_with_the_ring():
    """Hops are a loop, so that a ring of 64 is compiled as fast as one of 8."""
    small, large = (
        sum(len(c.instructions) for c in hlo.parse(program.as_text()).computations.values())
        for program in (compiled(size, 1, "p2p")[0] for size in (8, 64))
    )
    assert large <= 1.02 * small


@pytest.mark.slow
def test_memory_does_not_grow_with_the_ring():
    peaks = [found(cp, 1, "p2p").memory.peak_bytes for cp in (8, 64)]
    assert max(peaks) <= 1.05 * min(peaks)


@pytest.mark.slow
def test_a_ring_holds_two_buffers_more_than_one_hop_needs_those_that_things_arrive_in():
    t, n, k, h = 16384, 32, 8, 128
    dq, dkv, kv = 4 * t * n * h, 2 * 4 * t * k * h, 2 * 2 * t * k * h
    # Of one hop: dq so far and its own; dk and dv at home, travelling and its own; K and V at hand.
    one_hop = 2 * dq + 3 * dkv + kv
    assert found(64, 1, "p2p").memory.temp_bytes <= one_hop + dkv + kv + 16 * MIB


@pytest.mark.parametrize(("outer", "inner", "comm_type"), RINGS)
def test_no_hop_copies_keys_and_values(outer, inner, comm_type):
    module = hlo.parse(compiled(outer, inner, comm_type)[0].as_text())
    loops = [
        module.computations[i.called[-1]]
        for c in module.computations.values()
        for i in c.instructions
        if i.opcode == "while" and (i.trip_count or 0) > 1
    ]
    assert loops
    for body in loops:
        assert not [i.name for i in body.instructions if i.opcode == "copy" and i.bytes >= MIB]


@pytest.mark.slow
def test_every_hop_of_a_ring_too_short_for_a_loop_is_hidden():
    seen = found(4, 8, "a2a+p2p")
    assert seen.ring_hops_hidden == seen.ring_hops == 6 * 3


@pytest.mark.slow
@pytest.mark.parametrize(("widest", "hops"), [(64, 7), (16, 1)])
def test_every_hop_between_hosts_is_hidden_and_none_leaves_its_block(widest, hops):
    seen = found(8, 8, "a2a+p2p", widest=widest)
    assert seen.ring_hops == 6 * hops
    assert seen.ring_hops_hidden == seen.ring_hops
    moved = hlo.collectives(compiled(8, 8, "a2a+p2p", widest=widest)[0].as_text())
    for collective in moved:
        for members in collective.groups:
            assert len({device // widest for device in members}) == 1


@pytest.mark.slow
def test_without_attention_beside_it_a_hop_is_exposed():
    # A device's 256 tokens are attended to sooner than they arrive.
    seen = found(2, 1, "p2p", tokens_per_device=256)
    assert seen.ring_hops_hidden < seen.ring_hops
    assert seen.schedule.exposed_s > 0


def collective(groups):
    fields = {f.name: None for f in dataclasses.fields(hlo.Collective)}
    return hlo.Collective(**fields | {"groups": groups})


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        (((0, 1, 2, 3), (4, 5, 6, 7)), ("cp_inner",)),
        (((0, 4), (1, 5), (2, 6), (3, 7)), ("cp_outer",)),
        ((tuple(range(8)),), ("cp_outer", "cp_inner")),
    ],
)
def test_groups_are_told_by_the_axes_of_the_mesh(groups, axes):
    mesh = Mesh(np.array(jax.devices()).reshape(1, 1, 2, 4), ("dp", "tp", "cp_outer", "cp_inner"))
    assert report.collective_axes(collective(groups), mesh) == axes
