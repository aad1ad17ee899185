"""`hcp audit` of a pipeline: what it says of a tick, and of a step in ticks."""

import dataclasses
import json

import numpy as np
import pytest

from hcp_jax.dynamic.pipeline import make_schedule, seconds
from hcp_jax.parallel.config import ParallelConfig
from hcp_jax.planner import audit_tick
from hcp_jax.train.config import TrainConfig, load
from tests.compiled import needs_cuda_compiler
from tests.planner.test_audit import an_audit, audited, exposed

SMALL = """
steps: 100
batch_size: 4
accumulation: 4
seq_len: 512
optimizer: {warmup_steps: 10}
model: {vocab_size: 512, num_layers: 2, hidden_size: 64, intermediate_size: 128, num_heads: 4,
        num_kv_heads: 2, implementation: blockwise}
parallel: {pp: 2, cp_outer: 2, cp_inner: 2}
"""
WHERE = ["--gpu", "h100", "--hosts", "4", "--gpus-per-host", "2"]


@pytest.fixture
def small(tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text(SMALL)
    return str(file)


@pytest.mark.parametrize(("m", "pp", "v"), [(1, 2, 1), (8, 4, 1), (6, 2, 2)])
def test_ticks_of_a_step_are_counted_and_last_as_long_as_the_schedule_s(m, pp, v):
    config = TrainConfig(
        steps=1,
        batch_size=m,
        accumulation=m,
        model=dataclasses.replace(TrainConfig().model, num_layers=8, vocab_size=512),
        parallel=ParallelConfig(pp=pp, virtual_stages=v),
    )
    step, ticks = audit_tick.step_in_ticks(config, an_audit(step_s=0.5)), make_schedule(m, pp, v)
    assert step.ticks == len(ticks.ticks)
    assert (step.forward, step.backward) == (v * pp - 1, v * pp - 1)
    # A tick with both passes is one chunk's: 1 / v of a microbatch on a stage.
    times = np.full(m, float(v))
    assert step.ticks_of_time == pytest.approx(seconds(ticks, times / 3, times * 2 / 3))
    assert step.modelled_s == step.ticks_of_time * 0.5


@needs_cuda_compiler
def test_a_pipeline_is_told_as_a_tick(capsys, monkeypatch, small, tmp_path):
    ticks = [exposed("stages", 0.2, 0.1), exposed("stages", 0.2, 0.0)]
    sends = [
        dataclasses.replace(one, kind="collective-permute", hidden=one.exposed_s == 0.0)
        for one in ticks
    ]
    given = []

    def found(cp, cluster, config, flags):
        given.append((dict(cp.mesh.shape), config))
        return an_audit([*sends, exposed("stages", 0.1, 0.0)])

    monkeypatch.setattr(audit_tick, "audit_tick", found)
    file = tmp_path / "told.json"
    text = audited(capsys, small, *WHERE, "--json", str(file))
    assert given == [({"pp": 2, "dp": 1, "tp": 1, "cp_outer": 2, "cp_inner": 2}, load(small))]
    assert text.startswith("tick of a pipeline")
    assert "1 of 2 hidden" in text
    assert "4 microbatches in 6 ticks" in text
    told = json.loads(file.read_text())
    assert (told["program"], told["sends"], told["sends_hidden"]) == ("tick", 2, 1)
    assert told["step"]["modelled_s"] == 5 * told["modelled"]["step_s"]
    assert "step" not in json.loads(
        audited(capsys, small, *WHERE, "--widest-group", "2", "--json", "-")
    )
