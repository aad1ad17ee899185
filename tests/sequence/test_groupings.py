import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hcp_jax.sequence import groupings
from tests.dynamic.strategies import NUM_DEVICES, QUICK, all_layouts, key_source


def straddling(layout, per_host):
    """Groups that would fit on a host and yet lie on two."""
    first, found = 0, []
    for size in layout:
        if size <= per_host and first // per_host != (first + size - 1) // per_host:
            found.append(size)
        first += size
    return found


def test_sizes_are_powers_of_two_and_divisors():
    assert groupings.group_sizes(64) == (1, 2, 4, 8, 16, 32, 64)
    assert groupings.group_sizes(12) == (1, 2, 3, 4, 6, 8, 12)
    assert groupings.group_sizes(24, 2, 8) == (2, 3, 4, 6, 8)


def test_where_those_do_not_add_up_any_size_may():
    assert groupings.group_sizes(7, 2, 4) == (2, 3, 4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0,), "num_devices must be a positive integer, got 0"),
        ((8, 0), "min_cp_size must be"),
        ((8, 1, True), "max_cp_size must be"),
        ((8, 1.0), "min_cp_size must be"),
        ((8, 4, 2), "min_cp_size=4 is more than max_cp_size=2"),
        ((7, 4, 6), "no groups of 4 to 6 devices add up to num_devices=7; lower min_cp_size to 3"),
    ],
)
def test_invalid_bounds_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        groupings.group_sizes(*arguments)


@given(NUM_DEVICES, st.integers(1, 16), st.integers(1, 16), st.sampled_from([1, 4, 8]))
@settings(**QUICK)
def test_layouts_of_any_device_count_use_every_device_once(devices, low, high, per_host):
    try:
        sizes = groupings.group_sizes(devices, low, high)
    except ValueError:
        # Told rightly: no multiset of the sizes in between adds up either.
        anything = tuple(range(low, min(high, devices) + 1))
        assert low > high or not groupings.composable(devices, anything)[devices]
        return
    for size in sizes:
        for made in (
            groupings.uniform(size, devices, sizes),
            groupings.complete([], devices, sizes),
        ):
            layout = groupings.canonical(made, per_host)
            assert sum(layout) == devices
            assert set(layout) <= set(sizes)
            assert sorted(layout) == sorted(made)


@given(st.lists(st.sampled_from([1, 2, 4, 8, 16, 32]), min_size=1, max_size=40))
@settings(**QUICK)
def test_powers_of_two_never_straddle_hosts(sizes):
    layout = groupings.canonical(sizes, 8)
    assert list(layout) == sorted(sizes, reverse=True)
    assert not straddling(layout, 8)


def test_other_sizes_are_put_host_by_host():
    assert groupings.canonical([6, 6, 2, 2], 8) == (6, 2, 6, 2)
    assert groupings.canonical([12, 4, 6, 2], 8) == (12, 4, 6, 2)
    assert groupings.canonical([6, 6, 6, 6], 8) == (6, 6, 6, 6), "nothing helps: descending"


def test_partitions_of_few_devices_are_all_there():
    found = set(all_layouts((1, 2, 4), 4))
    assert found == {(4,), (2, 2), (2, 1, 1), (1, 1, 1, 1)}


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
@settings(**QUICK)
def test_each_hop_brings_the_keys_that_its_ppermute_sends(sizes):
    layout = tuple(sizes)
    holds = {device: device for device in range(sum(layout))}
    seen = {device: {device} for device in holds}
    for hop in range(1, groupings.num_hops(layout) + 1):
        pairs = groupings.hop_permutation(layout, hop)
        assert len({source for source, _ in pairs}) == len({to for _, to in pairs}) == len(pairs)
        holds = {to: holds[source] for source, to in pairs}
        source = key_source(layout, hop)
        assert {d: s for d, s in enumerate(source) if s >= 0} == holds
        for device, keys in holds.items():
            assert keys not in seen[device]
            seen[device].add(keys)
    first, size = groupings.group_of_device(layout)
    for device, keys in seen.items():
        assert keys == set(range(first[device], first[device] + size[device]))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
@settings(**QUICK | {"max_examples": 200})
def test_gradients_of_keys_return_to_their_owner(sizes):
    layout = tuple(sizes)
    carries = {device: device for device in range(sum(layout))}
    for hop in range(1, groupings.num_hops(layout) + 1):
        moved = dict(carries)
        for source, to in groupings.homeward_permutation(layout, hop):
            moved[to] = carries[source]
        carries = moved
        source = key_source(layout, hop)
        for device in np.flatnonzero(source >= 0):
            assert carries[device] == source[device], "as long as keys travel, beside them"
    assert all(device == keys for device, keys in carries.items())


@pytest.mark.parametrize("layout", [(4, 4, 1), (8, 0), (), (4.0, 4), (True,) * 8, (9, -1)])
def test_an_invalid_grouping_is_refused(layout):
    with pytest.raises(ValueError, match="add up to num_devices=8"):
        groupings.check_layout(layout, 8)


def test_groupings_are_described_briefly():
    assert groupings.describe((4, 4, 2, 1, 1, 1)) == "4×2 + 2 + 1×3"
