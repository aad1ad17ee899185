"""Metrics: every step exactly once, also over a resume and after a crash."""

import json

import numpy as np
import pytest
from matplotlib.image import imread

from hcp_jax.train import metrics
from hcp_jax.train.metrics import LogConfig, Recorder


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


def test_tensorboard_has_events_of_each_run_part(tmp_path):
    write(tmp_path, range(3), tensorboard=True)
    events = list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))
    assert events
    assert all(e.stat().st_size > 100 for e in events)


def test_the_plot_shows_a_curve(tmp_path):
    assert metrics.plot(tmp_path, "nothing yet") is None
    write(tmp_path, range(100), loss=lambda step: 5.5 * np.exp(-step / 40))
    image = imread(metrics.plot(tmp_path, "a test"))[..., :3]
    assert image.shape[:2] == (675, 1200)
    blue = np.abs(image - np.array([0x11, 0x56, 0x8C]) / 255).max(-1) < 0.02
    assert blue.any(axis=0).mean() > 0.7  # the line crosses most of the width


def test_the_running_mean_is_the_mean_of_the_values_around():
    values = np.asarray([0.0, 3.0, 6.0, 0.0])
    np.testing.assert_allclose(metrics._running_mean(values, 1), [1.5, 3, 3, 3])
    np.testing.assert_array_equal(metrics._running_mean(values, 0), values)


def test_a_line_every_zero_steps_is_refused():
    with pytest.raises(ValueError, match=r"log\.every"):
        LogConfig(every=0)


def test_each_line_is_json_on_its_own(tmp_path):
    write(tmp_path, range(2))
    assert [json.loads(s) for s in (tmp_path / "metrics.jsonl").read_text().splitlines()]
