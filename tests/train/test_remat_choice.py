"""What `model.remat: auto` chooses."""

import dataclasses

import pytest

import hcp_jax as hcp
from hcp_jax.cost.models import model_fields
from hcp_jax.models.config import ModelConfig
from hcp_jax.parallel.config import ParallelConfig
from hcp_jax.train.config import TrainConfig
from hcp_jax.train.remat_choice import memory_by_kind, with_remat

LLAMA = ModelConfig(**model_fields("llama3-8b") | {"remat": "auto"})
CONFIG = TrainConfig(
    steps=1,
    batch_size=1,
    seq_len=2**17,
    model=LLAMA,
    parallel=ParallelConfig(cp_outer=2, cp_inner=4, fsdp=True),
)


@pytest.mark.parametrize(
    ("gib", "change", "chosen"),
    [
        (192, {}, "none"),
        (141, {}, "mlp"),
        (60, {}, "projections"),
        (36, {}, "attention"),
        (20, {}, "full"),
        (141, {"mlp_chunk": 4096}, "projections"),
        (192, {"offload_activations": True}, "mlp"),
    ],
)
def test_auto_recomputes_the_least_that_the_memory_allows(gib, change, chosen):
    cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=2, cp_inner=4), "a2a+p2p")
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(LLAMA, **change))
    found, (line,) = with_remat(config, cp, gib * 2**30)
    assert found.model.remat == chosen
    assert line.startswith(f"remat: auto is {chosen} ")
    assert f"{gib} GiB" in line


def test_auto_on_a_device_of_unknown_memory_keeps_attention_and_says_so():
    cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=2, cp_inner=4), "a2a+p2p")
    found, (line,) = with_remat(CONFIG, cp, memory_by_kind(cp.device_kind))
    assert found.model.remat == "attention"
    assert "is not known" in line


def test_auto_in_a_pipeline_that_the_model_of_memory_does_not_know_keeps_attention():
    cp = hcp.ContextParallel(hcp.make_mesh(pp=2, cp_inner=4), "a2a")
    parallel = ParallelConfig(pp=2, cp_inner=4, comm_type="a2a")
    model = dataclasses.replace(LLAMA, mtp_depths=1)
    config = dataclasses.replace(CONFIG, model=model, parallel=parallel)
    found, (line,) = with_remat(config, cp, 192 * 2**30)
    assert found.model.remat == "attention"
    assert "multi-token prediction" in line


def test_a_named_policy_stays():
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(LLAMA, remat="full"))
    cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=2, cp_inner=4), "a2a+p2p")
    assert with_remat(config, cp, 10**12) == (config, [])
