import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hcp_jax import hardware
from hcp_jax.cost.models import model_shape
from hcp_jax.cost.traffic import EXCHANGE_HEADS, RING_HOP, STRATEGIES, layer_traffic, total
from hcp_jax.dynamic import Cost, TimedMicrobatch, model_cost
from hcp_jax.dynamic.bound import lines
from tests.dynamic.strategies import QUICK, costs

HOSTS = dataclasses.replace(model_cost("llama3-8b"), devices_per_host=8, lanes=8)
FREE_LINKS = dataclasses.replace(
    Cost(), seconds_per_byte_inside=0.0, seconds_per_byte_across=0.0, seconds_per_hop=0.0, tile=0
)


def test_with_free_links_a_group_divides_the_work_evenly():
    for lanes in (1, 2, 8):
        cost = dataclasses.replace(FREE_LINKS, lanes=lanes)
        one = cost.group_seconds((1,) * 8, ((8000,), *[()] * 7), 8192)
        four = cost.group_seconds((4, 4), ((8000,), ()), 2048)
        assert np.isclose(one[0], 4 * four[0])
        assert np.isclose(one[0], 8000**2 / 2 * cost.seconds_per_pair)


def moved(cost: Cost, size: int, widest: int, num_devices: int = 64):
    return cost.moves(size, widest, num_devices, tokens=2048)


def test_what_attention_hides_costs_nothing():
    group = HOSTS.group(16, 32, 64, tokens=2048)
    plenty = 1e12
    assert group.seconds(plenty) == plenty * group.work + group.fixed


def test_an_empty_group_makes_all_hops_of_its_program_all_the_same():
    for size in (8, 16, 32):
        group = HOSTS.group(size, 32, 64, tokens=2048)
        everything = sum(move.times * move.seconds for move in moved(HOSTS, 32, 32))
        assert np.isclose(group.seconds(0.0), everything)


def test_hops_beyond_a_group_s_own_are_beside_nothing():
    """In a program of 4 members: a group of w members hides at most w hops forward and backward."""
    hidden = {
        size: sum(move.times for move in moved(HOSTS, size, 32) if move.share)
        for size in (8, 16, 32)
    }
    assert hidden == {8: 2, 16: 4, 32: 6}


def test_one_program_per_width_exchanges_inside_hosts_and_hops_between_them():
    for width, lanes, hops in ((1, 1, 0), (4, 4, 0), (8, 8, 0), (16, 8, 1), (64, 8, 7)):
        assert HOSTS.lanes_of(width, 64) == lanes
        moves = moved(HOSTS, width, width)
        assert sum(move.times for move in moves if move.latencies == 4) == (lanes > 1)
        across = sum(move.times for move in moves if move.across)
        assert across == 3 * hops - (hops - 1 if hops else 0), "fwd, bwd with grads, last grads"
        inside = sum(move.times for move in moves if not move.across)
        assert inside == (lanes > 1)


def test_without_lanes_hops_below_a_host_s_size_stay_inside_it():
    flat = dataclasses.replace(HOSTS, lanes=1)
    inside = sum(move.times for move in moved(flat, 16, 16) if not move.across)
    across = sum(move.times for move in moved(flat, 16, 16) if move.across)
    assert (inside, across) == (2 * 7, 2 * 8 + 1)
    assert not any(move.across for move in moved(flat, 8, 8))
    assert not any(move.across for move in moved(flat, 6, 6, num_devices=6))
    assert any(move.across for move in moved(flat, 12, 12, num_devices=12))


def test_an_exchange_wider_than_a_host_uses_the_network():
    wide = dataclasses.replace(HOSTS, lanes=16)
    assert [move.across for move in moved(wide, 16, 16)] == [True]
    assert [move.across for move in moved(wide, 8, 8)] == [False]


def test_kv_heads_are_replicated_until_the_lanes_divide_them():
    few = dataclasses.replace(HOSTS, kv_heads=2)
    many = dataclasses.replace(HOSTS, kv_heads=8)
    few, many = (cost.network_bytes((16,) * 4, 2048) for cost in (few, many))
    assert few == 4 * many


def test_head_chunks_hide_all_but_the_first_and_the_last():
    chunked = dataclasses.replace(HOSTS, head_chunks=4, seconds_per_hop=0.0)
    whole = dataclasses.replace(HOSTS, seconds_per_hop=0.0)
    one, four = (cost.group(8, 8, 64, 2048).fixed for cost in (whole, chunked))
    assert one == pytest.approx(4 * four)


def test_short_documents_want_few_devices_even_where_links_are_free():
    cost = dataclasses.replace(FREE_LINKS, tile=64, lanes=1)
    device_seconds = [
        size * cost.group_seconds((size,) * (8 // size), ((100,), *[()] * (8 // size - 1)), 2048)[0]
        for size in (1, 2, 4, 8)
    ]
    assert device_seconds == sorted(device_seconds)
    assert device_seconds[3] > 10 * device_seconds[0]


@given(costs(), st.sampled_from([(1, 1), (2, 4), (4, 4), (6, 6), (2, 16), (16, 16)]))
@settings(**QUICK | {"max_examples": 200})
def test_seconds_grow_with_documents_and_are_the_maximum_of_their_lines(cost, sizes):
    cost = dataclasses.replace(cost, lanes=1)
    group = cost.group(*sizes, 48, tokens=2048)
    known = lines(group)
    pairs = [group.pairs(length) for length in (1, 300, 2048, 2**14, 2**18)]
    seconds = [group.seconds(p) for p in pairs]
    for low, high in itertools.pairwise(seconds):
        assert low <= high * (1 + 1e-12)
    for p, took in zip(pairs, seconds, strict=True):
        assert np.isclose(took, max(slope * p * group.work + at for slope, at in known))
        assert all(slope >= -1e-12 and at >= 0 for slope, at in known)


def test_exchanging_heads_inside_hosts_sends_a_quarter_of_the_network_bytes_or_less():
    """Of what one flat ring sends through a host's last device: 63 hops of 64 devices against 7."""
    tokens, hop = 16384, 16384 * HOSTS.kv_bytes_per_token
    flat = (63 + 63 + 2 * 64) * hop
    assert HOSTS.network_bytes((64,), tokens) == pytest.approx((7 + 7 + 2 * 7) * hop)
    assert HOSTS.network_bytes((64,), tokens) <= flat / 4
    assert HOSTS.network_bytes((8,) * 8, tokens) == 0


def timed(cost: Cost, noise: float = 0.0) -> list[TimedMicrobatch]:
    rng = np.random.default_rng(0)
    rows = []
    for grouping in ((1,) * 32, (2,) * 16, (4,) * 8, (8,) * 4, (16, 8, 8), (16, 16), (32,)):
        for tokens in (1024, 4096):
            for share in (0.1, 0.5, 1.0):
                lengths = tuple((int(share * size * tokens),) for size in grouping)
                seconds = cost.microbatch_seconds(grouping, lengths, tokens)
                rows.append(
                    TimedMicrobatch(grouping, lengths, tokens, seconds * (1 + noise * rng.normal()))
                )
    return rows


TRUTH = Cost(
    seconds_per_pair=4e-9,
    seconds_per_token=2e-5,
    seconds_per_microbatch=7e-3,
    seconds_per_byte_inside=1 / 100e9,
    seconds_per_byte_across=1 / 10e9,
    seconds_per_hop=1e-3,
)


def test_calibration_finds_the_cost_that_made_the_times():
    rows = timed(TRUTH)
    found = Cost().calibrate(rows)
    for row in rows:
        modelled = found.microbatch_seconds(row.grouping, row.lengths, row.tokens)
        assert np.isclose(modelled, row.seconds, rtol=1e-3)
    assert np.isclose(found.seconds_per_pair, TRUTH.seconds_per_pair, rtol=0.01)
    assert np.isclose(found.seconds_per_token, TRUTH.seconds_per_token, rtol=0.01)


def test_calibration_holds_out_against_noise():
    found = Cost().calibrate(timed(TRUTH, noise=0.03))
    errors = [
        found.microbatch_seconds(row.grouping, row.lengths, row.tokens) / row.seconds - 1
        for row in timed(TRUTH)
    ]
    assert np.max(np.abs(errors)) < 0.06


def test_what_no_row_shows_keeps_its_value():
    rows = [row for row in timed(TRUTH) if max(row.grouping) == 1 and row.tokens == 1024]
    found = Cost().calibrate(rows)
    for name in ("seconds_per_byte_inside", "seconds_per_byte_across", "seconds_per_token"):
        assert getattr(found, name) == getattr(Cost(), name)


def test_times_that_are_none_are_told():
    with pytest.raises(ValueError, match="at least one row"):
        Cost().calibrate([])
    with pytest.raises(ValueError, match="seconds > 0"):
        Cost().calibrate([TimedMicrobatch((1,), ((5,),), 8, 0.0)])


@pytest.mark.parametrize(
    "wrong", [{"seconds_per_pair": -1.0}, {"tile": float("nan")}, {"devices_per_host": 0}]
)
def test_a_cost_that_cannot_be_is_told(wrong):
    with pytest.raises(ValueError, match=f"Cost.{next(iter(wrong))} must be"):
        Cost(**wrong)


def test_the_default_is_the_benchmark_s_model():
    assert Cost() == model_cost("gpt-12x2048") == model_cost("gpt-12x2048", "h200")


def test_a_model_s_cost_is_its_flops_and_bytes_at_the_rates_of_the_table():
    model, b200 = model_shape("llama3-8b"), hardware.gpu("b200")
    cost = model_cost("llama3-8b", "b200", devices_per_host=4)
    forward, backward = (b200.attention_rate("triton", d).value for d in ("forward", "backward"))
    flops = 4 * 32 * 32 * 128
    assert cost.seconds_per_pair == pytest.approx(flops / forward + 2.5 * flops / backward)
    weights = model.params - model.head_params - 65 * 4096  # neither the embedding nor norms
    rate = 0.6 * b200.product_rate.value
    assert cost.seconds_per_token == pytest.approx(6 * weights / rate)
    assert cost.kv_bytes_per_token == 32 * 2 * 8 * 128 * 2
    assert cost.seconds_per_byte_inside == 1 / b200.nvlink.rate.value
    assert cost.seconds_per_byte_across == 1 / b200.network.rate.value
    assert cost.seconds_per_hop == pytest.approx(32 * b200.nvlink.latency)
    assert cost.devices_per_host == 4


def test_tp_divides_work_and_traffic_and_not_what_is_fixed():
    one, four = model_cost("llama3-8b"), model_cost("llama3-8b", tp=4)
    for name in ("seconds_per_pair", "seconds_per_token", "kv_bytes_per_token"):
        assert getattr(one, name) == pytest.approx(4 * getattr(four, name))
    for name in ("seconds_per_microbatch", "seconds_per_hop", "seconds_per_byte_across"):
        assert getattr(one, name) == getattr(four, name)


@pytest.mark.parametrize("lanes", [1, 2, 8])
def test_a_program_moves_what_the_list_of_traffic_says(lanes):
    """Of static a2a+p2p on as many devices, forward and backward."""
    cost = model_cost("llama3-8b", lanes=lanes)
    listed = layer_traffic(
        STRATEGIES["a2a+p2p"],
        {"cp_outer": 32 // lanes, "cp_inner": lanes},
        tokens=4096,
        heads=32,
        kv_heads=8,
        head_size=128,
        item_bytes=2,
    )
    moves = cost.moves(32, 32, 64, tokens=4096)
    hops = sum(move.times * move.bytes for move in moves if move.latencies == 1)
    assert hops == pytest.approx(32 * total(listed, (RING_HOP,)))
    exchanged = sum(move.times * move.bytes for move in moves if move.latencies == 4)
    assert exchanged == pytest.approx(32 * total(listed, (EXCHANGE_HEADS,)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: model_cost("gpt5"), "unknown model 'gpt5': there are gpt-12x2048, llama2-7b"),
        (lambda: model_cost("llama3-8b", "h300"), "unknown GPU 'h300': did you mean"),
    ],
)
def test_an_unknown_model_or_gpu_is_told(call, message):
    with pytest.raises(ValueError, match=message):
        call()
