"""Fill the groups of one microbatch with documents that are not scheduled yet.

Every search for a schedule fills groupings by the same rule: the group with the least work takes
the longest document that it has room for. `Unscheduled` finds that document in nearly constant
time, so the time of scheduling grows linearly with the number of documents.
"""

import dataclasses
import heapq
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from hcp_jax.dynamic.cost import Cost
from hcp_jax.dynamic.group import Group
from hcp_jax.sequence.groupings import Grouping
from hcp_jax.sequence.packing import max_documents


@dataclasses.dataclass(frozen=True)
class Problem:
    """Fixed data of the search for a schedule.

    The rank of a document is its index in ascending order of length.
    """

    lengths: list[int]  # ascending
    values: list[float]  # seconds that each document's share of the lower bound is worth
    density: list[float]  # the greatest value per token among ranks 0 … r
    num_devices: int
    tokens: int  # M
    cost: Cost
    menu: tuple[int, ...]  # widths of the programs that may be used
    smallest: int  # the smallest group beside wider ones
    best: list[Group]  # the cheapest group of each possible size, ascending
    num_stages: int = 1  # of a pipeline
    num_steps: int = 1  # steps that the microbatches are dealt to
    known: dict[tuple[int, int], Group] = dataclasses.field(default_factory=dict)

    def group(self, size: int, widest: int) -> Group:
        """Return the cost of a group in a program."""
        key = size, widest
        if key not in self.known:
            self.known[key] = self.cost.group(*key, self.num_devices, self.tokens)
        return self.known[key]

    def most(self, group: Group) -> int:
        """Return the most documents that a group may hold; one member holds any number."""
        return max_documents(self.tokens) if group.members > 1 else len(self.lengths)


class Filled(NamedTuple):
    """Planned microbatch.

    Attributes:
        grouping: group sizes in device order.
        groups: ranks of each group's documents.
        seconds: modelled seconds.
        value: share of its documents in the lower bound, in seconds.
    """

    grouping: Grouping
    groups: list[list[int]]
    seconds: float
    value: float


class Unscheduled:
    """Set of documents, by rank, that no microbatch contains yet.

    It is a disjoint-set forest over ranks: every scheduled rank points to a lower one, and the root
    of a rank is the longest unscheduled document that is not longer than it. Nodes are ranks plus
    one; node 0 means "none".

    Args:
        count: number of documents.
    """

    def __init__(self, count: int):
        self._below = list(range(count + 1))
        self.count = count

    def longest(self) -> int:
        """Return the greatest unscheduled rank; -1 if there is none."""
        return self.find(len(self._below) - 1) - 1

    def descending(self) -> Iterator[int]:
        """Yield the unscheduled ranks, the longest document first."""
        node = self.find(len(self._below) - 1)
        while node:
            yield node - 1
            node = self.find(node - 1)

    def find(self, node: int) -> int:
        """Return the root of `node`, and shorten the path to it for the next search."""
        below = self._below
        while below[node] != node:
            below[node] = node = below[below[node]]
        return node

    def remove(self, ranks: Iterable[int]) -> None:
        """Mark ranks as scheduled."""
        for rank in ranks:
            self._below[rank + 1] = rank
            self.count -= 1


def fill(problem: Problem, unscheduled: Unscheduled, grouping: Grouping) -> Filled:
    """Fill a grouping: the group with the least work takes the longest document it has room for.

    `unscheduled` is not modified, because several groupings are filled before one is chosen.
    """
    lengths, values = problem.lengths, problem.values
    left = unscheduled.count
    groups = [problem.group(size, grouping[0]) for size in grouping]
    most = [problem.most(group) for group in groups]
    room = [size * problem.tokens for size in grouping]
    pairs = [0.0] * len(grouping)
    inside: list[list[int]] = [[] for _ in grouping]
    value = slowest = 0.0
    taken: dict[int, int] = {}  # node of a document taken here -> a lower node to go on from
    # Among groups of equal work the widest comes first, so that it gets the longest document.
    heap = [(group.seconds(0.0), -group.size, number) for number, group in enumerate(groups)]
    heapq.heapify(heap)
    while heap and left:
        _, width, number = heap[0]
        node = unscheduled.find(bisect_right(lengths, room[number]))
        path: list[int] = []
        while node in taken:
            path.append(node)
            node = unscheduled.find(taken[node])
        for passed in path:
            taken[passed] = node  # shorten the path for the next search
        if node == 0 or len(inside[number]) == most[number]:
            slowest = max(slowest, heapq.heappop(heap)[0])
            continue
        taken[node], left = node - 1, left - 1
        rank = node - 1
        length, group = lengths[rank], groups[number]
        room[number] -= length
        pairs[number] += group.pairs(length)
        value += values[rank]
        inside[number].append(rank)
        heapq.heapreplace(heap, (group.seconds(pairs[number]), width, number))
    slowest = max([slowest, *(item[0] for item in heap)])
    dense = problem.cost.dense_seconds(problem.tokens)
    return Filled(grouping, inside, dense + slowest, value)
