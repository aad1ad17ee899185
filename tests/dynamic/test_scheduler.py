import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hcp_jax.dynamic import Cost, fill, schedule, scheduler
from hcp_jax.dynamic.lengths import draw_lengths
from hcp_jax.dynamic.pipeline import ratio_to_ideal, step_bound
from tests.dynamic.strategies import QUICK, Case, all_groupings, cases

OTHERS = {
    "lognormal:mean=3000,sigma=1.8,min=16,max=32768": 8192,
    "mix:0.90@2048,0.09@32768,0.01@262144": 65536,
}
BENCHMARK = "lognormal:mean=1024,sigma=1.5,min=128,max=8192"


def plan_of(case: Case, **options):
    return schedule(
        case.lengths,
        case.num_devices,
        case.tokens,
        case.min_size,
        case.max_size,
        cost=case.cost,
        **options,
    )


@given(cases())
@settings(**QUICK)
def test_every_document_once_never_over_capacity_in_programs_of_the_menu(case):
    plan = plan_of(case)
    plan.check()
    assert plan.menu == plan.sizes
    assert plan.menu[-1] == (case.max_size or case.num_devices), "the longest documents fit"
    for microbatch in plan.microbatches:
        assert any(microbatch.documents), "no microbatch is empty"
        assert min(microbatch.grouping) >= case.min_size
        assert microbatch.grouping == tuple(sorted(microbatch.grouping, reverse=True))


@given(cases(), st.integers(0, 3))
@settings(**QUICK | {"max_examples": 200})
def test_the_same_arguments_give_the_same_schedule(case, seed):
    assert plan_of(case, seed=seed) == plan_of(case, seed=seed)


@given(cases(max_documents=20))
@settings(**QUICK | {"max_examples": 600})
def test_no_schedule_beats_the_lower_bound(case):
    plan = plan_of(case)
    assert plan.modelled_seconds >= plan.lower_bound * (1 - 1e-9)


@given(cases(), st.randoms(use_true_random=False))
@settings(**QUICK | {"max_examples": 300})
def test_any_menu_that_holds_the_longest_document_trains(case, random):
    sizes = scheduler.program_widths(case.cost, case.num_devices, case.min_size, case.max_size)
    menu = random.sample(sizes, random.randint(1, len(sizes)))
    fitting = [length for length in case.lengths if length <= max(menu) * case.tokens]
    plan = plan_of(dataclasses.replace(case, lengths=fitting), menu=menu)
    plan.check()
    assert plan.menu == tuple(sorted(menu))
    assert {microbatch.widest for microbatch in plan.microbatches} <= set(menu)


@given(cases(max_documents=5, num_devices=st.sampled_from([2, 3, 4])))
@settings(**QUICK | {"max_examples": 40})
def test_on_small_problems_it_is_near_the_best_there_is(case):
    """Against all partitions into microbatches, groupings and groups."""
    case = dataclasses.replace(case, lengths=case.lengths[:4], min_size=1, max_size=None)
    best = least_seconds(case)
    assert plan_of(case).modelled_seconds <= best * 1.35 + 1e-12


def least_seconds(case: Case) -> float:
    chain = case.cost.chain(case.num_devices)
    groupings = list(all_groupings(chain, case.num_devices))
    narrow = [w for w in case.cost.widths(case.num_devices) if w < chain[0]]
    groupings += [(w,) * (case.num_devices // w) for w in narrow]
    memo: dict[frozenset, float] = {frozenset(): 0.0}

    def one(documents):
        """The least seconds of one microbatch that holds exactly these documents."""
        best = float("inf")
        for grouping in groupings:
            for places in np.ndindex(*[len(grouping)] * len(documents)):
                held = [[] for _ in grouping]
                for document, group in zip(documents, places, strict=True):
                    held[group].append(case.lengths[document])
                if all(sum(h) <= s * case.tokens for h, s in zip(held, grouping, strict=True)):
                    best = min(best, case.cost.microbatch_seconds(grouping, held, case.tokens))
        return best

    def all_of(documents: frozenset) -> float:
        if documents not in memo:
            first, *others = sorted(documents)
            memo[documents] = min(
                one([first, *(d for i, d in enumerate(others) if mask >> i & 1)])
                + all_of(frozenset(d for i, d in enumerate(others) if not mask >> i & 1))
                for mask in range(2 ** len(others))
            )
        return memo[documents]

    return all_of(frozenset(range(len(case.lengths))))


@pytest.mark.parametrize("num_devices", [4, 6, 8, 12, 16, 24, 32, 64, 128])
def test_on_the_benchmark_s_lengths_it_is_within_5_percent_of_the_lower_bound(num_devices):
    for seed in range(2):
        lengths = draw_lengths(BENCHMARK, 16 * num_devices, seed)
        plan = schedule(lengths, num_devices, 2048)
        assert plan.modelled_seconds <= 1.05 * plan.lower_bound
        places = num_devices * 2048
        assert len(plan.microbatches) == -(-lengths.sum() // places), "as few as tokens allow"


@pytest.mark.slow
@pytest.mark.parametrize("num_devices", [256, 512])
def test_on_many_devices_it_is_within_5_percent_of_the_lower_bound(num_devices):
    plan = schedule(draw_lengths(BENCHMARK, 16 * num_devices, 0), num_devices, 2048)
    assert plan.modelled_seconds <= 1.05 * plan.lower_bound


def test_the_work_of_scheduling_grows_no_faster_than_the_documents(monkeypatch):
    """Counted in steps along the forest of unscheduled documents, whose paths must stay short."""
    steps = 0

    class Counted(list):
        def __getitem__(self, node):
            nonlocal steps
            steps += 1
            return super().__getitem__(node)

    class Unscheduled(fill.Unscheduled):
        def __init__(self, count):
            super().__init__(count)
            self._below = Counted(self._below)

    monkeypatch.setattr(scheduler, "Unscheduled", Unscheduled)

    def steps_per_document(count):
        nonlocal steps
        steps = 0
        schedule(draw_lengths(BENCHMARK, count, 0), 64, 2048)
        return steps / count

    assert steps_per_document(16_000) < 1.3 * steps_per_document(2_000)


@pytest.mark.parametrize(("spec", "tokens"), [(BENCHMARK, 2048), *OTHERS.items()])
def test_many_documents_fill_98_percent_of_the_buffers(spec, tokens):
    plan = schedule(draw_lengths(spec, 12_000, 0), 8, tokens)
    assert plan.token_fill >= 0.98


def test_progress_is_told_up_to_the_last_document():
    told = []
    schedule(draw_lengths(BENCHMARK, 5_000, 0), 8, 2048, progress=told.append)
    assert told == sorted(told)
    assert told[-1] == 5_000


def test_unscheduled_documents_are_found_whatever_has_been_removed():
    rng = np.random.default_rng(0)
    unscheduled, left = fill.Unscheduled(200), set(range(200))
    for rank in rng.permutation(200):
        unscheduled.remove([rank])
        left.discard(rank)
        place = int(rng.integers(0, 201))
        expected = max((r for r in left if r < place), default=-1)
        assert unscheduled.find(place) - 1 == expected
        assert unscheduled.count == len(left)
        assert list(unscheduled.descending()) == sorted(left, reverse=True)


def test_documents_of_one_length_are_interchangeable_and_the_seed_says_which_goes_where():
    plans = [schedule([100] * 20, 4, 256, seed=seed) for seed in range(4)]
    assert len({plan.microbatches for plan in plans}) > 1
    assert len({plan.modelled_seconds for plan in plans}) == 1


def test_short_documents_stay_on_one_member_and_long_ones_spread():
    cost = dataclasses.replace(Cost(), lanes=2)
    plan = schedule([16000, *[2000] * 24], 32, 2048, cost=cost)
    (microbatch,) = plan.microbatches
    assert microbatch.grouping == (8, *[2] * 12)
    assert microbatch.documents[0] == (0,)
    assert microbatch.lanes == 2


def test_a_program_narrower_than_the_lanes_is_taken_where_its_exchange_saves_time():
    """Short documents of equal work: the exchange over 8 lanes would bring nothing."""
    dear = dataclasses.replace(Cost(), seconds_per_byte_inside=1e-9)
    (microbatch,) = schedule([2048] * 16, 16, 2048, cost=dear).microbatches
    assert (microbatch.grouping, microbatch.lanes) == ((1,) * 16, 1)
    uneven = [2048 * 4, *[64] * 4 * 32]
    (microbatch,) = schedule(uneven, 8, 2048).microbatches
    assert (microbatch.grouping, microbatch.lanes) == ((8,), 8), "one bin, balanced for free"


def test_a_lone_long_document_takes_more_devices_than_it_must_where_that_is_quicker():
    cost = dataclasses.replace(Cost(), seconds_per_byte_inside=0.0, seconds_per_hop=0.0)
    assert schedule([4096], 8, 4096, cost=cost).microbatches[0].grouping == (8,)
    dear = dataclasses.replace(Cost(), seconds_per_byte_inside=1e-9)
    assert schedule([4096], 8, 4096, cost=dear).microbatches[0].grouping == (1,) * 8


def test_no_documents_are_no_microbatches():
    plan = schedule([], 8)
    assert plan.microbatches == ()
    assert plan.modelled_seconds == 0.0


def test_numpy_integers_will_do():
    assert schedule(np.array([5, 6], np.uint16), np.int64(2), np.int32(8)).microbatches


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"lengths": [10, 9000, 5]}, "document 1 has 9000 tokens.*1125 or more"),
        ({"lengths": [3000], "max_cp_size": 2}, "widest group, of 2 devices.*1500 or more"),
        ({"lengths": [5, 0]}, "document 1 has length 0"),
        ({"lengths": [5, -3]}, "document 1 has length -3"),
        ({"lengths": [5.0]}, "lengths must be integers"),
        ({"lengths": [[5]]}, "lengths must be integers in one dimension"),
        ({"lengths": [True]}, "lengths must be integers"),
        ({"min_cp_size": 4, "max_cp_size": 2}, "min_cp_size=4 is more than max_cp_size=2"),
        ({"min_cp_size": 5, "max_cp_size": 7}, "no program has a width.*may have 1, 2, 4, 8"),
        ({"min_cp_size": 0}, "min_cp_size must be a positive integer"),
        ({"num_devices": 0}, "num_devices must be a positive integer"),
        ({"max_tokens_per_device": 0}, "max_tokens_per_device must be a positive integer"),
        ({"max_tokens_per_device": 2**30}, "2\\*\\*31 - 1"),
        ({"menu": []}, "menu holds no width; programs may have 1, 2, 4, 8 devices"),
        ({"menu": [3, 8]}, "menu has the width 3; programs may have 1, 2, 4, 8 devices"),
        ({"menu": [(8,)]}, "each width of menu must be an integer"),
        ({"menu": 8}, "menu must be a list such as"),
        ({"menu": [8], "max_cp_size": 4}, "menu has the width 8; programs may have 1, 2, 4 "),
        ({"menu": [2], "lengths": [3000]}, "widest group, of 2 devices"),
    ],
)
def test_arguments_that_make_no_sense_are_told(arguments, words):
    given_arguments = {"lengths": [10], "num_devices": 8, "max_tokens_per_device": 1000} | arguments
    with pytest.raises(ValueError, match=words):
        schedule(**given_arguments)


def test_scheduling_and_packing_import_no_jax_and_nothing_that_draws():
    code = (
        "import sys; from hcp_jax import dynamic; "
        "p = dynamic.schedule([3000, 70], 4); dynamic.pack(p.microbatches[0], p.lengths, 2048); "
        "print(p); sys.exit(any(m in sys.modules for m in ('jax', 'matplotlib', 'rich', 'scipy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_in_a_pipeline_long_documents_are_spread_over_microbatches_of_equal_work():
    lengths = [262144] * 4 + [2048] * 1500
    plain, staged = (schedule(lengths, 16, 65536, num_stages=pp) for pp in (1, 4))
    for plan in (plain, staged):
        plan.check()
    longest = [max(plan.microbatch_seconds) for plan in (plain, staged)]
    assert longest[1] < 0.7 * longest[0]
    least = [step_bound(plan.microbatch_seconds, 4) for plan in (plain, staged)]
    assert least[1] < 0.9 * least[0]
    times = staged.microbatch_seconds
    assert list(times) in (sorted(times), sorted(times, reverse=True))
    assert schedule([], 8, 1024, num_stages=4).microbatches == ()


@given(case=cases(), pp=st.integers(2, 8))
@settings(**QUICK | {"max_examples": 10})
def test_a_schedule_for_stages_is_complete_and_never_slower_in_them(case, pp):
    plain, staged = (plan_of(case, num_stages=n) for n in (1, pp))
    staged.check()
    if not case.lengths:
        return
    before, after = (
        ratio_to_ideal(plan.microbatch_seconds, pp) * plan.modelled_seconds
        for plan in (plain, staged)
    )
    assert after <= before * (1 + 1e-9)
