"""FLOPs, bytes and seconds of a step, against what can be worked out by hand."""

import dataclasses

import pytest

from hcp_jax import hardware
from hcp_jax.cost.shape import ModelShape
from hcp_jax.cost.step import Split, estimate, path
from hcp_jax.hardware import Cluster

LLAMA3_8B = ModelShape(128256, 32, 4096, 14336, 32, 8, 128)
H200 = Cluster(hardware.gpu("h200"), 8, 8)
T = 2**20


def transfer(estimated, words):
    (found,) = [t for t in estimated.transfers if words in t.what]
    return found


def test_causal_attention_is_counted_as_its_pairs_and_not_as_a_square():
    found = estimate(LLAMA3_8B, Split(cp_outer=8, cp_inner=8), H200, T)
    pairs = T * (T + 1) // 2
    assert found.attention_flops * 64 == pytest.approx(12 * 128 * 32 * 32 * pairs, rel=1e-9)


def test_a_window_is_counted_as_a_window():
    windowed = dataclasses.replace(LLAMA3_8B, sliding_window=4096)
    found = estimate(windowed, Split(cp_outer=8, cp_inner=8), H200, T)
    pairs = 4096 * T - 4096 * 4095 // 2
    assert found.attention_flops * 64 == pytest.approx(12 * 128 * 32 * 32 * pairs, rel=1e-9)


def test_the_ring_sends_k_and_v_and_their_float32_gradients():
    found = estimate(LLAMA3_8B, Split(cp_outer=64, comm_type="p2p"), H200, T)
    k_or_v = T // 64 * 8 * 128
    assert transfer(found, "forward").bytes == 32 * 63 * 2 * 2 * k_or_v
    assert transfer(found, "backward").bytes == 32 * 63 * 2 * (2 + 4) * k_or_v


def test_exchanged_kv_heads_are_replicated_just_enough():
    found = estimate(LLAMA3_8B, Split(cp_inner=16, comm_type="a2a"), Cluster(H200.gpu, 2, 8), T)
    t, share = T // 16, 15 / 16
    q, kv = 32 * 128, 16 * 128  # 8 kv heads for 16 devices: each twice
    inwards, outwards = 2 * t * share * (q + 2 * kv), 2 * t * share * q
    # Forward, recomputed and backward; out and its cotangent.
    assert transfer(found, "heads").bytes == pytest.approx(32 * (3 * inwards + 2 * outwards))


def test_hops_that_last_longer_than_their_transfer_hide_it_and_others_do_not():
    long = estimate(LLAMA3_8B, Split(cp_outer=64, comm_type="p2p"), H200, T)
    short = estimate(LLAMA3_8B, Split(cp_outer=64, comm_type="p2p"), H200, T // 64)
    assert transfer(long, "forward").exposed == 0
    assert transfer(short, "forward").exposed > 0.5 * transfer(short, "forward").seconds


def test_mfu_leaves_out_what_is_computed_twice():
    split = Split(cp_outer=8, cp_inner=8, remat="attention")
    full = dataclasses.replace(split, remat="full")
    kept, again = (estimate(LLAMA3_8B, s, H200, T) for s in (split, full))
    assert kept.flops == again.flops
    assert again.step_s > 1.2 * kept.step_s
    assert again.mfu < kept.mfu < 1


@pytest.mark.parametrize(
    ("axes", "link"),
    [
        (("cp_inner",), hardware.INSIDE),
        (("cp_outer",), hardware.BETWEEN),
        (("cp_outer", "cp_inner"), hardware.BETWEEN),
        (("tp",), hardware.NO_LINK),
    ],
)
def test_each_axis_is_on_its_link(axes, link):
    assert path(H200, Split(cp_outer=8, cp_inner=8), axes, "all-to-all").link == link


def test_an_axis_inside_some_hosts_and_across_others_goes_at_the_slower_pace():
    cluster = Cluster(hardware.gpu("h100"), 3, 4)
    split = Split(dp=2, cp_inner=6, comm_type="a2a")
    assert path(cluster, split, ("cp_inner",), "all-to-all").link == hardware.BETWEEN
