"""A long run without checkpoints, or on no data of its own, is warned of once."""

import dataclasses

import pytest

from hcp_jax.train.checkpoint.manager import CheckpointConfig
from hcp_jax.train.config import TrainConfig
from hcp_jax.train.data import DataConfig
from hcp_jax.train.long_run import LongRunAdvice


def warned(notes, **fields):
    said = []
    advice = LongRunAdvice(dataclasses.replace(TrainConfig(), **fields), said.append)
    for spent, left in notes:
        advice.note(spent, left)
    return said


def test_a_long_run_with_neither_is_warned_of_both_once():
    checkpoints, data = warned([(40.0, 46_800.0), (80.0, 46_760.0)])
    assert "about 13.0 hours" in checkpoints
    assert "--checkpoint.every_minutes" in checkpoints
    assert "--data.path" in data


@pytest.mark.parametrize(
    ("fields", "warning"),
    [
        ({"checkpoint": CheckpointConfig(every_minutes=10)}, "standard library"),
        ({"checkpoint": CheckpointConfig(every=10)}, "standard library"),
        ({"data": DataConfig(path="text")}, "no checkpoint"),
    ],
)
def test_what_it_has_is_not_warned_of(fields, warning):
    [said] = warned([(40.0, 46_800.0)], **fields)
    assert warning in said


@pytest.mark.parametrize("notes", [[(10.0, 46_800.0)], [(40.0, 600.0)]])
def test_short_runs_and_the_first_seconds_are_left_alone(notes):
    assert warned(notes) == []
