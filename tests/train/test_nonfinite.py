"""Skipped steps and checkpoints: none is written that would push out a good one."""

import pytest

from hcp_jax.train.nonfinite import SkippedSteps


def play(outcomes, every, limit=100):
    """The steps at which a checkpoint is written, as the loop asks; x marks a skipped step."""
    told, saved, due = [], [], False
    skipped = SkippedSteps(limit, told.append)
    for step, outcome in enumerate(outcomes):
        done, ends = step + 1, step + 1 == len(outcomes)
        values = {"skipped": int(outcome == "x"), "loss": 1.0, "grad_norm": float("inf")}
        skipped.note(step, values, [], saved[-1] if saved else None)
        due = due or ends or done % every == 0
        if due and skipped.allow_saving(done, ends, saved[-1] if saved else None):
            saved.append(done)
            due = False
    return saved, [line for line in told if "checkpoint" in line]


@pytest.mark.parametrize(
    ("outcomes", "saved"),
    [
        ("......", [2, 4, 6]),
        ("..xxxx", [2]),  # nothing new to save
        ("..xx.x", [2, 5]),  # made up for when a step is good again
        ("...xxx", [2, 6]),  # the third step would be lost
        ("xxxxxx", []),
        (".x..xx", [3, 4]),
    ],
)
def test_no_checkpoint_is_written_while_steps_are_skipped(outcomes, saved):
    assert play(outcomes, every=2)[0] == saved


def test_a_checkpoint_that_is_not_written_is_told_once_with_the_last_one():
    _, told = play("..xxxxxx", every=1)
    assert told == ["no checkpoint at step 3, since steps are being skipped; the last is of step 2"]


def test_what_is_not_finite_is_named_when_the_run_stops():
    skipped = SkippedSteps(1, lambda line: None)
    values = {"skipped": 1, "loss": 1.0, "grad_norm": 2.0}
    with pytest.raises(FloatingPointError, match="parameters after the step would be not finite"):
        skipped.note(3, values, [0], None)
