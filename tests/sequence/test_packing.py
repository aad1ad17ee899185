import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hcp_jax.dynamic import Microbatch, max_runs, pack
from hcp_jax.kernels.core import CoreSpec, attend
from hcp_jax.kernels.merge import merge
from hcp_jax.sequence import groupings
from hcp_jax.sequence.groupings import group_of_device
from hcp_jax.sequence.layout import KeyRuns
from hcp_jax.sequence.mask import Intervals
from hcp_jax.sequence.packing import max_documents, num_runs
from tests.dynamic.strategies import QUICK, all_groupings

CHAINS = [(8, 8, 1), (8, 4, 2), (8, 4, 4), (8, 8, 8), (12, 4, 2), (12, 8, 1), (6, 1, 1), (1, 1, 1)]


@dataclasses.dataclass(frozen=True)
class Filled:
    microbatch: Microbatch
    lengths: list[int]
    tokens: int
    sizes: tuple[int, ...]

    @property
    def pack(self):
        return pack(self.microbatch, self.lengths, self.tokens)


@st.composite
def filled_groups(draw):
    """Any grouping of a chain, its groups filled to the brim, in part, or not at all."""
    sizes = groupings.chain(*draw(st.sampled_from(CHAINS)))
    possible = list(all_groupings(sizes, sizes[-1]))
    grouping = draw(st.sampled_from(possible))
    tokens = draw(st.integers(1, 24))
    lengths, documents = [], []
    for size in grouping:
        room, held = size * tokens, []
        for wish in draw(st.lists(st.integers(1, 60), max_size=6)):
            if room:
                held.append(len(lengths))
                lengths.append(min(wish, room))
                room -= lengths[-1]
        if room and held and draw(st.booleans()):
            lengths[held[-1]] += room
        documents.append(tuple(held))
    return Filled(Microbatch(grouping, tuple(documents), sizes[0]), lengths, tokens, sizes)


def keys_at(runs, device):
    """Global indices of the keys on a device, slot by slot."""
    offsets, starts = runs.offsets[device], runs.starts[device]
    assert np.all(np.diff(offsets) >= 0)
    parts = [s + np.arange(b - a) for s, a, b in zip(starts, offsets, offsets[1:], strict=False)]
    return np.concatenate(parts)


def held_by(packed, num_members):
    """Tokens of each member: the sum over its lanes."""
    return (packed.document >= 0).sum(axis=1).reshape(num_members, -1).sum(axis=1)


@given(filled_groups())
@settings(**QUICK | {"max_examples": 300})
def test_every_token_has_one_slot_and_no_member_holds_two_more_than_its_neighbours(case):
    packed = case.pack
    inside = packed.document >= 0
    found = sorted(zip(packed.document[inside], packed.position[inside], strict=True))
    assert found == [(d, p) for d, length in enumerate(case.lengths) for p in range(length)]
    first, _ = group_of_device(case.microbatch.grouping)
    lanes = case.microbatch.lanes
    held = held_by(packed, first.size // lanes)
    for group in np.unique(first):
        assert np.ptp(held[first[::lanes] == group]) <= 1
    by_member = inside.reshape(held.size, -1)
    slots = np.arange(by_member.shape[1])
    assert np.array_equal(by_member, slots < held[:, None]), "a member's padding is at its end"


@given(filled_groups())
@settings(**QUICK | {"max_examples": 300})
def test_runs_say_which_index_each_slot_has_and_no_two_slots_share_one(case):
    packed = case.pack
    indices = [keys_at(packed.runs, device) for device in range(sum(case.microbatch.grouping))]
    together = np.concatenate(indices)
    assert np.unique(together).size == together.size == sum(case.lengths)
    first, size = group_of_device(case.microbatch.grouping)
    for device, own in enumerate(indices):
        assert np.array_equal(packed.end[device, : own.size], own + 1)
        assert np.all(own >= first[device] * case.tokens)
        assert np.all(own < (first[device] + size[device]) * case.tokens)
    widest = packed.widest
    most = 1 if widest == packed.lanes else 2 * max(map(len, case.microbatch.documents))
    assert packed.runs.starts.shape[1] <= max(most, 1)


@given(filled_groups(), st.booleans())
@settings(**QUICK | {"max_examples": 200})
def test_over_a_program_s_hops_every_query_sees_exactly_its_document_s_causal_prefix(case, wider):
    """Whatever the width of the program: that of the grouping, or all devices."""
    packed, lanes = case.pack, case.microbatch.lanes
    widest = case.sizes[-1] if wider else packed.widest
    radices = groupings.radices(case.sizes, widest)
    width = widest // lanes
    indices = [keys_at(packed.runs, d) for d in range(sum(case.microbatch.grouping))]
    token_of = {}
    for device, own in enumerate(indices):
        for slot, index in enumerate(own):
            token_of[index] = packed.document[device, slot], packed.position[device, slot]
    seen = {}
    for hop in range(width):
        source = groupings.source_members(radices, hop)
        for device in range(len(indices)):
            member = device // lanes
            theirs = member // width * width + int(source[member % width])
            keys = np.concatenate(indices[theirs * lanes : (theirs + 1) * lanes])
            for slot in np.flatnonzero(packed.document[device] >= 0):
                low, high = packed.start[device, slot], packed.end[device, slot]
                query = packed.document[device, slot], packed.position[device, slot]
                shown = [token_of[k] for k in keys if low <= k < high]
                assert not shown or hop < case.microbatch.widest // lanes, "groups are done early"
                seen.setdefault(query, []).extend(shown)
    for (document, position), keys in seen.items():
        assert sorted(keys) == [(document, p) for p in range(position + 1)]
    assert len(seen) == sum(case.lengths)


@given(filled_groups())
@settings(**QUICK | {"max_examples": 300})
def test_padding_sees_nothing(case):
    packed = case.pack
    padding = packed.document < 0
    assert not packed.start[padding].any()
    assert not packed.end[padding].any()
    assert not packed.position[padding].any()


@given(filled_groups())
@settings(**QUICK | {"max_examples": 300})
def test_a_document_s_members_do_equal_work(case):
    """Zigzag: pairs differ by no more than a chunk's rounding makes them."""
    packed, lanes = case.pack, case.microbatch.lanes
    first, size = (x[::lanes] for x in group_of_device(case.microbatch.grouping))
    for document, length in enumerate(case.lengths):
        mine = packed.document == document
        pairs = np.where(mine, packed.position + 1, 0).reshape(first.size, -1).sum(axis=1)
        holder = mine.reshape(first.size, -1).any(axis=1).argmax()
        members = first == first[holder]
        assert np.ptp(pairs[members]) <= 2 * length + size[holder] // lanes


def test_the_example_in_the_docstring_is_correct():
    packed = pack(Microbatch((2,), ((0, 1),)), [9, 4], 7)
    assert keys_at(packed.runs, 0).tolist() == [0, 1, 2, 7, 8, 9, 12]
    assert keys_at(packed.runs, 1).tolist() == [3, 4, 5, 6, 10, 11]


def test_a_member_s_stream_goes_on_in_the_buffers_of_its_lanes():
    """Two members of two lanes of 4 slots: 8 of 16 tokens each."""
    packed = pack(Microbatch((4, 2), ((0, 1), (2,)), 2), [9, 5, 6], 4)
    by_member = [keys_at(packed.runs, d).tolist() for d in range(6)]
    wide, narrow = (
        [[0, 1, 2, 7], [8, 9, 13], [3, 4, 5, 6], [10, 11, 12]],
        [[16, 17, 18, 19], [20, 21]],
    )
    assert by_member == [*wide, *narrow]
    assert packed.document[1].tolist() == [0, 1, 1, -1]
    assert packed.start[5].tolist() == [16, 16, 0, 0]
    assert packed.runs.offsets[:, -1].tolist() == [4, 3, 4, 3, 4, 2]


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("own", [range(3, 7), range(4, 8), range(2, 2), range(1, 2)])
def test_a_host_packs_its_own_devices_alone(own, lanes):
    microbatch, lengths = Microbatch((4, 2, 2), ((0, 1), (2,), (3,)), lanes), [13, 8, 9, 5]
    whole = pack(microbatch, lengths, 6)
    part = pack(microbatch, lengths, 6, devices=own)
    for name in ("document", "position", "start", "end"):
        assert np.array_equal(getattr(part, name), getattr(whole, name)[own.start : own.stop])
    assert all(map(np.array_equal, part.runs, whole.runs)), "runs are those of all devices"


@pytest.mark.parametrize("lanes", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 40])
def test_the_limit_of_documents_holds_the_runs_of_a_program(lanes, length):
    """The most runs there can be: as many documents as are allowed, all as short as they can be."""
    tokens, size = 2048, 4 * lanes
    count = max_documents(tokens)
    packed = pack(
        Microbatch((size,), (tuple(range(count)),), lanes),
        [length] * count,
        tokens,
        num_runs=num_runs(size, lanes, tokens),
    )
    assert packed.runs.starts.shape == (size, max_runs(tokens))
    assert num_runs(lanes, lanes, tokens) == 1


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_a_device_of_a_group_of_one_member_has_one_run_however_many_documents(lanes):
    microbatch = Microbatch((lanes,), (tuple(range(50)),), lanes)
    packed = pack(microbatch, [3] * 50, 150 // lanes + 1, num_runs=num_runs(lanes, lanes, 150))
    assert packed.runs.starts.shape == (lanes, 1)


@pytest.mark.parametrize(
    ("microbatch", "lengths", "tokens", "words"),
    [
        (
            Microbatch((1, 2), ((), (0,))),
            [9],
            4,
            r"devices 1 … 2 has documents of 9 tokens.*2 \* 4",
        ),
        (Microbatch((4, 2), ((), (0,)), 4), [9], 4, "every group of 4 . 2 must be a multiple of"),
        (Microbatch((2, 2), ((0,),)), [9], 9, "2 groups need as many tuples of documents, got 1"),
        (Microbatch((2, 0), ((0,), ())), [9], 9, "add up to num_devices=2"),
        (Microbatch((2,), ((0,),)), [9], 2**30, "pass 2"),
        (Microbatch((2,), ((0,),), 0), [9], 9, "lanes must be a positive integer"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(microbatch, lengths, tokens, words):
    with pytest.raises(ValueError, match=words):
        pack(microbatch, lengths, tokens)


def test_too_few_runs_or_other_devices_are_refused():
    with pytest.raises(ValueError, match="3 runs of keys, more than num_runs=2"):
        pack(Microbatch((2,), ((0, 1),)), [9, 4], 7, num_runs=2)
    with pytest.raises(ValueError, match="devices must be a range within 0 … 2"):
        pack(Microbatch((2,), ((0,),)), [9], 7, devices=range(1, 3))


def test_arrays_are_those_that_the_core_takes():
    packed = pack(Microbatch((2,), ((0, 1),)), [9, 4], 7)
    for name in ("document", "position", "start", "end"):
        assert getattr(packed, name).dtype == np.int32
    assert isinstance(packed.runs, KeyRuns)
    assert packed.runs.starts.dtype == packed.runs.offsets.dtype == np.int32


def causal_attention(q, k, v, position, scale):
    """One query of a document against its prefix, as in the textbook."""
    scores = scale * np.einsum("nh,snh->sn", q[position], k[: position + 1])
    weights = np.exp(scores - scores.max(axis=0))
    return np.einsum("sn,snh->nh", weights / weights.sum(axis=0), v[: position + 1])


def test_the_core_over_the_hops_computes_each_document_alone():
    """The arrays in terms of the library's own contract: `attend`, `merge`, KeyRuns, Intervals."""
    sizes, tokens = groupings.chain(8, 8), 6
    microbatch = Microbatch((4, 2, 1, 1), ((0, 1), (2,), (), (3, 4)))
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
    walk = [groupings.source_members(groupings.radices(sizes, 4), hop) for hop in range(4)]
    for device in range(8):
        intervals = Intervals(packed.start[device][None], packed.end[device][None])
        total = None
        for sources in walk:
            source = device // 4 * 4 + int(sources[device % 4])
            runs = KeyRuns(*(rows[source] for rows in packed.runs))
            own = (jnp.asarray(x[None]) for x in (q[device], k[source], v[source]))
            part = attend(spec, *own, intervals, runs)
            total = part if total is None else merge(total, part)
        for place in np.flatnonzero(inside[device]):
            document, position = packed.document[device, place], packed.position[device, place]
            alone = causal_attention(*stream[document], position, spec.scale)
            np.testing.assert_allclose(total.out[0, place], alone, atol=2e-6)
        assert not np.asarray(total.out)[0, ~inside[device]].any()
