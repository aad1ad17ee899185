import dataclasses

import numpy as np
import pytest

from hcp_jax.dynamic import Cost, Microbatch, Schedule, schedule

PLAN = Schedule(
    lengths=(8, 2, 2, 4),
    num_devices=4,
    max_tokens_per_device=4,
    menu=((2, 1, 1),),
    microbatches=(Microbatch((2, 1, 1), ((0,), (1, 2), (3,))),),
    cost=Cost(),
)


def test_token_fill_and_balance_are_as_defined():
    PLAN.check()
    assert PLAN.token_fill == 1.0
    pairs = [8 * 9 / 2 / 2, 2 * 3, 4 * 5 / 2]
    mean = (2 * pairs[0] + pairs[1] + pairs[2]) / 4
    assert np.isclose(PLAN.balance, mean / max(pairs))


def test_idle_share_is_the_waiting_of_the_quicker_groups():
    groups = PLAN.group_seconds[0]
    waiting = sum(s * (max(groups) - g) for s, g in zip((2, 1, 1), groups, strict=True))
    assert np.isclose(PLAN.idle_share, waiting / (4 * PLAN.modelled_seconds))
    assert PLAN.modelled_seconds == Cost().dense_seconds(4) + max(groups)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"microbatches": ()}, "0 places for 4 documents"),
        ({"menu": ((4,),)}, "not on the menu"),
        ({"max_tokens_per_device": 3}, "over its capacity"),
        ({"microbatches": (Microbatch((2, 1, 1), ((0, 1), (2, 3))),)}, "one tuple of documents"),
        ({"microbatches": (Microbatch((2, 1, 1), ((0,), (1, 1), (3,))),)}, "4 places for 4"),
        ({"microbatches": (Microbatch((2, 1), ((0, 1), (2, 3))),)}, "add up to num_devices=4"),
    ],
)
def test_a_broken_schedule_is_told(wrong, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(PLAN, **wrong).check()


def test_a_schedule_is_immutable_and_compares_by_value():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PLAN.seed = 3
    assert dataclasses.replace(PLAN) == PLAN


def test_it_prints_what_matters():
    text = str(schedule([3000, 700, 500], 4, 1024))
    assert "3 documents, 4200 tokens in 2 microbatches of 4 devices × 1024 tokens" in text
    assert "above the lower bound" in text
    assert "on 4" in text


def test_an_empty_schedule_prints_too():
    assert "0 documents" in str(schedule([], 4))
