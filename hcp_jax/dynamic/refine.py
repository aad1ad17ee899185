"""Refine a schedule by exchanging documents between groups, so that groups finish together.

It starts from a finished schedule and can only improve it.
"""

from collections.abc import Sequence

from hcp_jax.dynamic.cost import GroupCost
from hcp_jax.dynamic.fill import Filled, Problem
from hcp_jax.sequence.packing import max_documents_per_group

# Enough for most of the possible gain, and few enough to take little of the scheduler's time.
_STEPS, _PARTNERS = 12, 4


class _Group:
    """Group whose documents are exchanged."""

    def __init__(self, cost: GroupCost, ranks: list[int], lengths: list[int], tokens: int):
        self.cost = cost
        self.ranks = list(ranks)
        self.room = cost.size * tokens - sum(lengths[rank] for rank in ranks)
        self.pairs = sum(cost.pairs(lengths[rank]) for rank in ranks)
        self.seconds = cost.seconds(self.pairs)


def refine(problem: Problem, filled: Sequence[Filled]) -> list[Filled]:
    """Relieve the slowest group of each microbatch by exchanging documents with faster groups.

    Exchanges within a microbatch must leave both groups faster than the slowest one was. Exchanges
    with the last microbatch, which often has room, must not make that microbatch slower.

    Args:
        problem: the fixed data of the search.
        filled: microbatches, at least one.
    """
    lengths, tokens = problem.lengths, problem.tokens
    most = max_documents_per_group(tokens)
    work = [
        [
            _Group(*of, lengths, tokens)
            for of in zip(problem.costs(mb.grouping), mb.groups, strict=True)
        ]
        for mb in filled
    ]
    for own in work:
        for _ in range(_STEPS):
            if not _relieve(own, work[-1], lengths, most):
                break
    return [
        mb._replace(
            groups=[group.ranks for group in own],
            seconds=problem.dense_seconds(mb.grouping) + max(group.seconds for group in own),
        )
        for mb, own in zip(filled, work, strict=True)
    ]


def _relieve(own: list[_Group], last: list[_Group], lengths: list[int], most: int) -> bool:
    """Make the best exchange that relieves the slowest group of `own`; False if there is none."""
    order = sorted(own, key=lambda group: group.seconds)
    slow = order[-1]
    limit = slow.seconds * (1 - 1e-12)
    partners = [(group, limit) for group in order[:_PARTNERS] if group is not slow]
    if own is not last:
        least = sorted(last, key=lambda group: group.seconds)
        partners += [(group, least[-1].seconds) for group in least[:_PARTNERS]]
    options = [
        (*_best_exchange(slow, group, lengths, most, allowed), i)
        for i, (group, allowed) in enumerate(partners)
    ]
    took, give, take, i = min(options, default=(limit, 0, -1, 0))
    if took >= limit:
        return False
    _move(slow, partners[i][0], give, lengths)
    if take >= 0:
        _move(partners[i][0], slow, take, lengths)
    return True


def _best_exchange(
    slow: _Group, quick: _Group, lengths: list[int], most: int, limit: float
) -> tuple[float, int, int]:
    """Return the best exchange: (seconds of the slower group, rank given, rank taken or -1).

    `quick` may take at most `limit` seconds. It may belong to another microbatch and be slower than
    `slow`, so it counts as no slower than `slow` was. Documents of equal length are equivalent.
    """
    best = (float("inf"), 0, -1)
    takes = {lengths[rank]: rank for rank in quick.ranks}
    if quick.cost.members == 1 or len(quick.ranks) < most:
        takes[0] = -1
    for length, give in {lengths[rank]: rank for rank in slow.ranks}.items():
        less, more = slow.cost.pairs(length), quick.cost.pairs(length)
        for back, take in takes.items():
            if back >= length or length - back > quick.room:
                continue
            from_slow = slow.pairs - less + (slow.cost.pairs(back) if back else 0.0)
            to_quick = quick.pairs + more - (quick.cost.pairs(back) if back else 0.0)
            seconds = quick.cost.seconds(to_quick)
            if seconds <= limit:
                slower = max(slow.cost.seconds(from_slow), min(seconds, slow.seconds))
                best = min(best, (slower, give, take))
    return best


def _move(source: _Group, target: _Group, rank: int, lengths: list[int]) -> None:
    length = lengths[rank]
    source.ranks.remove(rank)
    target.ranks.append(rank)
    for group, sign in ((source, -1), (target, 1)):
        group.room -= sign * length
        group.pairs += sign * group.cost.pairs(length)
        group.seconds = group.cost.seconds(max(group.pairs, 0.0))
