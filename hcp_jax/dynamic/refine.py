"""Refine a schedule by exchanging documents between groups, so that groups finish together.

It starts from a finished schedule and can only improve it.
"""

from bisect import bisect_left
from collections.abc import Sequence

from hcp_jax.dynamic.fill import Filled, Problem
from hcp_jax.dynamic.group import Group

# Enough for most of the possible gain, and few enough to take little of the scheduler's time.
_STEPS, _PARTNERS = 12, 4
# A microbatch whose slowest group is within this share of its mean group is even enough.
_EVEN = 1e-3


class _Held:
    """Group whose documents are exchanged."""

    def __init__(self, group: Group, ranks: list[int], problem: Problem):
        self.group = group
        self.ranks = list(ranks)
        self.most = problem.most(group)
        self.room = group.size * problem.tokens - sum(problem.lengths[rank] for rank in ranks)
        self.pairs = sum(group.pairs(problem.lengths[rank]) for rank in ranks)
        self.seconds = group.seconds(self.pairs)


def refine(problem: Problem, filled: Sequence[Filled]) -> list[Filled]:
    """Relieve the slowest group of each microbatch by exchanging documents with faster groups.

    Exchanges within a microbatch must leave both groups faster than the slowest one was. Exchanges
    with the last microbatch, which often has room, must not make that microbatch slower.

    Args:
        problem: the fixed data of the search.
        filled: microbatches, at least one.
    """
    lengths = problem.lengths
    work = [
        [
            _Held(problem.group(size, mb.grouping[0]), ranks, problem)
            for size, ranks in zip(mb.grouping, mb.groups, strict=True)
        ]
        for mb in filled
    ]
    for own in work:
        for _ in range(_STEPS):
            if not _relieve(own, work[-1], lengths):
                break
    dense = problem.cost.dense_seconds(problem.tokens)
    return [
        mb._replace(
            groups=[held.ranks for held in own],
            seconds=dense + max(held.seconds for held in own),
        )
        for mb, own in zip(filled, work, strict=True)
    ]


def _relieve(own: list[_Held], last: list[_Held], lengths: list[int]) -> bool:
    """Make the best exchange that relieves the slowest group of `own`; False if there is none."""
    order = sorted(own, key=lambda held: held.seconds)
    slow = order[-1]
    limit = slow.seconds * (1 - 1e-12)
    if len(own) > 1 and slow.seconds <= (1 + _EVEN) * sum(h.seconds for h in own) / len(own):
        return False
    partners = [(held, limit) for held in order[:_PARTNERS] if held is not slow]
    if own is not last:
        least = sorted(last, key=lambda held: held.seconds)
        partners += [(held, least[-1].seconds) for held in least[:_PARTNERS]]
    options = [
        (*_best_exchange(slow, held, lengths, allowed), i)
        for i, (held, allowed) in enumerate(partners)
    ]
    took, give, take, i = min(options, default=(limit, 0, -1, 0))
    if took >= limit:
        return False
    _move(slow, partners[i][0], give, lengths)
    if take >= 0:
        _move(partners[i][0], slow, take, lengths)
    return True


def _best_exchange(
    slow: _Held, quick: _Held, lengths: list[int], limit: float
) -> tuple[float, int, int]:
    """Return the best exchange: (seconds of the slower group, rank given, rank taken or -1).

    `quick` may take at most `limit` seconds. It may belong to another microbatch and be slower than
    `slow`, so it counts as no slower than `slow` was. Documents of equal length are equivalent.

    The longer the document that comes back, the slower is `slow` and the faster is `quick`. So the
    best one is where they meet, which bisection finds.
    """
    best = (float("inf"), 0, -1)
    takes = {lengths[rank]: rank for rank in quick.ranks}
    if len(quick.ranks) < quick.most:
        takes[0] = -1
    backs = sorted(takes)
    for length, give in {lengths[rank]: rank for rank in slow.ranks}.items():
        less = slow.pairs - slow.group.pairs(length)
        more = quick.pairs + quick.group.pairs(length)

        def seconds(back: int, less: float = less, more: float = more) -> tuple[float, float]:
            if not back:
                return slow.group.seconds(less), quick.group.seconds(more)
            return (
                slow.group.seconds(less + slow.group.pairs(back)),
                quick.group.seconds(more - quick.group.pairs(back)),
            )

        low = bisect_left(backs, length - quick.room)
        high = end = bisect_left(backs, length)
        first = low
        while low < high:  # the first document back that leaves `slow` no faster than `quick`
            middle = (low + high) // 2
            from_slow, to_quick = seconds(backs[middle])
            if from_slow < to_quick:
                low = middle + 1
            else:
                high = middle
        for place in range(max(first, low - 1), min(low + 1, end)):
            from_slow, to_quick = seconds(backs[place])
            if to_quick <= limit:
                slower = max(from_slow, min(to_quick, slow.seconds))
                best = min(best, (slower, give, takes[backs[place]]))
    return best


def _move(source: _Held, target: _Held, rank: int, lengths: list[int]) -> None:
    length = lengths[rank]
    source.ranks.remove(rank)
    target.ranks.append(rank)
    for held, sign in ((source, -1), (target, 1)):
        held.room -= sign * length
        held.pairs += sign * held.group.pairs(length)
        held.seconds = held.group.seconds(max(held.pairs, 0.0))
