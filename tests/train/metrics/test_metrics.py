"""Metrics: every step exactly once, also over a resume and after a crash."""

import errno
import json
import os
import pathlib
import shutil

import numpy as np
import pytest

from hcp_jax.train.evaluation import Evaluation, Means
from hcp_jax.train.metrics import metrics
from hcp_jax.train.metrics.metrics import Recorder
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


class Full:
    """A disk that takes some bytes and no more."""

    def __init__(self, monkeypatch, room):
        self.room, self._open = room, pathlib.Path.open
        monkeypatch.setattr(pathlib.Path, "open", lambda path, *a, **o: self.open(path, *a, **o))

    def open(self, path, mode="r", **options):
        file = self._open(path, mode, **options)
        return file if mode != "ab" else _Limited(self, file)


class _Limited:
    def __init__(self, disk, file):
        self._disk, self._file = disk, file
        self.tell, self.truncate = file.tell, file.truncate

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def write(self, data):
        if not self._disk.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part = data[: self._disk.room]
        self._disk.room -= len(part)
        return self._file.write(part)


@pytest.mark.parametrize("room", [0, 70, 75])
def test_a_full_disk_stops_the_run_and_names_the_file(tmp_path, monkeypatch, room):
    recorder = Recorder(tmp_path, 0, tensorboard=False)
    Full(monkeypatch, room)
    for step in range(room // 25):
        recorder.write(step, {"loss": 1.0})
    with pytest.raises(OSError, match=r"metrics\.jsonl cannot be written \(No space left.*stop\)"):
        recorder.write(room // 25, {"loss": 1.0})
    # A line is there whole or not at all.
    assert (
        len(metrics.read(tmp_path)) == len((tmp_path / "metrics.jsonl").read_text().split("\n")) - 1
    )


def test_a_full_disk_is_told_once_where_training_is_to_go_on(tmp_path, monkeypatch, caplog):
    recorder = Recorder(tmp_path, 0, tensorboard=False, go_on=True)
    disk = Full(monkeypatch, 70)
    for step in range(6):
        recorder.write(step, {"loss": 1.0})
        if step == 4:
            disk.room = 1000  # somebody has cleared up
    recorder.close()
    assert [line["step"] for line in metrics.read(tmp_path)] == [0, 1, 5]
    first, last = (record.message for record in caplog.records)
    assert "metrics.jsonl cannot be written (No space left on device). Training goes on" in first
    assert "metrics.jsonl: 3 writes failed; what they held is missing" in last


def test_tensorboard_on_a_full_disk_neither_hangs_nor_hides_it(tmp_path, caplog):
    """tensorboardX's own writer dies in a thread, and the eleventh number waits for ever."""
    recorder = Recorder(tmp_path, 0, tensorboard=True, go_on=True)

    class _Broken:
        def write(self, data):
            pass

        def flush(self):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        close = flush

    recorder._board._writer._py_recordio_writer.close()
    recorder._board._writer._py_recordio_writer = _Broken()
    for step in range(30):
        recorder.write(step, {"loss": 1.0})
    recorder.close()
    assert len(metrics.read(tmp_path)) == 30
    assert "tensorboard cannot be written (No space left on device)" in caplog.text


@pytest.mark.parametrize("go_on", [False, True])
def test_a_run_folder_that_vanishes_is_told(tmp_path, go_on):
    folder = tmp_path / "run"
    folder.mkdir()
    recorder = Recorder(folder, 0, tensorboard=False, go_on=go_on)
    recorder.write(0, {"loss": 1.0})
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match="the run folder .*run is gone: it was deleted"):
        recorder.write(1, {"loss": 1.0})
    recorder.close()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("[]", "must hold keys and values, got list"),
        ('{"loss": 1}', "step must be a number, got None"),
        ('{"step": 1, "loss": "\\u001b[2J"}', r"loss must be a number, got '\\x1b\[2J'"),
        ('{"step": 1, "loss": 1, "loss": 2}', "key 'loss' twice"),
        ("[" * 9999, "nested too deeply"),
    ],
)
def test_a_line_that_is_none_is_named(tmp_path, line, says):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 0, "loss": 3.0}}\n{line}\n')
    with pytest.raises(ValueError, match=f"metrics.jsonl:2 .*{says}|metrics.jsonl:2: {says}"):
        metrics.read(tmp_path)
