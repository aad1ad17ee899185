"""The search for the longest sequence, on memories that are made up."""

import itertools

import pytest

from hcp_jax.compiled.report import Memory
from hcp_jax.planner.longest import longest

DEVICE = 140 * 2**30


def measured(base, per_token, jump=0):
    """(memory of a number of tokens, the numbers that were asked for)."""
    asked = []

    def memory_of(tokens):
        asked.append(tokens)
        temporaries = int(base + per_token * tokens + jump * (tokens // 4096 % 2))
        return Memory(0, 0, 0, temporaries, DEVICE)

    return memory_of, asked


@pytest.mark.parametrize("per_token", [90_000, 450_000, 1_500_000])
def test_on_a_line_the_third_program_is_the_answer(per_token):
    memory_of, asked = measured(10 * 2**30, per_token)
    found = longest(memory_of, (8192, 16384))
    limit = (0.9 * DEVICE - 10 * 2**30) / per_token
    assert limit - 4096 < found.tokens_per_device <= limit
    assert found.memory.fits
    assert len(asked) <= 4


def test_where_packing_is_crooked_what_is_told_was_compiled_and_fits():
    memory_of, asked = measured(10 * 2**30, 450_000, jump=2**30)
    found = longest(memory_of, (8192, 16384))
    assert found.tokens_per_device in asked
    assert found.memory.fits
    assert found.memory.peak_bytes > 0.87 * DEVICE


def test_both_first_lengths_may_be_too_long():
    found = longest(measured(10 * 2**30, 450_000)[0], (10**6, 2 * 10**6))
    assert found.memory.fits
    assert found.memory.peak_bytes > 0.87 * DEVICE


def test_a_model_that_does_not_fit_at_any_length_is_told():
    with pytest.raises(ValueError, match="nothing fits: tried 8192, 16384"):
        longest(measured(DEVICE, 1000)[0], (8192, 16384))


def test_lengths_as_long_as_one_that_did_not_fit_are_not_tried_again():
    """Where memory leaps, the line through two lengths that fit would lead there again."""
    asked = []

    def memory_of(tokens):
        asked.append(tokens)
        return Memory(
            0, 0, 0, 2 * DEVICE if tokens > 40_000 else DEVICE // 2 + 90_000 * tokens, DEVICE
        )

    assert longest(memory_of, (8192, 16384)).tokens_per_device == 16384
    assert len(asked) == 2 + 5
    assert all(later < earlier for earlier, later in itertools.pairwise(asked[2:]))
