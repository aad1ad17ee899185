import dataclasses
import itertools

import numpy as np

from hcp_jax.dynamic import Cost
from hcp_jax.dynamic.fill import Filled, Problem
from hcp_jax.dynamic.refine import _best_exchange, _Held, refine

COST = dataclasses.replace(Cost(), lanes=1, devices_per_host=4)
LENGTHS = [100, 200, 300, 400, 500, 600]  # rank r has 100 (r + 1) tokens


def problem(tokens=1000):
    return Problem(LENGTHS, [1.0] * 6, [1.0] * 6, 3, tokens, COST, (1, 3), 1, [])


def filled(*groups):
    lengths = [[LENGTHS[rank] for rank in group] for group in groups]
    grouping = (1,) * len(groups)
    return Filled(grouping, list(groups), COST.microbatch_seconds(grouping, lengths, 1000), 0.0)


def test_the_slowest_group_gives_until_none_is_relieved():
    before = filled([5, 3], [0], [1, 2])
    (after,) = refine(problem(), [before])
    assert after.seconds < before.seconds
    assert sorted(rank for group in after.groups for rank in group) == [0, 1, 2, 3, 5]
    held = [[LENGTHS[rank] for rank in group] for group in after.groups]
    assert np.isclose(after.seconds, COST.microbatch_seconds(after.grouping, held, 1000))


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


def test_the_exchange_found_by_bisection_is_the_best_of_all():
    """Against every pair of documents, on random groups."""
    rng = np.random.default_rng(0)
    lengths = sorted(rng.integers(1, 400, 24).tolist())
    wide = Problem(lengths, [1.0] * 24, [1.0] * 24, 4, 600, COST, (1, 2, 4), 1, [])
    found = 0
    for _ in range(200):
        ranks = rng.permutation(24)
        ours, theirs = ranks[:6].tolist(), ranks[6 : 6 + rng.integers(0, 6)].tolist()
        slow, quick = (
            _Held(wide.group(size, 2), held, wide)
            for size, held in zip(rng.choice([1, 2], 2).tolist(), (ours, theirs), strict=True)
        )
        limit = slow.seconds * (1 - 1e-12)
        best = float("inf")
        for give, take in itertools.product(ours, [*theirs, -1]):
            back = lengths[take] if take >= 0 else 0
            if back >= lengths[give] or lengths[give] - back > quick.room:
                continue
            pairs = [
                held.pairs + sign * (held.group.pairs(lengths[give]) - change)
                for held, sign in ((slow, -1), (quick, 1))
                for change in [held.group.pairs(back) if back else 0.0]
            ]
            after = slow.group.seconds(pairs[0]), quick.group.seconds(pairs[1])
            if after[1] <= limit:
                best = min(best, max(after))
        seconds, *_ = _best_exchange(slow, quick, lengths, limit)
        assert np.isclose(seconds, best) or seconds == best == float("inf")
        found += seconds < limit
    assert found > 50
