"""The list of what attention moves, against sums worked out by hand.

That compiled programs move the same is asserted where programs are compiled: in
tests/train/record/test_traffic.py and by `hcp verify`.
"""

import itertools

import pytest

from hcp_jax.cost import traffic
from hcp_jax.cost.traffic import COMM_TYPES, EXCHANGE_HEADS, GATHER_KV, RING_HOP, STRATEGIES

T, N, K, H = 100, 32, 8, 64
SIZES = {"cp_outer": 4, "cp_inner": 2}
Q, KV = 2 * T * N * H, 2 * 2 * T * K * H  # bytes of q (and of out), and of K and V
# comm type: devices that exchange heads, devices that K and V move over, how they move
EXPECTED = {
    "p2p": (1, 8, RING_HOP),
    "all_gather": (1, 8, GATHER_KV),
    "a2a": (8, 1, None),
    "a2a+p2p": (2, 4, RING_HOP),
    "a2a+all_gather": (2, 4, GATHER_KV),
}


def listed(comm_type, sizes=SIZES, kv_heads=K, remat="none"):
    return traffic.layer_traffic(
        STRATEGIES[comm_type],
        sizes,
        tokens=T,
        heads=N,
        kv_heads=kv_heads,
        head_size=H,
        item_bytes=2,
        remat=remat,
    )


def test_every_comm_type_has_a_strategy():
    assert set(COMM_TYPES) == set(STRATEGIES) == set(EXPECTED)


@pytest.mark.parametrize("comm_type", COMM_TYPES)
def test_a_comm_type_sends_what_its_algorithm_says(comm_type):
    exchange, move, mover = EXPECTED[comm_type]
    found = listed(comm_type)
    share = (exchange - 1) / exchange
    for direction in ("forward", "backward"):
        sent = traffic.total(found, (EXCHANGE_HEADS,), direction)
        assert sent == round(share * (2 * Q + KV))
    # Backward K and V come again, and their gradients in float32.
    assert traffic.total(found, (RING_HOP, GATHER_KV), "forward") == (move - 1) * KV
    assert traffic.total(found, (RING_HOP, GATHER_KV), "backward") == (move - 1) * 3 * KV
    scopes = {t.scope for t in found}
    assert (EXCHANGE_HEADS in scopes) == (exchange > 1)
    assert scopes - {EXCHANGE_HEADS} == ({mover} if mover else set())


def test_a_ring_makes_a_hop_less_than_it_has_members_and_a_gather_one_move():
    ring, gather = listed("a2a+p2p"), listed("a2a+all_gather")
    assert {t.count for t in ring if t.scope == RING_HOP} == {3}
    assert {t.count for t in gather} == {1}
    kinds = [t.kind for t in gather if t.scope == GATHER_KV]
    assert kinds == ["all-gather", "all-gather", "reduce-scatter"]


def test_collectives_run_over_the_axes_of_the_comm_type():
    axes = {(t.scope, t.axes, t.group) for t in listed("a2a+p2p")}
    assert axes == {(EXCHANGE_HEADS, ("cp_inner",), 2), (RING_HOP, ("cp_outer",), 4)}
    assert {t.axes for t in listed("a2a")} == {("cp_outer", "cp_inner")}


@pytest.mark.parametrize(("kv_heads", "replicas"), [(1, 2), (2, 1), (3, 2), (8, 1)])
def test_kv_heads_are_replicated_just_enough_to_share_them_out(kv_heads, replicas):
    found = listed("a2a+p2p", kv_heads=kv_heads)
    kv = 2 * 2 * T * kv_heads * replicas * H
    assert traffic.total(found, (RING_HOP,), "forward") == 3 * kv
    assert traffic.total(found, (EXCHANGE_HEADS,), "forward") == (2 * Q + kv) // 2


@pytest.mark.parametrize("comm_type", COMM_TYPES)
def test_remat_repeats_exchanges_of_q_k_and_v_and_full_remat_all_of_forward(comm_type):
    exchange, move, _ = EXPECTED[comm_type]
    plain = traffic.total(listed(comm_type))
    qkv, out = ((exchange - 1) * x // exchange for x in (Q + KV, Q))
    assert traffic.total(listed(comm_type, remat="attention")) == plain + qkv
    full = traffic.total(listed(comm_type, remat="full"))
    assert full == plain + qkv + out + (move - 1) * KV
    assert not any(t.repeated and t.direction == "forward" for t in listed(comm_type, remat="full"))


@pytest.mark.parametrize("comm_type", COMM_TYPES)
def test_one_device_moves_nothing(comm_type):
    assert listed(comm_type, {"cp_outer": 1, "cp_inner": 1}) == ()


def test_a_level_of_one_device_is_the_other_level_alone():
    for by in ("p2p", "all_gather"):
        one_level = {"cp_outer": 4, "cp_inner": 1}
        both = (listed(comm_type, one_level) for comm_type in (by, f"a2a+{by}"))
        alone, hierarchical = ([(t.scope, t.count, t.bytes) for t in found] for found in both)
        assert alone == hierarchical


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        ("collective-permute", 12),
        ("collective-broadcast", 12),
        ("all-gather", 36),
        ("all-to-all", 9),
        ("ragged-all-to-all", 9),
        ("reduce-scatter", 9),
        ("all-reduce", 18),
    ],
)
def test_a_device_sends_what_the_cheapest_algorithm_sends(kind, sent):
    assert traffic.sent_bytes(kind, 12, 4) == sent
    assert traffic.sent_bytes(kind, 12, 1) == 0


def test_weights_are_gathered_in_their_dtype_and_gradients_summed_in_float32():
    summed, sharded = (traffic.state_bytes(800, 8, 2, fsdp=fsdp) for fsdp in (False, True))
    assert summed == 2 * 7 / 8 * 800 * 4
    assert sharded == 2 * (7 * 100 * 2) + 7 / 8 * 800 * 4
    more = traffic.state_bytes(800, 8, 2, fsdp=True, gathers=3)
    assert more - sharded == 7 * 100 * 2
    assert traffic.state_bytes(800, 1, 2, fsdp=True) == 0


def test_attention_s_two_levels_are_told_apart_by_every_pair_of_comm_types():
    lists = {comm_type: listed(comm_type) for comm_type in COMM_TYPES}
    for one, other in itertools.combinations(COMM_TYPES, 2):
        assert lists[one] != lists[other]
