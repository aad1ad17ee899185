"""Which documents each step trains on: all of them once an epoch, whatever the run goes through."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

from hcp_jax.dynamic.config import DynamicConfig
from hcp_jax.dynamic.cost import Cost
from hcp_jax.dynamic.menu import schedule_batches
from hcp_jax.parallel.config import ParallelConfig
from hcp_jax.train import data
from hcp_jax.train.config import TrainConfig
from hcp_jax.train.data import documents
from hcp_jax.train.data.documents import Limits, PlannedSteps, check_longest
from hcp_jax.train.data.streams import Segments, Streams
from hcp_jax.train.dynamic import make_limits

RNG = np.random.default_rng(0)
SIZES = np.minimum(RNG.lognormal(4, 1, 300).astype(np.int64) + 1, 512)
TOKENS = 1024


def planned(num_devices=8, sizes=SIZES, seed=3, **words):
    config = DynamicConfig(enabled=True, **{"max_tokens_per_device": 64, **words})
    return PlannedSteps(sizes, Limits(num_devices, TOKENS, seed, config, Cost()))


def numbers(step):
    return [d for mb in step for group in mb.documents for d in group]


def first(steps, count):
    return list(itertools.islice(steps, count))


def through_json(state):
    return json.loads(json.dumps(state))


@pytest.mark.parametrize("lookahead", [1, 4])
def test_every_document_is_trained_on_once_an_epoch(lookahead):
    of_run = planned(lookahead=lookahead)
    steps, seen = iter(of_run), []
    while len(seen) < 3 * SIZES.size:
        seen += numbers(next(steps))
    # The rest of the last window, and documents before it, are those of the order up to its end.
    state = steps.get_state()
    seen += [d for step in state["window"] for _, groups, _ in step for g in groups for d in g]
    assert len(seen) == state["place"]
    order = [of_run.number(i) for i in range(len(seen))]
    assert sorted(seen) == sorted(order)
    assert sorted(order[: SIZES.size]) == list(range(SIZES.size))
    assert order[: SIZES.size] != order[SIZES.size : 2 * SIZES.size]


def test_the_order_is_that_of_the_streams_of_a_run_without_groups():
    segments = Segments(data.Corpus([b"x" * n for n in range(1, 99)], "a test"), 64)
    steps = planned(sizes=segments.sizes)
    count = len(segments)
    for epoch in range(2):
        ours = [steps.number(epoch * count + i) for i in range(count)]
        assert ours == Streams(segments, 3).order(epoch).tolist()


def test_a_batch_takes_documents_until_the_next_would_go_over_the_tokens():
    steps, place = planned(lookahead=3), 0
    for _ in range(5):
        batches, end = steps.window(place)
        flat = [d for batch in batches for d in batch]
        assert flat == [steps.number(i) for i in range(place, end)]
        for batch, after in zip(batches, [*batches[1:], [steps.number(end)]], strict=True):
            tokens = SIZES[batch].sum()
            assert tokens <= TOKENS < tokens + SIZES[after[0]]
        place = end


def test_a_document_longer_than_a_step_is_a_step():
    sizes = np.full(5, 2 * TOKENS)
    steps = planned(sizes=sizes, max_tokens_per_device=512)
    assert [len(numbers(step)) for step in first(steps, 5)] == [1] * 5


def test_steps_that_cannot_share_microbatches_have_their_own():
    sizes = np.full(40, TOKENS)
    # All four documents of a window fit one microbatch, but there must be four steps.
    steps = planned(sizes=sizes, max_tokens_per_device=4 * TOKENS, lookahead=4)
    got = first(steps, 8)
    assert [len(step) for step in got] == [1] * 8
    assert len({d for step in got for d in numbers(step)}) == 8


@pytest.mark.parametrize("lookahead", [1, 4])
@pytest.mark.parametrize("done", [0, 1, 6])
def test_a_run_goes_on_to_the_same_steps(lookahead, done):
    steps = iter(planned(lookahead=lookahead))
    first(steps, done)
    state = through_json(steps.get_state())
    resumed = iter(planned(lookahead=lookahead))
    resumed.set_state(state)
    assert first(resumed, 9) == first(steps, 9)


@pytest.mark.parametrize(
    "words",
    [
        {"num_devices": 4, "max_tokens_per_device": 128},
        {"num_devices": 6, "max_tokens_per_device": 96},
        {"max_tokens_per_device": 80},
        {"lookahead": 1},
    ],
    ids=["4-devices", "6-devices", "larger-buffers", "less-lookahead"],
)
def test_on_other_devices_each_step_of_the_window_has_the_documents_it_had(words):
    steps = iter(planned(lookahead=4))
    first(steps, 5)
    state = through_json(steps.get_state())
    of_other = planned(**{"lookahead": 4, **words})
    resumed = iter(of_other)
    resumed.set_state(state)
    rest = len(state["window"])
    assert rest == 3
    ours = first(resumed, rest)
    assert [sorted(numbers(s)) for s in ours] == [sorted(numbers(s)) for s in first(steps, rest)]
    assert all(of_other.serves(mb) for step in ours for mb in step)
    batches, _ = of_other.window(state["place"])
    after = first(resumed, len(batches))
    assert sorted(d for s in after for d in numbers(s)) == sorted(itertools.chain(*batches))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "seed was 3 and is 4"),
        ({"sizes": SIZES[:-1]}, "segments was 300 and is 299"),
    ],
)
def test_another_order_of_documents_is_refused(change, message):
    state = iter(planned()).get_state()
    with pytest.raises(ValueError, match=message):
        iter(planned(**change)).set_state(state)


def test_the_state_of_a_run_without_dynamic_is_refused():
    with pytest.raises(ValueError, match="segments was not saved"):
        iter(planned()).set_state({"next_index": 3})


def test_a_document_that_no_group_holds_is_named_with_what_would_hold_it():
    corpus = data.Corpus([b"x" * 60, b"y" * 999, b"z" * 9], "a test")
    segments = Segments(corpus, 900)

    def check(**words):
        check_longest(segments, planned(max_tokens_per_device=128, **words).limits)

    message = r"document 1 has 900 tokens .* 4 devices, holds 4 \* 128 = 512.*device to 225 or more"
    with pytest.raises(ValueError, match=message):
        check(max_cp_size=4)
    with pytest.raises(ValueError, match=r"widest group, of 2 devices"):
        check(menu=[1, 2])
    check()


def test_the_menu_is_chosen_bounded_or_given():
    free = planned().menu
    assert 1 <= len(free) <= 4
    assert free[-1] == 8
    assert len(planned(menu=1).menu) == 1
    steps = planned(menu=[8, 4])
    assert steps.menu == (4, 8)
    assert {mb.widest for step in first(iter(steps), 9) for mb in step} <= set(steps.menu)


def test_a_window_of_before_programs_served_many_groupings_is_scheduled_anew():
    steps = planned(menu=[8, 4, 2])
    state = through_json(iter(steps).get_state())
    state["window"] = [[[[6, 2], [[0, 1], [2]]], [[8], [[3]]]]]
    resumed = iter(steps)
    resumed.set_state(state)
    assert sorted(numbers(next(resumed))) == [0, 1, 2, 3]


def test_steps_are_scheduled_for_the_stages_of_a_pipeline(monkeypatch):
    asked = []

    def schedule(*arguments):
        asked.append(arguments[-1])
        return schedule_batches(*arguments)

    monkeypatch.setattr(documents, "schedule_batches", schedule)
    parallel = ParallelConfig(pp=4, dynamic=DynamicConfig(enabled=True, max_tokens_per_device=512))
    model = dataclasses.replace(TrainConfig().model, num_layers=4)
    config = TrainConfig(steps=1, batch_size=8, seq_len=512, model=model, parallel=parallel)
    cp = parallel.context_parallel(devices=jax.devices()[:4])
    next(iter(PlannedSteps(SIZES, make_limits(config, cp))))
    assert set(asked) == {4}
