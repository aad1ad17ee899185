"""What the compiled program moves and holds, read from its HLO."""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

import hcp_jax as hcp
from hcp_jax.compiled.hlo import collectives
from hcp_jax.cost.traffic import STRATEGIES

B, T, N, K, H = 1, 64, 8, 2, 8
ITEM = 4  # float32


@functools.cache
def context(outer: int, inner: int, comm_type: str) -> hcp.ContextParallel:
    return hcp.ContextParallel(hcp.make_mesh(cp_outer=outer, cp_inner=inner), comm_type)


@functools.cache
def compiled(outer: int, inner: int, comm_type: str, backward: bool):
    cp = context(outer, inner, comm_type)

    def attend(q, k, v):
        return hcp.dot_product_attention(q, k, v, cp=cp, is_causal=True)

    q, k, v = (
        jax.ShapeDtypeStruct((B, T, heads, H), jnp.float32, sharding=cp.sharding(4))
        for heads in (N, K, K)
    )
    if not backward:
        return jax.jit(attend).lower(q, k, v).compile()
    # The gradient alone: XLA merges equal moves of the two halves where it compiles for CPUs.
    out, vjp = jax.eval_shape(lambda *x: jax.vjp(attend, *x), q, k, v)
    return jax.jit(lambda vjp, dout: vjp(dout)).lower(vjp, out).compile()


@functools.cache
def temporary_bytes(comm_type: str, length: int) -> int:
    """Of attention, forward and backward, on one of eight devices."""
    cp = context(4, 2, comm_type)

    def loss(q, k, v):
        return jnp.sum(hcp.dot_product_attention(q, k, v, cp=cp, is_causal=True))

    shapes = [
        jax.ShapeDtypeStruct((B, length, heads, H), jnp.float32, sharding=cp.sharding(4))
        for heads in (N, K, K)
    ]
    step = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes).compile()
    return step.memory_analysis().temp_size_in_bytes


def moved(outer: int, inner: int, comm_type: str, backward: bool = False) -> Counter:
    """How often each (kind, bytes that one device puts in) runs."""
    found: Counter = Counter()
    for c in collectives(compiled(outer, inner, comm_type, backward).as_text()):
        found[c.kind, c.bytes] += c.count
    return found


@pytest.mark.parametrize(("outer", "inner"), [(8, 1), (4, 2), (1, 8)])
def test_p2p_moves_the_local_k_and_v_once_per_hop_and_nothing_else(outer, inner):
    k_or_v = B * (T // 8) * K * H * ITEM
    assert moved(outer, inner, "p2p") == {("collective-permute", k_or_v): 2 * (8 - 1)}


def test_p2p_backward_moves_k_and_v_and_their_gradients_once_per_hop():
    # dK and dV are float32, which here is as large as K and V.
    k_or_v = B * (T // 8) * K * H * ITEM
    assert moved(4, 2, "p2p", backward=True) == {("collective-permute", k_or_v): 4 * (8 - 1)}


def test_hierarchical_makes_one_hop_less_than_its_ring_and_four_exchanges():
    t, k_or_v = T // 8, B * (T // 4) * (K // 2) * H * ITEM
    q_or_out, kv_in = B * t * N * H * ITEM, B * t * K * H * ITEM
    assert moved(4, 2, "a2a+p2p") == {
        ("collective-permute", k_or_v): 2 * (4 - 1),
        ("all-to-all", q_or_out): 2,
        ("all-to-all", kv_in): 2,
    }


def test_hierarchical_backward_mirrors_its_exchanges():
    t, k_or_v = T // 8, B * (T // 4) * (K // 2) * H * ITEM
    q_or_out, kv_in = B * t * N * H * ITEM, B * t * K * H * ITEM
    assert moved(4, 2, "a2a+p2p", backward=True) == {
        ("collective-permute", k_or_v): 4 * (4 - 1),
        ("all-to-all", q_or_out): 2,
        ("all-to-all", kv_in): 2,
    }


def test_kv_heads_are_replicated_just_enough_and_never_to_query_heads():
    # Eight devices share two kv heads: each head is sent four times, not once per query head.
    t = T // 8
    sent = moved(1, 8, "a2a")
    kv_replicated = B * t * 8 * H * ITEM
    assert sent == {("all-to-all", kv_replicated): 4}  # q, k, v and out: all of eight heads
    # Four devices of the inner axis and two kv heads: twice.
    inner = moved(2, 4, "a2a+p2p")
    assert inner["all-to-all", B * t * 4 * H * ITEM] == 2
    assert inner["collective-permute", B * (T // 2) * 1 * H * ITEM] == 2


def test_all_gather_gathers_k_and_v_once():
    k_or_v = B * (T // 8) * K * H * ITEM
    assert moved(4, 2, "all_gather") == {("all-gather", k_or_v): 2}


def test_all_gather_backward_gathers_again_and_scatters_once():
    k_or_v = B * (T // 8) * K * H * ITEM
    found = moved(4, 2, "all_gather", backward=True)
    assert found == {("all-gather", k_or_v): 2, ("reduce-scatter", 8 * k_or_v): 2}


@pytest.mark.parametrize("comm_type", STRATEGIES)
def test_no_strategy_is_silent(comm_type):
    assert moved(4, 2, comm_type), f"{comm_type} compiles to no communication at all"


@pytest.mark.slow
@pytest.mark.parametrize("comm_type", STRATEGIES)
def test_memory_of_forward_and_backward_grows_linearly_with_the_sequence(comm_type):
    # Four times the tokens; a term in T² would make it sixteen times the memory.
    assert temporary_bytes(comm_type, 65536) <= 4.2 * temporary_bytes(comm_type, 16384)
