import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hcp_jax import hardware
from hcp_jax.cost.models import model_shape
from hcp_jax.cost.traffic import STRATEGIES, layer_traffic
from hcp_jax.dynamic import Cost, TimedMicrobatch, model_cost
from tests.dynamic.strategies import QUICK, costs

DIRECTIONS = ("forward", "backward")
FREE_LINKS = dataclasses.replace(
    Cost(), seconds_per_byte_inside=0.0, seconds_per_byte_across=0.0, seconds_per_hop=0.0, tile=0
)


def test_with_free_links_a_ring_divides_the_work_evenly():
    one = FREE_LINKS.group_seconds((1,), ((8000,),), 8192)
    four = FREE_LINKS.group_seconds((4,), ((8000,),), 2048)
    assert np.isclose(one[0], 4 * four[0])
    assert np.isclose(one[0], 8000**2 / 2 * FREE_LINKS.seconds_per_pair)


def test_what_attention_hides_costs_nothing():
    ring = Cost().ring(4, crosses=False, tokens=2048)
    plenty = 1e12
    assert ring.seconds(plenty) == plenty * ring.work + ring.home


def test_an_empty_ring_makes_its_hops_all_the_same():
    ring = Cost().ring(4, crosses=False, tokens=2048)
    assert np.isclose(ring.seconds(0.0), 3 * (ring.forward_hop + ring.backward_hop) + ring.home)


def test_a_ring_that_leaves_its_host_runs_at_the_speed_of_the_network():
    inside, across = Cost().rings((8, 8, 16), 2048)[::2]
    assert not inside.crosses
    assert across.crosses
    assert across.forward_hop > 5 * inside.forward_hop
    straddling = Cost().rings((6, 6, 4), 2048)
    assert [ring.crosses for ring in straddling] == [False, True, False]


def test_short_documents_want_few_devices_even_where_links_are_free():
    cost = dataclasses.replace(FREE_LINKS, tile=64)
    device_seconds = [
        size * cost.group_seconds((size,), ((100,),), 2048)[0] for size in (1, 2, 4, 8)
    ]
    assert device_seconds == sorted(device_seconds)
    assert device_seconds[3] > 10 * device_seconds[0]


@given(costs(), st.sampled_from([1, 2, 4, 6, 16]), st.lists(st.integers(1, 2**18), max_size=3))
@settings(**QUICK | {"max_examples": 500})
def test_seconds_grow_with_documents_and_are_convex(cost, size, lengths):
    ring = cost.ring(size, crosses=size > 8, tokens=2048)
    pairs = sorted(ring.pairs(length) for length in [1, *lengths])
    for low, high in itertools.pairwise(pairs):
        a, b, c = ring.seconds(low), ring.seconds((low + high) / 2), ring.seconds(high)
        assert a <= b * (1 + 1e-12) <= c * (1 + 1e-12) ** 2
        assert b <= (a + c) / 2 * (1 + 1e-12)


def timed(cost: Cost, noise: float = 0.0) -> list[TimedMicrobatch]:
    rng = np.random.default_rng(0)
    rows = []
    for layout in ((1,) * 16, (2,) * 8, (4, 4, 4, 4), (8, 8), (16,), (8, 4, 2, 1, 1)):
        for tokens in (1024, 4096):
            for share in (0.1, 0.5, 1.0):
                lengths = tuple((int(share * size * tokens),) for size in layout)
                seconds = cost.microbatch_seconds(layout, lengths, tokens)
                rows.append(
                    TimedMicrobatch(layout, lengths, tokens, seconds * (1 + noise * rng.normal()))
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
        modelled = found.microbatch_seconds(row.layout, row.lengths, row.tokens)
        assert np.isclose(modelled, row.seconds, rtol=1e-3)
    assert np.isclose(found.seconds_per_pair, TRUTH.seconds_per_pair, rtol=0.01)
    assert np.isclose(found.seconds_per_token, TRUTH.seconds_per_token, rtol=0.01)


def test_calibration_holds_out_against_noise():
    found = Cost().calibrate(timed(TRUTH, noise=0.03))
    errors = [
        found.microbatch_seconds(row.layout, row.lengths, row.tokens) / row.seconds - 1
        for row in timed(TRUTH)
    ]
    assert np.max(np.abs(errors)) < 0.06


def test_what_no_row_shows_keeps_its_value():
    rows = [row for row in timed(TRUTH) if max(row.layout) == 1 and row.tokens == 1024]
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


def test_a_ring_moves_what_the_list_of_traffic_says():
    cost = dataclasses.replace(model_cost("llama3-8b"), seconds_per_hop=0.0)
    tokens, per_byte = 4096, cost.seconds_per_byte_inside
    moved = layer_traffic(
        STRATEGIES["p2p"],
        {"cp_outer": 1, "cp_inner": 4},
        tokens=tokens,
        heads=32,
        kv_heads=8,
        head_size=128,
        item_bytes=2,
    )
    ring = cost.ring(4, crosses=False, tokens=tokens)
    hop = {d: 32 * sum(t.bytes for t in moved if t.direction == d) for d in DIRECTIONS}
    assert ring.forward_hop == pytest.approx(hop["forward"] * per_byte)
    assert ring.backward_hop == pytest.approx(hop["backward"] * per_byte)
    # K and V do not go home.
    assert ring.home == pytest.approx((hop["backward"] - hop["forward"]) * per_byte)


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
