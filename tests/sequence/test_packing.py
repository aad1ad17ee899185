import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hcp_jax.dynamic import Microbatch, max_runs, pack, schedule
from hcp_jax.kernels.core import CoreSpec, attend
from hcp_jax.kernels.merge import merge
from hcp_jax.sequence.groupings import group_of_device, num_hops
from hcp_jax.sequence.layout import KeyRuns
from hcp_jax.sequence.mask import Intervals
from tests.dynamic.strategies import QUICK, cases, key_source, runs_at


@st.composite
def filled_groups(draw):
    """A layout of any sizes, its groups filled to the brim, in part, or not at all."""
    layout = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=4)))
    tokens = draw(st.integers(1, 24))
    lengths, documents = [], []
    for size in layout:
        room, held = size * tokens, []
        for wish in draw(st.lists(st.integers(1, 60), max_size=6)):
            if room:
                held.append(len(lengths))
                lengths.append(min(wish, room))
                room -= lengths[-1]
        if room and held and draw(st.booleans()):
            lengths[held[-1]] += room
        documents.append(tuple(held))
    return Microbatch(layout, tuple(documents)), lengths, tokens


def keys_at(runs, device):
    """Global indices of the keys at hand, place by place."""
    offsets, starts = runs.offsets[device], runs.starts[device]
    assert np.all(np.diff(offsets) >= 0)
    parts = [s + np.arange(b - a) for s, a, b in zip(starts, offsets, offsets[1:], strict=False)]
    return np.concatenate(parts)


@given(filled_groups())
@settings(**QUICK | {"max_examples": 300})
def test_every_token_has_one_place_and_no_device_holds_one_more_than_its_neighbours(case):
    microbatch, lengths, tokens = case
    packed = pack(microbatch, lengths, tokens)
    inside = packed.document >= 0
    found = sorted(zip(packed.document[inside], packed.position[inside], strict=True))
    assert found == [(d, p) for d, length in enumerate(lengths) for p in range(length)]
    first, _ = group_of_device(microbatch.layout)
    held = inside.sum(axis=1)
    for group in np.unique(first):
        assert np.ptp(held[first == group]) <= 1
    assert np.array_equal(inside, np.arange(tokens) < held[:, None]), "padding is at the end"


@given(filled_groups())
@settings(**QUICK | {"max_examples": 300})
def test_the_hops_show_every_query_exactly_its_document_s_causal_prefix(case):
    microbatch, lengths, tokens = case
    packed = pack(microbatch, lengths, tokens)
    first, _ = group_of_device(microbatch.layout)
    # What index means, from the tokens themselves: (group, global index) -> (document, position).
    token_of = {}
    for device in range(first.size):
        own = keys_at(packed.runs, device)
        for place, index in enumerate(own):
            token = packed.document[device, place], packed.position[device, place]
            assert packed.end[device, place] == index + 1
            token_of[first[device], index] = token
    seen = {}
    for hop in range(num_hops(microbatch.layout)):
        runs = runs_at(packed, hop)
        for device in range(first.size):
            keys = keys_at(runs, device)
            for place in np.flatnonzero(packed.document[device] >= 0):
                low, high = packed.start[device, place], packed.end[device, place]
                query = packed.document[device, place], packed.position[device, place]
                shown = [token_of[first[device], k] for k in keys if low <= k < high]
                seen.setdefault(query, []).extend(shown)
    for (document, position), keys in seen.items():
        assert sorted(keys) == [(document, p) for p in range(position + 1)]
    assert len(seen) == sum(lengths)


@given(filled_groups())
@settings(**QUICK | {"max_examples": 300})
def test_padding_sees_nothing(case):
    packed = pack(*case)
    padding = packed.document < 0
    assert not packed.start[padding].any()
    assert not packed.end[padding].any()
    assert not packed.position[padding].any()


@given(filled_groups())
@settings(**QUICK | {"max_examples": 300})
def test_a_document_s_devices_do_equal_work(case):
    """Zigzag: pairs differ by no more than a chunk's rounding makes them."""
    microbatch, lengths, tokens = case
    packed = pack(microbatch, lengths, tokens)
    first, size = group_of_device(microbatch.layout)
    for document, length in enumerate(lengths):
        mine = packed.document == document
        pairs = np.where(mine, packed.position + 1, 0).sum(axis=1)
        devices = first == first[mine.any(axis=1).argmax()]
        assert np.ptp(pairs[devices]) <= 2 * length + size[devices][0]


def test_the_example_in_the_docstring_is_correct():
    packed = pack(Microbatch((2,), ((0, 1),)), [9, 4], 7)
    assert keys_at(packed.runs, 0).tolist() == [0, 1, 2, 7, 8, 9, 12]
    assert keys_at(packed.runs, 1).tolist() == [3, 4, 5, 6, 10, 11]


def test_a_host_packs_its_own_devices_alone():
    microbatch, lengths = Microbatch((4, 2, 1, 1), ((0, 1), (2,), (), (3,))), [13, 8, 9, 5]
    whole = pack(microbatch, lengths, 6)
    part = pack(microbatch, lengths, 6, devices=range(3, 7))
    for name in ("document", "position", "start", "end"):
        assert np.array_equal(getattr(part, name), getattr(whole, name)[3:7])
    for hop in range(4):
        for mine, all_of_them in zip(runs_at(part, hop), runs_at(whole, hop), strict=True):
            assert np.array_equal(mine, all_of_them[3:7])


@given(cases(max_documents=120))
@settings(**QUICK | {"max_examples": 150})
def test_no_schedule_needs_more_runs_than_are_compiled_for(case):
    plan = schedule(case.lengths, case.num_devices, case.tokens, case.min_size, case.max_size)
    for microbatch in plan.microbatches[:3]:
        packed = pack(
            microbatch, plan.lengths, case.tokens, devices=range(0), num_runs=max_runs(case.tokens)
        )
        assert packed.runs.starts.shape == (case.num_devices, max_runs(case.tokens))


def test_one_device_has_one_run_however_many_documents():
    packed = pack(Microbatch((1,), (tuple(range(50)),)), [3] * 50, 150)
    assert packed.runs.starts.shape == (1, 1)


def test_inputs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"devices 1 … 2 has documents of 9 tokens, more than 2"):
        pack(Microbatch((1, 2), ((), (0,))), [9], 4)
    with pytest.raises(ValueError, match="3 runs of keys, more than num_runs=2"):
        pack(Microbatch((2,), ((0, 1),)), [9, 4], 7, num_runs=2)
    with pytest.raises(ValueError, match="devices must be a range within 0 … 2"):
        pack(Microbatch((2,), ((0,),)), [9], 7, devices=range(1, 3))


def test_arrays_are_those_that_the_core_takes():
    packed = pack(Microbatch((2,), ((0, 1),)), [9, 4], 7)
    for field in dataclasses.fields(packed)[2:6]:
        assert getattr(packed, field.name).dtype == np.int32
    assert packed.runs.starts.dtype == packed.runs.offsets.dtype == np.int32


def causal_attention(q, k, v, position, scale):
    """One query of a document against its prefix, as in the textbook."""
    scores = scale * np.einsum("nh,snh->sn", q[position], k[: position + 1])
    weights = np.exp(scores - scores.max(axis=0))
    return np.einsum("sn,snh->nh", weights / weights.sum(axis=0), v[: position + 1])


def test_the_core_over_the_hops_computes_each_document_alone():
    """The arrays in terms of the library's own contract: `attend`, `merge`, KeyRuns, Intervals."""
    microbatch, tokens = Microbatch((4, 2, 1, 1), ((0, 1), (2,), (), (3, 4))), 6
    lengths = [13, 8, 9, 5, 1]
    packed = pack(microbatch, lengths, tokens)
    rng = np.random.default_rng(0)
    stream = [rng.normal(size=(3, length, 2, 8)).astype(np.float32) for length in lengths]
    spec = CoreSpec("reference", scale=0.3)
    inside = packed.document >= 0
    q, k, v = np.full((3, *packed.document.shape, 2, 8), 7.0, np.float32)
    for device, place in np.argwhere(inside):
        token = stream[packed.document[device, place]][:, packed.position[device, place]]
        q[device, place], k[device, place], v[device, place] = token
    for device in range(8):
        intervals = Intervals(packed.start[device][None], packed.end[device][None])
        total = None
        for hop in range(num_hops(microbatch.layout)):
            source = max(int(key_source(microbatch.layout, hop)[device]), 0)
            runs = KeyRuns(*(rows[device] for rows in runs_at(packed, hop)))
            own = (x[None] for x in (q[device], k[source], v[source]))
            part = attend(spec, *own, intervals, runs)
            total = part if total is None else merge(total, part)
        for place in np.flatnonzero(inside[device]):
            document, position = packed.document[device, place], packed.position[device, place]
            alone = causal_attention(*stream[document], position, spec.scale)
            np.testing.assert_allclose(total.out[0, place], alone, atol=2e-6)
        assert not np.asarray(total.out)[0, ~inside[device]].any()
