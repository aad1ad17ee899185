"""Checkpoints by time are due when the minutes are over, with few looks at the clock."""

import pytest

from hcp_jax.train.checkpoint.save_clock import SaveClock


class Clock:
    def __init__(self):
        self.seconds = self.looks = 0.0

    def __call__(self):
        self.looks += 1
        return self.seconds


def saved_at(minutes, step_seconds):
    """The seconds at which a checkpoint was due, for steps of these lengths."""
    now = Clock()
    clock, due = SaveClock(minutes, 0, now), []
    for done, seconds in enumerate(step_seconds, 1):
        now.seconds += seconds
        if clock.is_due(done):
            due.append(now.seconds)
            clock.saved(done)
    return due, now.looks


@pytest.mark.parametrize("step", [0.5, 7.0, 59.0, 61.0, 200.0])
def test_a_checkpoint_is_due_within_a_step_of_its_time(step):
    due, _ = saved_at(5, [step] * 2000)
    gaps = [b - a for a, b in zip([0.0, *due], due, strict=False)]
    assert len(due) > 2
    assert all(300 - step < gap <= max(300 + step, 2 * step) for gap in gaps)


def test_slow_first_steps_and_slower_later_ones_are_allowed_for():
    due, _ = saved_at(10, [60.0, *[1.0] * 300, *[2.0] * 2000])
    assert due[0] == pytest.approx(600, abs=4)


def test_the_clock_is_looked_at_about_ten_times_an_interval():
    due, looks = saved_at(20, [1.0] * 6000)
    assert len(due) == 5
    assert looks <= 5 * 16


def test_without_minutes_nothing_is_due_and_nobody_looks():
    due, looks = saved_at(None, [100.0] * 100)
    assert due == []
    assert looks == 1


def test_all_processes_save_after_the_same_step_whatever_their_clocks_say(monkeypatch):
    said = []

    class Messages:
        """Of process 0, who says; and of another one, who hears."""

        def __init__(self, about):
            self.heard = 0

        def gather(self, word):
            if self is first._messages:
                said.append(word)
            self.heard += 1
            return [said[self.heard - 1], word]

    monkeypatch.setattr("hcp_jax.train.checkpoint.save_clock.Messages", Messages)
    clocks = Clock(), Clock()
    first, other = (SaveClock(5, 0, clock) for clock in clocks)
    due = []
    for done in range(1, 500):
        for clock, seconds in zip(clocks, (1.0, 0.3 + done % 7), strict=True):
            clock.seconds += seconds
        decided = first.is_due(done), other.is_due(done)
        assert decided[0] == decided[1]
        if decided[0]:
            due.append(done)
            first.saved(done)
            other.saved(done)
    assert due == [300]
