"""The loop: a run leaves all it promises, and one that was stopped goes on to the same bits."""

import dataclasses
import io
import itertools
import math
import pathlib
import re
import shutil
import signal

import numpy as np
import pytest
import rich.console
from matplotlib.image import imread

from hcp_jax import viz
from hcp_jax.models.config import ModelConfig
from hcp_jax.parallel.config import ParallelConfig
from hcp_jax.train import config as configuration
from hcp_jax.train import loop
from hcp_jax.train.checkpoint.manager import CheckpointConfig
from hcp_jax.train.config import TrainConfig
from hcp_jax.train.data import DataConfig, batches
from hcp_jax.train.evaluation import EvalConfig
from hcp_jax.train.metrics import metrics
from hcp_jax.train.metrics.profile import ProfileSteps
from hcp_jax.train.sections import LogConfig
from hcp_jax.train.step import OptimizerConfig
from hcp_jax.train.steps import Outcome
from tests.kept_programs import kept_programs

MODEL = ModelConfig(
    vocab_size=264,
    num_layers=1,
    hidden_size=32,
    intermediate_size=64,
    num_heads=8,
    num_kv_heads=2,
    compute_dtype="float32",
    remat="none",
)
STEPS = 12


@pytest.fixture(scope="module", autouse=True)
def _compile_each_step_once(tmp_path_factory):
    """Runs of one config share what they compile, as they would on a machine with a jax cache."""
    with kept_programs(tmp_path_factory.mktemp("cache")):
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run of seconds on eight devices, on text that is soon learnt."""
    text = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = ("abc " * (5 + i % 17) + f"{i}" for i in range(300))
    text.write_text("\n".join(f'{{"text": "{line}"}}' for line in lines))
    return TrainConfig(
        name="tiny",
        steps=STEPS,
        batch_size=2,
        seq_len=64,
        run_dir=str(tmp_path_factory.mktemp("runs")),
        model=MODEL,
        parallel=ParallelConfig(cp_outer=4, cp_inner=2),
        data=DataConfig(path=str(text)),
        optimizer=OptimizerConfig(learning_rate=2e-2, warmup_steps=2),
        log=LogConfig(every=4),
    )


def train(config, resume=None, profile=None):
    """The outcome, and what was printed."""
    printed = io.StringIO()
    console = rich.console.Console(file=printed, width=100)
    outcome = loop.train(config, resume=resume, console=console, profile=profile)
    return outcome, printed.getvalue()


def curve(folder):
    """What must not depend on when a run was stopped."""
    return [
        {k: line[k] for k in ("step", "loss", "grad_norm", "learning_rate", "tokens")}
        for line in metrics.read(folder)
    ]


@pytest.fixture(scope="module")
def whole(config):
    return train(config)


@pytest.mark.slow
def test_a_run_leaves_all_it_promises_and_says_so(config, whole):
    outcome, printed = whole
    assert outcome == Outcome(pathlib.Path(config.run_dir, "tiny-001"), STEPS)
    assert configuration.load(outcome.folder / "config.yaml") == config
    assert imread(outcome.folder / "loss.png").shape[0] > 400
    tags = [text.get_text() for text in viz.draw_loss(viz.read_run(outcome.folder)).axes[0].texts]
    assert f"loss {tags[0]} at step 0, {tags[1]} over the last 10 steps" in printed
    assert list((outcome.folder / "tensorboard").glob("events.*"))
    assert [p.name for p in (outcome.folder / "checkpoints").iterdir()] == [str(STEPS)]
    [told] = (line for line in printed.splitlines() if line.startswith(f"{outcome.folder}: "))
    assert set(told.split(": ")[1].split(", ")) == {p.name for p in outcome.folder.iterdir()}


@pytest.mark.slow
def test_the_loss_starts_at_the_uniform_guess_and_falls(whole):
    losses = [line["loss"] for line in curve(whole[0].folder)]
    assert len(losses) == STEPS
    assert losses[0] == pytest.approx(math.log(MODEL.vocab_size), abs=0.3)
    assert losses[-1] < losses[0] - 2


@pytest.mark.slow
def test_the_output_tells_mesh_groups_traffic_and_progress(whole):
    outcome, printed = whole
    for part in (
        "cp_inner  size 2, inside a host: [0 1] [2 3] [4 5] [6 7]",
        "a2a+p2p: heads exchanged over cp_inner (2), K/V ring over cp_outer (4)",
        "2 kv heads of 4",
        "layer 0 (a2a+p2p), each: heads 2.5 KiB forward, 2.5 KiB backward; K/V 3 KiB forward",
        "step  8  loss",
        "step 11  loss",
        f"{STEPS} steps in ",
        str(outcome.folder),
    ):
        assert part in printed
    assert "step  9" not in printed


@pytest.fixture(scope="module")
def evaluated(config):
    """A run that evaluates on text of its own, and traces two steps."""
    held_out = pathlib.Path(config.data.path).with_name("held-out.jsonl")
    held_out.write_text("\n".join(f'{{"text": "{"abc " * (9 + i)}"}}' for i in range(9)))
    config = dataclasses.replace(
        config,
        name="evaluated",
        eval=EvalConfig(every=5, path=str(held_out)),
        checkpoint=CheckpointConfig(every=6),
    )
    outcome, printed = train(config, profile=ProfileSteps(2, 3))
    return config, outcome, printed


@pytest.mark.slow
def test_each_step_is_measured(whole):
    for line in metrics.read(whole[0].folder):
        assert line["pairs"] >= line["tokens"] == 128 * line["fill"]
        assert line["whole_documents"] == 1
        assert 0 <= line["data_seconds"] <= line["seconds"]
        assert line["tokens_per_second"] == pytest.approx(line["tokens"] / line["seconds"])
        assert line["tokens_per_second_per_device"] == line["tokens_per_second"] / 8
        # A CPU has no data sheet, and does not count its memory.
        assert not {"mfu", "memory_peak_bytes"} & set(line)


@pytest.mark.slow
def test_a_run_evaluates_from_before_the_first_step_to_after_the_last(evaluated):
    _, outcome, printed = evaluated
    lines = metrics.read_evaluations(outcome.folder)
    assert [line["step"] for line in lines] == [0, 5, 10, STEPS]
    assert lines[0]["loss"] == pytest.approx(math.log(MODEL.vocab_size), abs=0.3)
    assert lines[-1]["loss"] < lines[0]["loss"] - 2
    assert {line["tokens"] for line in lines} == {sum(4 * (9 + i) + 1 for i in range(9))}
    assert printed.count("held-out loss") == 4
    assert imread(outcome.folder / "eval_by_position.png").shape[0] > 400


@pytest.mark.slow
def test_evaluation_and_a_trace_change_nothing_of_the_training(evaluated, whole):
    _, outcome, _ = evaluated
    assert curve(outcome.folder) == curve(whole[0].folder)
    [trace] = (outcome.folder / "profile").rglob("*.xplane.pb")
    assert all(name in trace.read_bytes() for name in (b"ring_hop", b"attend_grads"))


@pytest.mark.slow
def test_a_resumed_run_evaluates_to_the_same_numbers(evaluated):
    config, outcome, _ = evaluated
    before = metrics.read_evaluations(outcome.folder)
    [last] = (outcome.folder / "checkpoints").glob(str(STEPS))
    shutil.rmtree(last)
    train(config, resume=outcome.folder)
    again = metrics.read_evaluations(outcome.folder)
    assert [line | {"seconds": 0} for line in again] == [line | {"seconds": 0} for line in before]


@pytest.mark.slow
def test_ctrl_c_saves_and_the_resumed_run_ends_in_the_same_bits(config, whole, monkeypatch):
    write = metrics.Recorder.write

    def stop_at_step_4(self, step, values):
        if step == 4:
            signal.raise_signal(signal.SIGINT)
        write(self, step, values)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(metrics.Recorder, "write", stop_at_step_4)
        outcome, printed = train(config)
    assert outcome.stopped_by == signal.SIGINT
    assert 5 <= outcome.steps < STEPS
    assert f"hcp train --resume {outcome.folder}" in printed
    assert signal.getsignal(signal.SIGINT) is before
    assert curve(outcome.folder) == curve(whole[0].folder)[: outcome.steps]

    resumed, _ = train(config, resume=outcome.folder)
    assert resumed == Outcome(outcome.folder, STEPS)
    assert curve(outcome.folder) == curve(whole[0].folder)


@pytest.mark.slow
def test_a_run_that_died_goes_on_from_its_last_checkpoint_to_the_same_bits(
    config, whole, monkeypatch
):
    def die_at_step_8(self, step, values):
        if step == 8:
            raise RuntimeError("died")
        write(self, step, values)

    write = metrics.Recorder.write
    config = dataclasses.replace(config, checkpoint=CheckpointConfig(every=3, keep=1))
    with monkeypatch.context() as patch:
        patch.setattr(metrics.Recorder, "write", die_at_step_8)
        with pytest.raises(RuntimeError, match="died"):
            train(config)
    folder = max(pathlib.Path(config.run_dir).iterdir())
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["6"]
    assert len(curve(folder)) == 8
    train(config, resume=folder)
    assert curve(folder) == curve(whole[0].folder)


@pytest.mark.slow
def test_a_run_goes_on_with_another_comm_type_on_another_mesh(config, whole):
    """In float32 only the order of sums differs."""
    first = dataclasses.replace(config, checkpoint=CheckpointConfig(every=6, keep=2))
    folder = train(first)[0].folder
    (checkpoint,) = (folder / "checkpoints").glob(str(STEPS))
    checkpoint.rename(folder / "aside")
    other = dataclasses.replace(
        config, parallel=ParallelConfig(dp=2, cp_inner=4, comm_type="all_gather")
    )
    train(other, resume=folder)
    for a, b in zip(curve(folder), curve(whole[0].folder), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-4)


@pytest.mark.slow
def test_a_finished_run_and_another_model_cannot_go_on(config, whole):
    folder = whole[0].folder
    with pytest.raises(ValueError, match="has made all its 12 steps"):
        train(config, resume=folder)
    model = dataclasses.replace(MODEL, num_layers=2)
    with pytest.raises(ValueError, match="another model: num_layers 1 there and 2 here"):
        train(dataclasses.replace(config, model=model, steps=20), resume=folder)


def poisoned(monkeypatch, *steps):
    """Batches of these steps have a loss that is no number."""
    batch_of, made = batches._batch, itertools.count()

    def poison(*arguments):
        batch = batch_of(*arguments)
        return batch | {"weights": batch["weights"] * (np.nan if next(made) in steps else 1)}

    monkeypatch.setattr(batches, "_batch", poison)


@pytest.mark.slow
def test_steps_whose_loss_is_no_number_are_skipped_counted_and_told(config, monkeypatch):
    poisoned(monkeypatch, 3, 6, 7)
    optimizer = dataclasses.replace(config.optimizer, max_skipped=3)
    outcome, printed = train(dataclasses.replace(config, name="skips", optimizer=optimizer))
    lines = metrics.read(outcome.folder)
    assert [line["step"] for line in lines if line["skipped"]] == [3, 6, 7]
    assert re.search(r"step 3 skipped: loss nan.*; documents \d+, \d+", printed)
    assert "step 7 skipped: loss nan, gradient norm nan (2 in a row, 3 in all)" in printed
    assert lines[-1]["loss"] < lines[0]["loss"] - 2
    assert outcome.steps == STEPS


@pytest.mark.slow
def test_too_many_skipped_steps_in_a_row_stop_the_run_before_they_are_saved(config, monkeypatch):
    poisoned(monkeypatch, 1, 3, 4)
    bad = dataclasses.replace(
        config,
        name="bad",
        checkpoint=CheckpointConfig(every=3),
        optimizer=dataclasses.replace(config.optimizer, max_skipped=2),
    )
    with pytest.raises(
        FloatingPointError, match=r"steps 3 to 4 were skipped.* checkpoint is of step 3"
    ):
        train(bad)
    folder = pathlib.Path(config.run_dir, "bad-001")
    assert [line["skipped"] for line in metrics.read(folder)] == [0, 1, 0, 1, 1]
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["3"]


@pytest.mark.slow
def test_checkpoints_by_time_are_written_between_and_a_short_run_has_a_short_warmup(config):
    out = io.StringIO()
    console = rich.console.Console(file=out, width=200)
    timed = dataclasses.replace(
        config,
        name="timed",
        steps=4,
        checkpoint=CheckpointConfig(every_minutes=1e-9, keep=9),
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=50),
    )
    folder = loop.train(timed, console=console).folder
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"1", "2", "3", "4"}
    assert "warm-up: 1 step, since 50 do not fit into a training of 4" in out.getvalue()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": DataConfig(path="/does/not/exist")}, "does not exist"),
        ({"parallel": ParallelConfig(cp_outer=3)}, "needs 3 devices, but there are 8"),
        ({"parallel": ParallelConfig(cp_inner=8, comm_type=["a2a"] * 3)}, "lists 3 layers"),
        ({"parallel": ParallelConfig(tp=4, cp_inner=2)}, "tp=4 cannot cut num_kv_heads=2"),
    ],
)
def test_what_cannot_be_is_refused_before_a_folder_is_made(config, tmp_path, change, message):
    run_dir = tmp_path / "runs"
    with pytest.raises(ValueError, match=message):
        train(dataclasses.replace(config, run_dir=str(run_dir), **change))
    assert not run_dir.exists()
