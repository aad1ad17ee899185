import numpy as np

from hcp_jax.dynamic import Cost
from hcp_jax.dynamic.fill import Filled, Problem
from hcp_jax.dynamic.refine import refine

LENGTHS = [100, 200, 300, 400, 500, 600]  # rank r has 100 (r + 1) tokens


def problem(tokens=1000):
    return Problem(LENGTHS, [1.0] * 6, [1.0] * 6, 2, tokens, Cost(), (1, 2), [])


def filled(*groups):
    lengths = [[LENGTHS[rank] for rank in group] for group in groups]
    layout = (1,) * len(groups)
    return Filled(layout, list(groups), Cost().microbatch_seconds(layout, lengths, 1000), 0.0)


def test_the_slowest_group_gives_until_none_is_relieved():
    before = filled([5, 3], [0], [1, 2])
    (after,) = refine(problem(), [before])
    assert after.seconds < before.seconds
    assert sorted(rank for group in after.groups for rank in group) == [0, 1, 2, 3, 5]
    held = [[LENGTHS[rank] for rank in group] for group in after.groups]
    assert np.isclose(after.seconds, Cost().microbatch_seconds(after.layout, held, 1000))


def test_the_last_microbatch_helps_out_without_getting_slower():
    before = [filled([4, 1], [3, 2]), filled([5], [0])]
    after = refine(problem(), before)
    assert sum(mb.seconds for mb in after) < sum(mb.seconds for mb in before)
    assert sum(len(group) for group in after[1].groups) > 2, "it took a document"
    assert after[1].seconds <= before[1].seconds * (1 + 1e-12)


def test_room_is_respected():
    before = filled([4, 0], [3, 1])
    (after,) = refine(problem(600), [before])
    assert after.groups == before.groups, "600 tokens leave no room for the exchange"
    (roomy,) = refine(problem(1000), [before])
    assert roomy.seconds < before.seconds
