"""Facts of a tick compiled for a cluster: what leaves a stage, and what is hidden."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import hcp_jax as hcp
from hcp_jax import hardware
from hcp_jax.compiled import report
from hcp_jax.compiled.aot import compile_for, devices
from hcp_jax.hardware import Cluster
from hcp_jax.models.config import ModelConfig
from hcp_jax.pipeline.ticks import Pipeline
from hcp_jax.sequence.mask import Intervals
from hcp_jax.sequence.placed_mask import PlacedMask
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


def abstract_arguments(pipeline):
    """Return shapes and shardings of a tick's arguments."""

    def like(shapes, shardings):
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
        )

    def array(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(cp.mesh, spec))

    cp, whole = pipeline.cp, PartitionSpec()
    params = like(jax.eval_shape(pipeline._cut, pipeline._shapes), pipeline._shardings)
    carry = like(jax.eval_shape(lambda: pipeline._begin(1, T)), pipeline._carry_shardings)
    types = {"tokens": np.int32, "targets": np.int32, "positions": np.int32, "weights": np.float32}
    batch = {name: array((1, T), dtype, cp.spec(2)) for name, dtype in types.items()}
    intervals = Intervals(*(array((1, T), np.int32, whole) for _ in range(2)))
    batch["mask"] = PlacedMask(intervals, None, cp.placement, T)
    pp = pipeline.stages.num_stages
    work = array((pp, 3), np.int32, whole)
    return params, carry, work, work, [batch] * pp, [batch] * pp


@needs_cuda_compiler
@pytest.mark.slow
def test_sends_between_stages_are_hidden_and_nothing_else_but_sums_leaves_a_stage():
    cluster = Cluster(hardware.gpu("h200"), hosts=4, gpus_per_host=2)
    mesh = hcp.make_mesh(pp=2, cp_outer=2, cp_inner=2, devices=devices(cluster))
    pipeline = Pipeline(MODEL, hcp.ContextParallel(mesh, "a2a+p2p"))
    compiled = compile_for(
        pipeline._tick(True, True), *abstract_arguments(pipeline), flags=hcp.xla_flags("h200")
    )
    moved = report.read(compiled, mesh, cluster, density=0.5).collectives
    between = [one for one in moved if "pp" in one.axes]
    assert {one.axes for one in between} == {("pp",)}  # never together with axes of a stage
    sends = [one for one in between if one.kind == "collective-permute"]
    activation = T // 4 * MODEL.hidden_size * 2
    assert [(one.bytes, one.count, one.hidden) for one in sends] == [(activation, 2, True)]
    # The embedding, the last stage's output, and the gradients of both.
    sums = [one for one in between if one.bytes > 16 * MODEL.hidden_size]
    assert {one.kind for one in sums} == {"collective-permute", "all-reduce"}
    assert sum(one.count for one in sums if one.kind == "all-reduce") == 4
