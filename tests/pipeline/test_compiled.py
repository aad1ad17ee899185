"""Facts of a tick compiled for a cluster: what leaves a stage, and what is hidden."""

import pytest

import hcp_jax as hcp
from hcp_jax import hardware
from hcp_jax.compiled.aot import devices
from hcp_jax.hardware import Cluster
from hcp_jax.models.config import ModelConfig
from hcp_jax.pipeline.ticks import Pipeline
from hcp_jax.planner.audit_tick import audit_tick
from tests.compiled import needs_cuda_compiler

MODEL = ModelConfig(
    vocab_size=4096,
    num_layers=2,
    hidden_size=1024,
    intermediate_size=2048,
    num_heads=8,
    num_kv_heads=8,
    remat="none",
)
T = 65536


@needs_cuda_compiler
@pytest.mark.slow
def test_sends_between_stages_are_hidden_and_nothing_else_but_sums_leaves_a_stage():
    cluster = Cluster(hardware.gpu("h200"), hosts=4, gpus_per_host=2)
    mesh = hcp.make_mesh(pp=2, cp_outer=2, cp_inner=2, devices=devices(cluster))
    pipeline = Pipeline(MODEL, hcp.ContextParallel(mesh, "a2a+p2p"))
    found = audit_tick(pipeline, cluster, T, 1, hcp.xla_flags("h200"))
    moved, memory = found.collectives, found.memory
    # Of 8 devices' 2 stages, each holds parameters, and besides two moments of the same bytes.
    assert 0 < memory.beside_bytes < 2 * memory.argument_bytes
    between = [one for one in moved if "pp" in one.axes]
    assert {one.axes for one in between} == {("pp",)}  # never together with axes of a stage
    sends = [one for one in between if one.kind == "collective-permute"]
    activation = T // 4 * MODEL.hidden_size * 2
    assert [(one.bytes, one.count, one.hidden) for one in sends] == [(activation, 2, True)]
    # The embedding, the last stage's output, and the gradients of both.
    sums = [one for one in between if one.bytes > 16 * MODEL.hidden_size]
    assert {one.kind for one in sums} == {"collective-permute", "all-reduce"}
    assert sum(one.count for one in sums if one.kind == "all-reduce") == 4
    assert {one.what for one in between} == {"stages"}
