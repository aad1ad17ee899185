"""FLOPs, bytes and seconds of a step, against what can be worked out by hand."""

import dataclasses

import pytest

from hcp_jax import hardware
from hcp_jax.cost.models import model_shape
from hcp_jax.cost.shape import ModelShape
from hcp_jax.cost.split import Split, path
from hcp_jax.cost.step import estimate
from hcp_jax.cost.traffic import COMM_TYPES, STRATEGIES, layer_traffic, total
from hcp_jax.hardware import Cluster
from hcp_jax.models.layers.moe_dispatch import Dispatch

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


@pytest.mark.parametrize("comm_type", COMM_TYPES)
@pytest.mark.parametrize("remat", ["none", "mlp", "attention", "full"])
def test_a_step_moves_what_the_list_of_traffic_says(comm_type, remat):
    outer, inner = {"a2a": (1, 8), "p2p": (8, 1), "all_gather": (8, 1)}.get(comm_type, (4, 2))
    split = Split(cp_outer=outer, cp_inner=inner, comm_type=comm_type, remat=remat, fsdp=False)
    found = estimate(LLAMA3_8B, split, Cluster(H200.gpu, 1, 8), T // 8, rows=2)
    sizes = {"cp_outer": outer, "cp_inner": inner}
    heads = {"heads": 32, "kv_heads": 8, "head_size": 128}
    tokens = {"tokens": 2 * T // 8 // 8, "item_bytes": 2}
    listed = layer_traffic(STRATEGIES[comm_type], sizes, **heads, **tokens, remat=remat)
    attention = [t for t in found.transfers if t.what not in ("gradients summed",)]
    assert sum(t.bytes for t in attention) == pytest.approx(32 * total(listed))
    waits = {t.what for t in attention if t.exposed == t.seconds}
    ring = {"K/V round the ring, forward", "K/V and their gradients, backward"}
    # What goes round a ring hides behind attention; nothing else does.
    assert waits == {t.what for t in attention} - ring


def test_exchanged_kv_heads_are_replicated_just_enough():
    found = estimate(LLAMA3_8B, Split(cp_inner=16, comm_type="a2a"), Cluster(H200.gpu, 2, 8), T)
    t, share = T // 16, 15 / 16
    q, kv = 32 * 128, 16 * 128  # 8 kv heads for 16 devices: each twice
    inwards, outwards = 2 * t * share * (q + 2 * kv), 2 * t * share * q
    # Forward, recomputed and backward; out and its cotangent.
    assert transfer(found, "heads").bytes == pytest.approx(32 * (3 * inwards + 2 * outwards))


def test_a_ring_waits_for_what_attention_does_not_hide_and_a_gather_for_all_of_it():
    cluster, t = Cluster(H200.gpu, 8, 1), 2**13
    split = Split(cp_outer=8, comm_type="p2p", remat="none")
    ring = transfer(estimate(LLAMA3_8B, split, cluster, t), "forward")
    # K and V of 1024 tokens over the network, and a latency: for each of 7 hops, in every layer.
    network = H200.gpu.network
    hop = 2 * 2 * 1024 * 8 * 128 / network.rate.value + network.latency
    assert ring.seconds == pytest.approx(32 * 7 * hop)
    # Zigzag: at the first hop a device has its own 2 · 512 tokens, then half of 1024 · 1024 pairs.
    rate = H200.gpu.attention_rate("triton", "forward").value
    pairs = [1024 * 1025 / 2, *[1024 * 1024 / 2] * 7]
    attention = [4 * 128 * 32 * p / rate for p in pairs]
    waits = sum(max(0.0, hop - seconds) for seconds in attention[:-1])
    assert ring.exposed == pytest.approx(32 * waits, rel=1e-6)
    gathered = dataclasses.replace(split, comm_type="all_gather")
    gather = transfer(estimate(LLAMA3_8B, gathered, cluster, t), "K/V gathered")
    assert gather.exposed == gather.seconds


def test_compute_is_products_attention_and_memory_at_their_own_rates():
    gpu, split = H200.gpu, Split(dp=2, tp=2, remat="none", comm_type="p2p")
    found = estimate(LLAMA3_8B, split, Cluster(gpu, 1, 4), 4096, rows=3)
    t = 3 * 4096
    head = LLAMA3_8B.head_params
    # The logits are made again in backward, everything else is kept.
    products = t * (6 * 32 * LLAMA3_8B.layer_params + 8 * head) / 2
    assert found.compute["matmul"] == pytest.approx(products / gpu.product_rate.value)
    pairs = 3 * 4096 * 4097 / 2
    forward, backward = (gpu.attention_rate("triton", d).value for d in ("forward", "backward"))
    attention = 32 * 4 * 128 * 16 * pairs * (1 / forward + 2.5 / backward)
    assert found.compute["attention"] == pytest.approx(attention)
    # Parameters, gradient and two moments in float32, read and all but the gradient written.
    optimizer = 28 * LLAMA3_8B.params / 2 / 2
    assert found.compute["optimizer"] == pytest.approx(optimizer / gpu.memory_bandwidth)
    assert found.tokens == 2 * t
    flops = 2 * (6 * LLAMA3_8B.product_params * t + 12 * 32 * 32 * 128 * pairs)
    assert found.flops == pytest.approx(flops / 4)
    assert found.mfu == pytest.approx(found.flops / found.step_s / 989e12)


def test_tensor_parallelism_sums_activations_four_times_a_layer():
    for remat, sums in (("none", 4), ("mlp", 4), ("projections", 4), ("attention", 5)):
        split = Split(tp=8, comm_type="p2p", remat=remat)
        found = transfer(estimate(LLAMA3_8B, split, Cluster(H200.gpu, 1, 8), 8192), "over tp")
        assert found.bytes == 32 * sums * 2 * 7 / 8 * 2 * 8192 * 4096
        assert found.exposed == found.seconds


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


def test_a_ring_merges_partials_in_float32_and_a_gather_has_none():
    for remat, passes in (("attention", 2), ("full", 3)):
        ring, gather = (
            estimate(
                LLAMA3_8B, Split(cp_outer=8, comm_type=c, remat=remat), Cluster(H200.gpu, 1, 8), T
            )
            for c in ("p2p", "all_gather")
        )
        # 12 bytes for each element of out, at every hop but the first, of each pass.
        merged = 32 * passes * 7 * 12 * T // 8 * 32 * 128
        difference = ring.compute["attention"] - gather.compute["attention"]
        assert difference == pytest.approx(merged / H200.gpu.memory_bandwidth)


def test_what_is_made_again_is_read_and_written_again():
    plain, again = (
        estimate(LLAMA3_8B, Split(comm_type="p2p", remat=remat), Cluster(H200.gpu, 1, 1), 8192)
        for remat in ("none", "attention")
    )
    assert again.compute["memory-bound"] == pytest.approx(4 / 3 * plain.compute["memory-bound"])
    layers = 2 * 8192 * 32 * LLAMA3_8B.layer_params / H200.gpu.product_rate.value
    assert again.compute["matmul"] - plain.compute["matmul"] == pytest.approx(layers)


def test_fsdp_waits_for_what_lasts_longer_than_the_layers():
    cluster = Cluster(hardware.gpu("a100"), 8, 8)
    split = Split(dp=64, comm_type="p2p")
    waits = [
        transfer(estimate(LLAMA3_8B, split, cluster, length), "weights gathered")
        for length in (128, 2**16)
    ]
    assert 0 < waits[0].exposed < waits[0].seconds
    assert waits[1].exposed == 0


def test_every_microbatch_gathers_the_weights_and_gradients_are_summed_once_without_fsdp():
    cluster, split = Cluster(hardware.gpu("h200"), 1, 8), Split(dp=8, comm_type="p2p")
    for fsdp, times, words in ((True, 4, "weights gathered"), (False, 1, "gradients summed")):
        once, four = (
            transfer(
                estimate(
                    LLAMA3_8B, dataclasses.replace(split, fsdp=fsdp), cluster, 8192, microbatches=m
                ),
                words,
            )
            for m in (1, 4)
        )
        assert four.bytes == times * once.bytes


def test_rows_travel_as_dispatch_says_and_experts_are_gathered_over_what_is_left():
    qwen3, cluster = model_shape("qwen3-30b-a3b"), Cluster(H200.gpu, 2, 8)
    split = Split(dp=2, cp_outer=2, cp_inner=4, ep=8, remat="attention")
    found = estimate(qwen3, split, cluster, 2**15)
    rows = 2**15 // 8 * 8
    dispatch = Dispatch(split.expert_axes, 8, rows)
    assert dispatch.axes == ("cp_outer", "cp_inner")
    listed = dispatch.traffic(2048, 2, "attention")
    sent = transfer(found, "rows sent")
    assert sent.bytes == pytest.approx(48 * sum(t.count * t.sent_bytes for t in listed))
    assert (sent.link, sent.exposed) == (hardware.INSIDE, sent.seconds)
    # Each device holds an eighth of the experts; two replicas of it share them by FSDP.
    own = qwen3.experts_params / 8
    gathered = transfer(found, "experts' weights gathered")
    assert gathered.bytes == pytest.approx(own * (3 * 2 / 2 + 4 / 2))
    assert gathered.axes == ("dp",)
    # No row is computed twice: FLOPs are those of the token's own experts.
    flops = {
        ep: estimate(qwen3, dataclasses.replace(split, ep=ep), cluster, 2**15) for ep in (1, 8)
    }
    assert flops[1].compute["matmul"] == flops[8].compute["matmul"]


def test_the_slowest_group_of_a_collective_sets_its_pace():
    # Of three hosts of four, six devices in a group: one group has four and two, in any order.
    cluster = Cluster(hardware.gpu("h100"), 3, 4)
    found = path(cluster, Split(dp=2, cp_inner=6, comm_type="a2a"), ("cp_inner",), "all-gather")
    assert found.rate == 2 * cluster.gpu.network.rate.value
