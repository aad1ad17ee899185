"""A run in a pipeline is a run: one device's curve, its own bits after a stop, any number of stages."""

import dataclasses
import functools
import io
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from hcp_jax.models.config import ModelConfig
from hcp_jax.parallel.config import ParallelConfig
from hcp_jax.train import data, loop
from hcp_jax.train.checkpoint.manager import Checkpoints
from hcp_jax.train.config import TrainConfig
from hcp_jax.train.data.batches import read
from hcp_jax.train.metrics import metrics
from hcp_jax.train.optimizer import make_optimizer
from hcp_jax.train.program import FixedProgram
from hcp_jax.train.sections import CheckpointConfig, EvalConfig, LogConfig, OptimizerConfig
from hcp_jax.train.state_form import StateForm
from hcp_jax.train.step import init_state, make_train_step
from tests.kept_programs import kept_programs

MODEL = ModelConfig(
    vocab_size=264,
    num_layers=3,  # the last stage has a layer of zeros
    hidden_size=16,
    intermediate_size=24,
    num_heads=4,
    num_kv_heads=2,
    compute_dtype="float32",
    remat="none",
)
QUIET = rich.console.Console(file=io.StringIO())


def make_config(parallel, model=MODEL, **words):
    base = {
        "steps": 20,
        "batch_size": 4,
        "seq_len": 64,
        "accumulation": 4,
        "optimizer": OptimizerConfig(learning_rate=1e-2, warmup_steps=2, clip_norm=0.5),
        "eval": EvalConfig(every=3, tokens=300),
        "checkpoint": CheckpointConfig(every=3),
        "log": LogConfig(tensorboard=False),
    }
    return TrainConfig(model=model, parallel=ParallelConfig(**parallel), **{**base, **words})


PIPELINED = {"pp": 2, "cp_outer": 2, "comm_type": "p2p"}


@functools.cache
def corpus():
    return data.Corpus([bytes(range(65, 65 + n)) for n in range(5, 60)], "a test")


class Run:
    """Twenty steps of a compiled program, and how many programs were compiled before and then."""

    def __init__(self):
        self.config = make_config(PIPELINED)
        cp = self.config.parallel.context_parallel(devices=jax.devices()[:4])
        self.program = FixedProgram(self.config, cp, corpus(), QUIET)
        self.state, compiled = self.program.form.initial(0), []

        def listen(event, *_, **__):
            if "backend_compile" in event:
                compiled.append(event)

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            self.program.compile(self.program.form.trained)
            self.programs = len(compiled)
            self.metrics = [self.step() for _ in range(self.config.steps)]
            self.later = len(compiled) - self.programs
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)

    def step(self):
        self.state, values = self.program.step(self.state, self.program.next_batch())
        return jax.device_get(values)


@functools.cache
def run():
    return Run()


@pytest.mark.slow
def test_a_step_has_five_programs_and_nothing_is_compiled_after_them():
    assert (run().programs, run().later) == (5, 0)
    layers = jax.tree.leaves(run().state.params["layers"])
    assert not any(np.any(x[1, 0, 1]) for x in layers)  # those of zeros


@pytest.mark.slow
def test_a_step_whose_loss_is_not_finite_changes_nothing():
    of = run()
    good = jax.tree.map(jnp.copy, of.state)
    params = of.state.params | {"norm": {"scale": jnp.nan * of.state.params["norm"]["scale"]}}
    of.state = of.state._replace(params=params)
    before = jax.device_get(of.state)
    assert of.step()["skipped"]
    same = functools.partial(np.array_equal, equal_nan=True)
    assert jax.tree.all(jax.tree.map(same, before[1:], jax.device_get(of.state)[1:]))
    of.state = good
    assert not of.step()["skipped"]


@pytest.mark.slow
def test_the_curve_is_that_of_one_device():
    config = run().config
    batches = data.make_batches(
        corpus(),
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        seed=config.seed,
        mask=config.model.packed_mask,
    )
    optimizer = make_optimizer(config.optimizer, config.steps)
    state = init_state(config.model, optimizer, config.seed)
    step = make_train_step(config.model, config.optimizer, config.steps)
    one = []
    for _ in range(config.steps):
        state, values = step(state, read(next(batches)))
        one.append(jax.device_get(values))
    batches.close()
    assert one[-1]["loss"] < one[0]["loss"] - 1
    for name in ("loss", "grad_norm", "learning_rate", "tokens", "pairs"):
        ours, theirs = ([float(values[name]) for values in steps] for steps in (run().metrics, one))
        assert ours == pytest.approx(theirs, abs=2e-4), name


def test_checkpoints_hold_the_layers_in_a_row_whatever_the_stages(tmp_path):
    model = dataclasses.replace(MODEL, num_layers=7)

    def form(**parallel):
        config = make_config({"comm_type": "p2p", **parallel}, model, batch_size=8)
        return StateForm(config, config.parallel.context_parallel())

    two, four, one = form(pp=2, cp_outer=4), form(pp=4, cp_outer=2), form(cp_outer=8)
    chunks = form(pp=2, virtual_stages=2, dp=2, tp=2, fsdp=True)
    saved = two.give(two.initial(3))
    right = jax.device_get(saved)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-9)
    jax.tree.map(close, right, jax.device_get(one.initial(3)))
    checkpoints = Checkpoints(tmp_path, {})
    checkpoints.save(1, saved, {})
    checkpoints.wait()
    for other in (one, four, chunks):
        restored = checkpoints.restore(other.stored).state
        again = jax.device_get(other.give(other.take(restored)))
        jax.tree.map(np.testing.assert_array_equal, again, right)
    checkpoints.close()


@pytest.mark.parametrize(
    ("parallel", "words", "error", "message"),
    [
        ({"pp": 4}, {}, ValueError, "1 of 4 chunks would have no layer"),
        (
            {"pp": 2},
            {"model": dataclasses.replace(MODEL, offload_activations=True, remat="full")},
            NotImplementedError,
            "offload_activations is not supported in a pipeline",
        ),
        (
            {"pp": 2},
            {"optimizer": OptimizerConfig(offload=True)},
            NotImplementedError,
            "optimizer.offload is not supported in a pipeline",
        ),
    ],
)
def test_what_a_pipeline_does_not_train_is_refused_at_the_config(parallel, words, error, message):
    changed = {"model": dataclasses.replace(MODEL, num_layers=5), **words}
    with pytest.raises(error, match=message):
        make_config({"cp_outer": 2, **parallel}, **changed)


def train(config, resume=None):
    folder = loop.train(config, resume=resume, console=QUIET).folder
    lines = metrics.read(folder), metrics.read_evaluations(folder)
    return folder, [[line["loss"] for line in part] for part in lines]


@pytest.mark.slow
def test_a_run_goes_on_from_its_middle_to_the_same_bits_and_without_stages(tmp_path):
    (tmp_path / "text.jsonl").write_text(
        "\n".join(f'{{"text": "{"abc " * (1 + i % 17)}{i}"}}' for i in range(300))
    )
    text = data.DataConfig(path=str(tmp_path / "text.jsonl"))
    parallel = PIPELINED | {"dp": 2}
    words = {"steps": 6, "batch_size": 8, "run_dir": str(tmp_path / "runs")}
    config = make_config(parallel, data=text, **words)
    with kept_programs(tmp_path / "programs", 0.5):
        whole, found = train(config)
        for name, mesh in (("again", parallel), ("one", {"dp": 2, "tp": 2, "cp_outer": 2})):
            folder = tmp_path / name
            shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("6"))
            other = dataclasses.replace(config, parallel=ParallelConfig(**mesh))
            _, resumed = train(other, resume=folder)
            if name == "again":
                assert resumed == found
            for ours, theirs in zip(resumed, found, strict=True):
                assert ours == pytest.approx(theirs, abs=2e-4)
    assert len(found[0]) == 6
    assert len(found[1]) == 3
