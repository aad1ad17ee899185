"""Metrics: every step exactly once, also over a resume and after a crash."""

import json

import numpy as np
import pytest

from hcp_jax.train.evaluation import Evaluation, Means
from hcp_jax.train.record import metrics
from hcp_jax.train.record.metrics import Recorder
from hcp_jax.train.sections import LogConfig


def write(folder, steps, loss=lambda step: 1.0 / (step + 1), tensorboard=False):
    recorder = Recorder(folder, steps.start, tensorboard)
    for step in steps:
        recorder.write(step, {"loss": loss(step)})
    recorder.close()


def test_what_was_written_is_read_back(tmp_path):
    write(tmp_path, range(5))
    assert metrics.read(tmp_path) == [{"step": i, "loss": 1 / (i + 1)} for i in range(5)]


def test_a_resumed_run_has_every_step_exactly_once(tmp_path):
    write(tmp_path, range(10), loss=lambda step: 9.0)
    write(tmp_path, range(6, 12), loss=lambda step: 7.0)
    record = metrics.read(tmp_path)
    assert [line["step"] for line in record] == list(range(12))
    assert [line["loss"] for line in record] == [9.0] * 6 + [7.0] * 6


def test_a_line_cut_off_by_a_crash_is_dropped(tmp_path):
    write(tmp_path, range(3))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert len(metrics.read(tmp_path)) == 3
    write(tmp_path, range(3, 4))
    assert [line["step"] for line in metrics.read(tmp_path)] == [0, 1, 2, 3]


def evaluation(step, loss=3.0):
    one, two = (Means(np.full(n, loss), np.full(n, np.nan), np.full(n, 8)) for n in (1, 2))
    return Evaluation(step, one, (0, 1, 2), two, seconds=0.5)


def test_a_resumed_run_has_every_evaluation_exactly_once(tmp_path):
    for start, steps in ((0, (0, 5, 10, 15)), (10, (10, 15, 20))):
        recorder = Recorder(tmp_path, start, tensorboard=True)
        for step in steps:
            recorder.write_evaluation(evaluation(step, loss=start + 1.0))
        recorder.close()
    lines = metrics.read_evaluations(tmp_path)
    # That of step 10 is of the parameters that the second part went on from.
    assert [(line["step"], line["loss"]) for line in lines] == [
        (0, 1.0),
        (5, 1.0),
        (10, 1.0),
        (15, 11.0),
        (20, 11.0),
    ]
    assert lines[0]["stderr"] is None


def test_tensorboard_has_events_of_each_run_part(tmp_path):
    write(tmp_path, range(3), tensorboard=True)
    events = list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))
    assert events
    assert all(e.stat().st_size > 100 for e in events)


def test_a_line_every_zero_steps_is_refused():
    with pytest.raises(ValueError, match=r"log\.every"):
        LogConfig(every=0)


def test_each_line_is_json_on_its_own(tmp_path):
    write(tmp_path, range(2))
    assert [json.loads(s) for s in (tmp_path / "metrics.jsonl").read_text().splitlines()]
