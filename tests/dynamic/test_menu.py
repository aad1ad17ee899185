import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hcp_jax.dynamic import Cost, choose_menu, schedule, schedule_batches
from hcp_jax.dynamic.lengths import draw_lengths
from hcp_jax.dynamic.pipeline import ratio_to_ideal
from tests.dynamic.strategies import QUICK, cases

BENCHMARK = "lognormal:mean=1024,sigma=1.5,min=128,max=8192"


def batches(count, first_seed=0, documents=16 * 16):
    return [draw_lengths(BENCHMARK, documents, first_seed + i) for i in range(count)]


def test_a_menu_of_one_sample_serves_other_batches_nearly_as_well_as_their_own():
    menu = choose_menu(batches(6), 16, 2048)
    assert len(menu) < len(Cost().widths(16)), "what saves nothing is not compiled"
    assert menu[-1] == 16
    fresh = batches(6, first_seed=100)
    with_menu = sum(schedule(b, 16, 2048, menu=menu).modelled_seconds for b in fresh)
    with_own = sum(schedule(b, 16, 2048).modelled_seconds for b in fresh)
    assert with_menu < 1.005 * with_own


def test_a_shorter_menu_costs_more_time_and_never_a_document():
    fresh = batches(3, first_seed=50)
    seconds = []
    for most in (1, 2, None):
        menu = choose_menu(batches(3), 16, 2048, max_programs=most)
        assert len(menu) <= (most or 5)
        plans = [schedule(b, 16, 2048, menu=menu) for b in fresh]
        for plan in plans:
            plan.check()
        seconds.append(sum(plan.modelled_seconds for plan in plans))
    assert seconds[0] > seconds[1] >= seconds[2]


def test_the_widest_program_takes_documents_that_no_sample_had():
    menu = choose_menu([[100, 200, 300]], 8, 256)
    plan = schedule([8 * 256], 8, 256, menu=menu)
    assert plan.microbatches[0].grouping == (8,)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (([], 8), "at least one batch"),
        (([[5]], 8, 256, 1, None, None, 0), "max_programs must be a positive integer"),
        (([[5]], 8, 256, 3, 3), "no program has a width"),
    ],
)
def test_a_menu_of_nothing_is_told(arguments, told):
    with pytest.raises(ValueError, match=told):
        choose_menu(*arguments)


@given(st.lists(cases(max_documents=12), min_size=1, max_size=4), st.integers(0, 5))
@settings(**QUICK | {"max_examples": 150})
def test_batches_together_hold_every_document_once(drawn, seed):
    first = drawn[0]
    longest = first.num_devices * first.tokens
    lengths = [[length for length in case.lengths if length <= longest] for case in drawn]
    steps = schedule_batches(lengths, first.num_devices, first.tokens, seed=seed)
    assert steps == schedule_batches(lengths, first.num_devices, first.tokens, seed=seed)
    assert len(steps) == len(lengths)
    for step in steps:
        step.plan.check()
        for length, (batch, i) in zip(step.plan.lengths, step.sources, strict=True):
            assert length == lengths[batch][i]
    sources = sorted(source for step in steps for source in step.sources)
    assert sources == [(b, i) for b, batch in enumerate(lengths) for i in range(len(batch))]
    counts = [len(step.plan.microbatches) for step in steps]
    assert max(counts) - min(counts) <= 1


def test_batches_together_fill_better_and_the_seed_orders_them():
    lengths = batches(8)
    alone = [schedule(b, 16, 2048) for b in lengths]
    steps = schedule_batches(lengths, 16, 2048)
    assert sum(s.plan.modelled_seconds for s in steps) < sum(p.modelled_seconds for p in alone)
    assert np.mean([s.plan.token_fill for s in steps]) > 0.97
    assert np.mean([p.token_fill for p in alone]) < 0.95
    assert steps != schedule_batches(lengths, 16, 2048, seed=1)
    long_ones = [max(step.plan.lengths) for step in steps]
    assert min(long_ones) > 4096, "every step has long documents"


def test_no_batches_are_told():
    with pytest.raises(ValueError, match="at least one batch"):
        schedule_batches([])


def test_in_a_pipeline_every_step_of_a_look_ahead_waits_less_for_its_longest_microbatch():
    # Over all eight steps together, that long documents meet costs little; in each step, a lot.
    lengths = [[131072] * 4 + [2048] * 537] * 8
    plain, staged = (schedule_batches(lengths, 16, 32768, num_stages=pp) for pp in (1, 4))
    for step in staged:
        step.plan.check()
        times = list(step.plan.microbatch_seconds)
        assert times in (sorted(times), sorted(times, reverse=True))

    def in_ticks(steps):
        times = [step.plan.microbatch_seconds for step in steps]
        return sum(ratio_to_ideal(t, 4) * sum(t) for t in times)

    assert in_ticks(staged) < 0.8 * in_ticks(plain)
