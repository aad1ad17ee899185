"""The schedule of ticks: every pass once and after what it needs, few kept inputs, 1F1B's time."""

import itertools

import numpy as np
import pytest

from hcp_jax.dynamic.pipeline import (
    make_schedule,
    order,
    ratio_to_ideal,
    seconds,
    step_bound,
)

CASES = [
    (m, pp, v) for pp, v in itertools.product((1, 2, 3, 4), (1, 2, 3)) for m in range(1, 4 * pp + 1)
]


def ticks_of(schedule, passes):
    """Return {(microbatch, number of the chunk in the model): tick}; fail on a repetition."""
    found = {}
    for number, tick in enumerate(schedule.ticks):
        for stage, work in enumerate(getattr(tick, passes)):
            if work is not None:
                key = work.microbatch, work.chunk * schedule.num_stages + stage
                assert key not in found
                found[key] = number
    return found


@pytest.mark.parametrize(("m", "pp", "v"), CASES)
def test_every_microbatch_passes_every_chunk_once_each_way_and_in_order(m, pp, v):
    schedule = make_schedule(m, pp, v)
    forward, backward = (ticks_of(schedule, name) for name in ("forward", "backward"))
    last = v * pp - 1
    assert set(forward) == set(backward) == set(itertools.product(range(m), range(last + 1)))
    for i, chunk in forward:
        if chunk < last:
            # What a chunk computes arrives at the next tick, and nothing keeps it longer.
            assert forward[i, chunk + 1] == forward[i, chunk] + 1
            assert backward[i, chunk] == backward[i, chunk + 1] + 1
        else:
            assert backward[i, chunk] == forward[i, chunk]


@pytest.mark.parametrize(("m", "pp", "v"), CASES)
def test_an_input_stays_in_its_slot_until_its_backward_pass(m, pp, v):
    schedule = make_schedule(m, pp, v)
    held = [{} for _ in range(pp)]
    most = 0
    for tick in schedule.ticks:
        for kept, f in zip(held, tick.forward, strict=True):
            if f is not None:
                assert f.slot not in kept
                kept[f.slot] = f.microbatch, f.chunk
        most = max(most, *map(len, held))
        for kept, b in zip(held, tick.backward, strict=True):
            if b is not None:
                assert kept.pop(b.slot) == (b.microbatch, b.chunk)
    assert not any(held)
    assert schedule.num_slots == most <= (v * pp + pp - 1 if v > 1 else 2 * pp - 1)


@pytest.mark.parametrize(("m", "pp", "v"), [(1, 4, 1), (9, 4, 1), (8, 4, 2), (12, 4, 3), (6, 2, 2)])
def test_equal_microbatches_take_the_time_of_interleaved_1f1b(m, pp, v):
    found = seconds(make_schedule(m, pp, v), [1] * m, [2] * m)
    assert found == pytest.approx(3 * (m + (pp - 1) / v))


def test_an_order_by_length_nearly_takes_the_bound_and_a_random_one_does_not():
    times = np.random.default_rng(0).lognormal(0, 1, 60)
    best = ratio_to_ideal(times, 4) * times.sum()
    assert 0.95 * step_bound(times, 4) < best <= step_bound(times, 4)
    ticks = make_schedule(60, 4)
    assert seconds(ticks, times / 3, times * 2 / 3) > 1.2 * best
    assert sorted(order(times, 4)) == list(range(60))


def test_two_chunks_halve_what_stages_wait():
    assert ratio_to_ideal([1.0] * 16, 8, 2) - 1 == pytest.approx(
        (ratio_to_ideal([1.0] * 16, 8) - 1) / 2
    )


def test_numbers_that_are_none_are_refused():
    with pytest.raises(ValueError, match="num_microbatches"):
        make_schedule(0, 2)
    with pytest.raises(ValueError, match="virtual_stages"):
        make_schedule(1, 2, 0)
