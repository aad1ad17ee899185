"""Modelled memory against that of compiled training steps."""

import pytest

from hcp_jax import hardware
from hcp_jax.cost.memory import estimate_memory
from hcp_jax.cost.models import model_fields, model_shape
from hcp_jax.cost.shape import ModelShape
from hcp_jax.cost.split import Split
from hcp_jax.hardware import Cluster
from hcp_jax.models.config import from_fields
from hcp_jax.parallel.config import ParallelConfig
from hcp_jax.planner import audit
from hcp_jax.train.config import TrainConfig
from tests.compiled import needs_cuda_compiler

MHA = ModelShape(32000, 16, 2048, 5632, 16, 16, 128)
# A fifth, of a million tokens, is in test_audit.py, which compiles it anyway.
CONFIGS = {
    "128K, dp 2, [8, 2]": ("llama3-8b", Split(2, 1, 2, 8, "a2a+p2p", "attention"), 2**17, 1),
    "128K, tp 2, a2a over 4": ("llama3-8b", Split(4, 2, 1, 4, "a2a", "attention"), 2**17, 1),
    "32K, a2a over 8, nothing recomputed": (
        "llama3-8b",
        Split(1, 1, 1, 8, "a2a", "none"),
        2**15,
        1,
    ),
    "32K, tp 2, two rows, replicated": (
        "llama3-8b",
        Split(2, 2, 2, 1, "p2p", "full", fsdp=False),
        2**15,
        2,
    ),
}


@needs_cuda_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_modelled_memory_is_within_15_percent_of_compiled(name):
    model, split, seq_len, rows = CONFIGS[name]
    axes = ("dp", "tp", "cp_outer", "cp_inner", "comm_type", "fsdp")
    config = TrainConfig(
        steps=1000,
        batch_size=rows * split.dp,
        seq_len=seq_len,
        model=from_fields(model_fields(model) | {"remat": split.remat}),
        parallel=ParallelConfig(**{axis: getattr(split, axis) for axis in axes}),
    )
    devices = config.parallel.num_devices
    cluster = Cluster(hardware.gpu("h200"), max(1, devices // 8), min(8, devices))
    cp = audit.place(config, cluster)
    read = audit.audit_step(cp, cluster, config, audit.chosen_flags(cluster, []))
    modelled = estimate_memory(model_shape(model), split, seq_len, rows).peak
    assert modelled == pytest.approx(read.memory.peak_bytes, rel=0.15)


def test_less_is_kept_the_more_is_recomputed():
    peaks = [
        estimate_memory(MHA, Split(cp_outer=8, comm_type="p2p", remat=remat), 2**17).kept
        for remat in ("full", "attention", "projections", "mlp", "none")
    ]
    assert peaks == sorted(peaks)
    assert peaks[4] > 5 * peaks[0]


def test_sharding_the_state_divides_it():
    whole, cut = (
        estimate_memory(MHA, Split(dp=2, cp_outer=4, comm_type="p2p", fsdp=fsdp), 2**17)
        for fsdp in (False, True)
    )
    assert whole.state == 8 * cut.state == 12 * MHA.params
    # So it divides the gradients of layers, whether ep or FSDP cuts their experts.
    moe = model_shape("mixtral-8x7b")
    whole, *parts = (
        estimate_memory(moe, Split(dp=2, cp_outer=4, comm_type="p2p", fsdp=fsdp, ep=ep), 2**13)
        for fsdp, ep in ((False, 1), (True, 1), (True, 8))
    )
    assert whole.gradients == 4 * moe.held_params
    assert [whole.gradients / part.gradients for part in parts] == pytest.approx([8, 8])


def test_the_worst_moment_is_the_loss_or_a_layer_s_backward_and_not_both():
    held = estimate_memory(MHA, Split(cp_outer=8, comm_type="p2p"), 2**17)
    always = held.state + held.kept + held.hidden
    backward = held.gradients + held.layer
    assert held.peak == always + max(held.vocabulary, backward)
    assert min(held.vocabulary, backward) > 0.1 * max(held.vocabulary, backward)


def test_the_loss_holds_the_head_gathered_in_float32_its_gradient_and_logits_of_a_chunk():
    held = estimate_memory(MHA, Split(dp=2, cp_outer=4, comm_type="p2p"), 2**17)
    assert held.vocabulary == 8 * MHA.head_params + 12 * MHA.loss_chunk * MHA.vocab_size
    # Without FSDP the head is at hand: only its bfloat16 copy is held besides.
    held = estimate_memory(MHA, Split(dp=2, cp_outer=4, comm_type="p2p", fsdp=False), 2**17)
    assert held.vocabulary == 6 * MHA.head_params + 12 * MHA.loss_chunk * MHA.vocab_size


def test_a_ring_holds_four_times_k_and_v_and_a_gather_those_of_all():
    ring, gather = (
        estimate_memory(MHA, Split(cp_outer=8, comm_type=comm_type), 2**17).layer
        for comm_type in ("p2p", "all_gather")
    )
    # K and V in bfloat16, dK and dV in float32: 12 bytes an element pair, 8 instead of 4 times.
    assert gather - ring == pytest.approx(4 * 12 * 2**14 * 16 * 128)
