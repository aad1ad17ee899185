"""`hcp verify` of a pipeline: it passes where stages are right, fails where they are not, and says no."""

import dataclasses

import jax
import pytest
import rich.console

from hcp_jax.dynamic.config import DynamicConfig
from hcp_jax.models.config import ModelConfig
from hcp_jax.parallel.config import ParallelConfig
from hcp_jax.pipeline.on_device import OnDevice
from hcp_jax.train import data
from hcp_jax.train.config import TrainConfig
from hcp_jax.verify import groups, pipelines

MODEL = ModelConfig(
    vocab_size=264,
    num_layers=2,
    hidden_size=16,
    intermediate_size=24,
    num_heads=4,
    num_kv_heads=2,
    compute_dtype="float32",
    remat="none",
)
PARTS = ("embed_tokens", "layers", "lm_head", "norm")
CONFIG = TrainConfig(
    model=MODEL, seq_len=31, parallel=ParallelConfig(pp=2, cp_outer=2, comm_type="p2p")
)


def passed():
    cp = CONFIG.parallel.context_parallel(devices=jax.devices()[:4])
    corpus = data.Corpus([bytes(range(65, 65 + n)) for n in range(5, 60)], "a test")
    batches = data.make_batches(
        corpus, batch_size=3, seq_len=31, seed=0, mask=MODEL.packed_mask, prefetch=1
    )
    checks = list(pipelines.one_step(CONFIG, cp, next(batches)))
    batches.close()
    return {check.cells[""]: check.passed for check in checks}


@pytest.mark.slow
def test_a_pipeline_passes_and_one_that_sends_nothing_does_not(monkeypatch):
    found = passed()
    assert set(found) == {"loss", *(f"gradients of {p}" for p in PARTS)}
    assert all(found.values())
    monkeypatch.setattr(OnDevice, "_send", lambda self, x, by: x)
    assert not any(passed().values())


def test_groups_in_a_pipeline_are_refused():
    parallel = dataclasses.replace(
        CONFIG.parallel, dynamic=DynamicConfig(enabled=True, max_tokens_per_device=16)
    )
    config = dataclasses.replace(CONFIG, parallel=parallel)
    cp = config.parallel.context_parallel(devices=jax.devices()[:4])
    with pytest.raises(NotImplementedError, match="does not check groups in a pipeline"):
        next(groups.checks(config, cp, rich.console.Console()))
