"""A mesh changes where a model is trained, not what it learns: one curve for all of them."""

import dataclasses
import functools
import pathlib

import jax
import pytest

from hcp_jax.parallel import ParallelConfig
from hcp_jax.train import config as configuration
from hcp_jax.train import data
from hcp_jax.train.config import TrainConfig
from hcp_jax.train.step import init_state, make_optimizer, make_train_step

QUICKSTART = pathlib.Path(__file__).parents[2] / "configs" / "quickstart.yaml"
MESHES = {
    "cp=1": ParallelConfig(),
    "p2p(8)": ParallelConfig(cp_outer=8, comm_type="p2p"),
    "all_gather(8)": ParallelConfig(cp_outer=8, comm_type="all_gather"),
    "a2a+p2p(4x2)": ParallelConfig(cp_outer=4, cp_inner=2),
    "a2a+p2p(2x4)": ParallelConfig(cp_outer=2, cp_inner=4),
    "mixed(4x2)": ParallelConfig(cp_outer=4, cp_inner=2, comm_type=["a2a+p2p", "all_gather"]),
    "dp=2, a2a+p2p(2x2)": ParallelConfig(dp=2, cp_outer=2, cp_inner=2),
}
TOLERANCE = 2e-4
"""Nats per token, in float32: what another order of sums may come to over the steps."""


def curve(config: TrainConfig, steps: int, batches: list[dict]) -> list[float]:
    """The losses of the first steps of a run, which has as many as its config says."""
    parallel = config.parallel
    devices = jax.devices()[: parallel.num_devices]
    cp = parallel.context_parallel(config.model.num_layers, devices)
    optimizer = make_optimizer(config.optimizer, config.steps)
    state = init_state(config.model, optimizer, config.seed, cp)
    step = make_train_step(config.model, config.optimizer, config.steps, cp)
    losses = []
    for batch in batches[:steps]:
        state, metrics = step(state, cp.shard_batch(batch))
        losses.append(float(metrics["loss"]))
    return losses


def first_batches(config: TrainConfig, corpus: data.Corpus, number: int) -> list[dict]:
    made = data.make_batches(
        corpus,
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        seed=config.seed,
        mask=config.model.mask,
    )
    batches = [next(made) for _ in range(number)]
    made.close()
    return batches


@functools.cache
def short(mesh: str) -> list[float]:
    """Four steps of a model of the quickstart's form on its meshes, in small."""
    steps = 4
    quickstart = configuration.load(QUICKSTART)
    config = dataclasses.replace(
        quickstart,
        batch_size=2,
        seq_len=64,
        model=dataclasses.replace(quickstart.model, hidden_size=32, intermediate_size=64),
        optimizer=dataclasses.replace(quickstart.optimizer, warmup_steps=1),
        parallel=MESHES[mesh],
    )
    # Documents of very different lengths, some longer than a stream.
    corpus = data.Corpus([bytes(range(65, 65 + 2 * n)) * n for n in range(1, 13)], "the alphabet")
    return curve(config, steps, first_batches(config, corpus, steps))


@pytest.mark.parametrize("mesh", ["p2p(8)", "a2a+p2p(4x2)", "dp=2, a2a+p2p(2x2)"])
def test_a_mesh_does_not_change_the_loss_of_the_first_steps(mesh):
    assert short("cp=1")[-1] < short("cp=1")[0] - 0.3
    assert short(mesh) == pytest.approx(short("cp=1"), abs=TOLERANCE)


@functools.cache
def quickstart(mesh: str) -> list[float]:
    """Twenty steps of the quickstart, in streams of half its length: seven meshes take a while."""
    config = dataclasses.replace(configuration.load(QUICKSTART), seq_len=512)
    batches = first_batches(config, data.open_corpus(config.data), 20)
    return curve(dataclasses.replace(config, parallel=MESHES[mesh]), 20, batches)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [mesh for mesh in MESHES if mesh != "cp=1"])
def test_the_quickstart_s_curve_is_the_same_on_every_mesh(mesh):
    assert quickstart("cp=1")[-1] < quickstart("cp=1")[0] - 2
    assert quickstart(mesh) == pytest.approx(quickstart("cp=1"), abs=TOLERANCE)
