"""Progress: a bar where there is a terminal, plain lines where there is none."""

import io

import pytest
import rich.console

from hcp_jax.train.metrics import progress
from hcp_jax.train.metrics.progress import Progress


def shown(steps=25, start=0, values=(), **console):
    file = io.StringIO()
    of_step = {"learning_rate": 1e-3, "tokens": 64, "seconds": 0.5} | dict(values)
    with Progress(rich.console.Console(file=file, width=100, **console), steps, start, 10) as bar:
        for step in range(start, steps):
            bar.show(step, of_step | {"loss": 5.0 - step / 10})
    assert bar.seconds == (steps - start) * 0.5
    return file.getvalue()


def test_without_a_terminal_every_tenth_step_and_the_last_are_a_line():
    lines = shown().splitlines()
    assert [line.split()[1] for line in lines] == ["0", "10", "20", "24"]
    assert "loss 4.0000  learning rate 1.00e-03" in lines[1]
    assert lines[1].endswith("128 tokens/s  0:07 left")
    assert lines[-1].endswith("0:00 left")
    assert "\x1b" not in "".join(lines)


def test_a_terminal_has_a_bar_with_loss_speed_and_time_left():
    text = shown(force_terminal=True)
    for part in ("25/25", "loss 2.600", "tokens/s", "left"):
        assert part in text


def test_a_dumb_terminal_has_lines_since_it_cannot_draw(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    lines = shown(force_terminal=True).splitlines()
    assert [line.split()[1] for line in lines] == ["0", "10", "20", "24"]


def test_mfu_is_told_where_it_is_known():
    assert "128 tokens/s  MFU 41.3%  0:07 left" in shown(values={"mfu": 0.413})
    assert "MFU" not in shown()


def test_a_resumed_run_counts_on():
    assert [line.split()[1] for line in shown(start=15).splitlines()] == ["20", "24"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (61, "1:01"), (3600 * 30 + 65, "30:01:05")]
)
def test_time_is_told_as_on_a_clock(seconds, text):
    assert progress._clock(seconds) == text
