import dataclasses

import numpy as np
import pytest

from hcp_jax.dynamic import Cost, Microbatch, Schedule, schedule

COST = dataclasses.replace(Cost(), lanes=1)
PLAN = Schedule(
    lengths=(8, 2, 2, 4),
    num_devices=4,
    max_tokens_per_device=4,
    menu=(2, 4),
    microbatches=(Microbatch((2, 1, 1), ((0,), (1, 2), (3,))),),
    cost=COST,
    sizes=(1, 2, 4),
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
    assert PLAN.modelled_seconds == COST.dense_seconds(4) + max(groups)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"microbatches": ()}, "0 places for 4 documents"),
        ({"menu": (4,)}, "microbatch 0: no program of the menu .* has width 2"),
        ({"cost": Cost()}, "a group of 1 devices; groups may have 2, 4"),
        (
            {"microbatches": (Microbatch((1, 2, 1), ((3,), (0,), (1, 2))),)},
            "starts at device 1; groups start at multiples",
        ),
        ({"microbatches": (Microbatch((2, 1, 1), ((0,), (1, 2), (3,)), 2),)}, "has 1 lanes, not 2"),
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
    assert "buffers are 51% full" in text, "what to change is told"
    assert "lookahead" in text


def test_an_empty_schedule_prints_too():
    assert "0 documents" in str(schedule([], 4))


def test_the_bound_is_for_all_sizes_there_were_not_for_those_chosen():
    free = schedule([3000, 700, 500] * 9, 8, 1024)
    assert free.sizes == (1, 2, 4, 8)
    narrow = dataclasses.replace(free, sizes=(1, 4))
    assert narrow.lower_bound >= free.lower_bound
    given = schedule([700], 8, 1024, menu=[2])
    assert (given.menu, given.sizes) == ((2,), (1, 2, 4, 8))


def test_full_buffers_are_given_no_advice():
    assert "lookahead" not in str(schedule([1024] * 8, 8, 1024))


def test_more_documents_than_have_runs_are_told():
    short = Schedule(
        lengths=(1,) * 65,
        num_devices=4,
        max_tokens_per_device=64,
        menu=(4,),
        microbatches=(Microbatch((4,), (tuple(range(65)),), 1),),
        cost=COST,
        sizes=(1, 2, 4),
    )
    with pytest.raises(ValueError, match="a group of 4 has 65 documents, over 64"):
        short.check()
    one_member = dataclasses.replace(
        short, cost=Cost(), microbatches=(Microbatch((4,), (tuple(range(65)),), 4),)
    )
    one_member.check()
