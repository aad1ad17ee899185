import dataclasses

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hcp_jax.dynamic import Cost
from hcp_jax.dynamic.bound import best_groups, document_prices, lower_bound
from tests.dynamic.strategies import QUICK, costs

FREE_LINKS = dataclasses.replace(
    Cost(), seconds_per_byte_inside=0.0, seconds_per_byte_across=0.0, seconds_per_hop=0.0, tile=0
)


@given(
    costs(),
    st.sampled_from([1, 2, 4, 6, 16]),
    st.lists(st.integers(1, 4000), min_size=1, max_size=8),
    st.sampled_from([0.0, 0.02]),
)
@settings(**QUICK | {"max_examples": 500})
def test_the_prices_of_a_group_s_documents_never_pass_what_the_group_costs(
    cost, size, wishes, slot
):
    """The claim on which the bound rests, for documents that fill a group to the brim or not."""
    tokens = 1000
    held, room = [], size * tokens
    for wish in wishes:
        if min(wish, room) > 0:
            held.append(min(wish, room))
            room -= held[-1]
    sizes = (1, 2, 4, 6, 16)
    groups = best_groups(sizes, 48, tokens, cost)
    unique, count = np.unique(np.array([*held, 1, 700, 16000]), return_counts=True)
    prices = dict(zip(unique, document_prices(unique, count, groups, tokens, slot), strict=True))
    group = groups[sizes.index(size)]
    seconds = slot + group.seconds(sum(group.pairs(length) for length in held))
    assert sum(prices[length] for length in held) <= size * seconds * (1 + 1e-9)


def test_perfectly_even_work_meets_the_bound():
    lengths = [1000] * 16
    seconds = 2 * FREE_LINKS.microbatch_seconds((1,) * 8, [[1000]] * 8, 1000)
    assert np.isclose(lower_bound(lengths, 8, 1000, (1, 2, 4, 8), FREE_LINKS), seconds)


def test_documents_that_share_no_microbatch_are_counted_one_by_one():
    """Three documents of 5/8 of all devices: three microbatches, though tokens would fit in two."""
    seconds = 3 * FREE_LINKS.microbatch_seconds((8,), [[5000]], 1000)
    found = lower_bound([5000] * 3, 8, 1000, (1, 2, 4, 8), FREE_LINKS)
    assert np.isclose(found, seconds)


def test_nothing_takes_no_time():
    assert lower_bound([], 8, 1000, (1, 2), Cost()) == 0.0
