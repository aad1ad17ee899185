import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hcp_jax.sequence import groupings
from tests.dynamic.strategies import NUM_DEVICES, QUICK, all_groupings


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        ((64, 8, 8), (8, 16, 32, 64)),
        ((64, 8), (1, 2, 4, 8, 16, 32, 64)),
        ((64, 8, 4), (4, 8, 16, 32, 64)),
        ((64, 8, 16), (16, 32, 64)),
        ((24, 8), (1, 2, 4, 8, 24)),
        ((24, 8, 2), (2, 4, 8, 24)),
        ((24, 8, 3), (3, 6, 12, 24)),
        ((6, 8), (1, 2, 6)),
        ((12, 8), (1, 2, 4, 12)),
        ((7, 8), (1, 7)),
        ((8, 8, 8), (8,)),
        ((1, 1), (1,)),
    ],
)
def test_chains(arguments, sizes):
    assert groupings.chain(*arguments) == sizes


@given(NUM_DEVICES, st.sampled_from([1, 2, 4, 6, 8, 72]), st.integers(1, 16))
@settings(**QUICK)
def test_sizes_of_a_chain_divide_the_next_and_no_group_of_a_host_or_less_crosses_hosts(
    devices, per_host, wish
):
    lanes = max(n for n in range(1, wish + 1) if devices % n == 0)
    sizes = groupings.chain(devices, per_host, lanes)
    assert (sizes[0], sizes[-1]) == (lanes, devices)
    assert all(wide % narrow == 0 for narrow, wide in itertools.pairwise(sizes))
    assert len(set(sizes)) == len(sizes)
    if devices % per_host == 0 and per_host % lanes == 0:
        for size in sizes:
            if size <= per_host:
                assert per_host % size == 0, "blocks of this size tile a host"
    widths = groupings.widths(devices, per_host, lanes)
    assert set(sizes) <= set(widths)
    assert list(widths) == sorted(set(widths))
    for width in widths:
        assert groupings.program_lanes(width, lanes) == min(width, lanes)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, 8), "num_devices must be a positive integer, got 0"),
        ((8, 0), "devices_per_host must be"),
        ((8, 8, True), "lanes must be"),
        ((8, 8, 3), "lanes=3 must divide num_devices=8; 1 lanes would"),
    ],
)
def test_invalid_arguments_of_a_chain_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        groupings.chain(*arguments)


def test_groupings_of_few_devices_are_all_there():
    assert set(all_groupings((1, 2, 4), 4)) == {(4,), (2, 2), (2, 1, 1), (1, 1, 1, 1)}


@given(
    st.sampled_from([(8, 8, 1), (8, 4, 2), (12, 8, 1), (24, 8, 2), (18, 1, 1), (30, 1, 1)]),
    st.randoms(use_true_random=False),
)
@settings(**QUICK | {"max_examples": 100})
def test_every_member_meets_every_other_of_its_group_before_anyone_outside(arguments, random):
    """The claim on which one program for many groupings rests."""
    sizes = groupings.chain(*arguments)
    lanes, devices = sizes[0], sizes[-1]
    widest = random.choice(sizes)
    known = groupings.radices(sizes, widest)
    walk = [groupings.source_members(known, hop) for hop in range(widest // lanes)]
    for hop, source in enumerate(walk):
        assert sorted(source) == list(range(widest // lanes)), "each hop is a permutation"
        assert hop or source.tolist() == list(range(widest // lanes)), "own keys come first"
    for size in (size for size in sizes if size <= widest):
        width = size // lanes
        for member in range(widest // lanes):
            met = {int(source[member]) for source in walk[:width]}
            first = member // width * width
            assert met == set(range(first, first + width))
    assert devices % widest == 0


def test_on_powers_of_two_the_walk_is_xor():
    known = groupings.radices((2, 4, 8, 16), 16)
    assert known == (2, 2, 2)
    for hop in range(8):
        assert groupings.source_members(known, hop).tolist() == [r ^ hop for r in range(8)]


def test_other_digits_go_down_by_the_hop():
    assert groupings.source_members((3,), 1).tolist() == [2, 0, 1]
    assert groupings.source_members((2, 3), 3).tolist() == [5, 4, 1, 0, 3, 2]


def test_a_program_without_hops_has_one_member():
    assert groupings.radices((8, 16), 8) == groupings.radices((8, 16), 4) == ()
    assert groupings.source_members((), 0).tolist() == [0]
    with pytest.raises(ValueError, match="widest=24 must be one of 8, 16"):
        groupings.radices((8, 16), 24)


@pytest.mark.parametrize("grouping", [(4, 4, 1), (8, 0), (), (4.0, 4), (True,) * 8, (9, -1)])
def test_an_invalid_grouping_is_refused(grouping):
    with pytest.raises(ValueError, match="add up to num_devices=8"):
        groupings.check_grouping(grouping, 8)


@pytest.mark.parametrize(
    ("grouping", "words"),
    [
        ((2, 4, 2), "a group of 4 devices that starts at device 2"),
        ((5, 3), "a group of 5 devices; groups may have 1, 2, 4, 8"),
    ],
)
def test_a_grouping_outside_of_its_chain_is_refused(grouping, words):
    assert groupings.check_grouping(grouping, 8) == grouping
    with pytest.raises(ValueError, match=words):
        groupings.check_grouping(grouping, 8, (1, 2, 4, 8))


def test_descending_groupings_of_a_chain_are_aligned():
    for arguments in ((8, 8), (12, 8), (24, 8, 4), (18, 1)):
        sizes = groupings.chain(*arguments)
        for grouping in itertools.islice(all_groupings(sizes, sizes[-1]), 200):
            assert groupings.check_grouping(np.array(grouping), sizes[-1], sizes) == grouping


def test_groupings_are_described_briefly():
    assert groupings.describe((4, 4, 2, 1, 1, 1)) == "4×2 + 2 + 1×3"
