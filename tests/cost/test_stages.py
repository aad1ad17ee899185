"""Stages of a pipeline, against the ticks and the cut that run."""

import dataclasses
import itertools

import pytest

from hcp_jax import hardware
from hcp_jax.cost import stages
from hcp_jax.cost.memory import estimate_memory
from hcp_jax.cost.models import model_shape
from hcp_jax.cost.shape import ModelShape
from hcp_jax.cost.split import Split
from hcp_jax.cost.step import estimate
from hcp_jax.dynamic.pipeline import make_schedule, seconds
from hcp_jax.hardware import Cluster
from hcp_jax.models.config import ModelConfig
from hcp_jax.pipeline.stages import Stages

LLAMA3_8B = ModelShape(128256, 32, 4096, 14336, 32, 8, 128)


@pytest.mark.parametrize(("pp", "v"), list(itertools.product((2, 3, 4), (1, 2, 3))))
def test_time_ticks_and_kept_inputs_are_those_of_the_schedule(pp, v):
    for m in (1, 2, 3, 5, 8, 13):
        ticks = make_schedule(m, pp, v)
        duration, both = stages.lockstep(m, pp, v)
        assert duration == pytest.approx(seconds(ticks, [1 / 3] * m, [2 / 3] * m))
        assert both == sum(any(tick.forward) and any(tick.backward) for tick in ticks.ticks)
    assert stages.kept_inputs(pp, v) == make_schedule(4 * pp, pp, v).num_slots


@pytest.mark.parametrize("layers", ["A", "WA", "WWA", "WWWWA"])  # the last one not in 12 layers
def test_a_stage_has_the_layers_that_a_pipeline_gives_it(layers):
    window = 8 if "W" in layers else None
    config = ModelConfig(64, 12, 16, 32, 4, 2, layers=layers, sliding_window=window)
    model = ModelShape.from_config(config)
    for pp, v in itertools.product((2, 3, 4, 8), (1, 2)):
        try:
            made = Stages(config, pp, v)
        except ValueError:
            assert stages.cut(model, pp, v) is None
            continue
        found = stages.cut(model, pp, v)
        assert found.num_layers == made.turns * v * len(config.plan.stacks)
        assert sum(kind.num_layers for kind in found.by_kind) == found.num_layers


def test_what_a_pipeline_does_not_compute_is_refused_in_words():
    ahead = dataclasses.replace(LLAMA3_8B, mtp_depths=1)
    assert "multi-token prediction" in stages.refusal(ahead)
    with pytest.raises(ValueError, match="does not model multi-token prediction"):
        estimate(ahead, Split(pp=2), Cluster(hardware.gpu("h200"), 1, 2), 512)
    moe = model_shape("mixtral-8x7b")
    assert stages.cut(moe, 8).num_layers == 4
    assert stages.cut(moe, 3) is None  # its routers do not allow layers of zeros


def test_a_stage_computes_its_layers_once_more_and_waits_in_ticks_that_others_fill():
    gpu, m, t = hardware.gpu("h200"), 6, 2**13
    split = Split(comm_type="p2p", remat="none", fsdp=False, pp=4)
    found = estimate(LLAMA3_8B, split, Cluster(gpu, 4, 1), t, microbatches=m)
    rate = gpu.product_rate.value
    layers = 2 * t * 8 * LLAMA3_8B.layer_params * 4 / rate
    head = 2 * t * LLAMA3_8B.head_params / 4 * 4 / rate
    assert found.compute["matmul"] == pytest.approx(m * (layers + head))
    sums, sends = sorted(found.transfers, key=lambda transfer: -transfer.exposed)
    size = 2 * t * 4096  # one activation in bfloat16
    assert (sends.bytes, sends.exposed) == (m * 2 * size, 0)
    assert sums.bytes == pytest.approx(m * 4 * 2 * 3 / 4 * size)
    # Three ticks of layers, and what they wait for; the loss is computed in ticks of both passes.
    parts = sum(v for part, v in found.compute.items() if part != "optimizer") / m
    assert found.bubble_s == pytest.approx(3 * (parts - head + sums.exposed / m))
    whole = estimate(LLAMA3_8B, Split(comm_type="p2p"), Cluster(gpu, 1, 1), t, microbatches=m)
    assert 4 * found.flops == pytest.approx(whole.flops)


def test_a_stage_holds_its_share_of_the_state_and_inputs_until_backward():
    whole, cut = (
        estimate_memory(LLAMA3_8B, Split(comm_type="p2p", fsdp=False, pp=pp), 2**13)
        for pp in (1, 4)
    )
    norms = 12 * 3 / 4 * 4096  # the last norm is on all stages
    assert cut.state == pytest.approx(whole.state / 4 + norms)
    assert cut.kept == pytest.approx(whole.kept / 4)
    assert cut.stages == 9 * 2 * 2**13 * 4096 + cut.state / 3
    assert whole.stages == 0
