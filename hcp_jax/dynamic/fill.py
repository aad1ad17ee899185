"""One microbatch: filling the groups of a layout with documents that are left.

It stands alone because everything that looks for a schedule fills layouts, and does so in one way:
the group with least work takes the longest document that it has room for.
"""

import heapq
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from hcp_jax.dynamic.cost import Cost, Ring
from hcp_jax.dynamic.groups import Layout


def max_documents_per_ring(max_tokens_per_device: int) -> int:
    """Documents that a group of several devices may hold.

    Each has two runs of keys on every device, and how many runs there are is part of the compiled
    program: at most one to 16 tokens, so that looking through them costs little beside attention.
    """
    return max(64, max_tokens_per_device // 32)


class Problem(NamedTuple):
    """What does not change while microbatches are built. A rank is a place in ascending order."""

    lengths: list[int]  # ascending
    values: list[float]  # seconds that each document's share of the lower bound is worth
    density: list[float]  # the greatest value per token among ranks 0 … r
    num_devices: int
    tokens: int  # M
    cost: Cost
    sizes: tuple[int, ...]  # ascending
    rings: list[Ring]  # the best of each size, ascending


class Filled(NamedTuple):
    """A microbatch while it is planned.

    Attributes:
        layout: group sizes in device order.
        groups: the ranks of each group's documents: their places in ascending order of length.
        seconds: modelled.
        value: the documents' share of the lower bound, in seconds.
    """

    layout: Layout
    groups: list[list[int]]
    seconds: float
    value: float


def fill(problem: Problem, remaining: list[int], layout: Layout, rings: Sequence[Ring]) -> Filled:
    """Fill a layout: the group with least work takes the longest document it has room for."""
    lengths, values = problem.lengths, problem.values
    left = remaining.copy()
    room = [size * problem.tokens for size in layout]
    pairs = [0.0] * len(layout)
    inside: list[list[int]] = [[] for _ in layout]
    most = max_documents_per_ring(problem.tokens)
    value = slowest = 0.0
    # Of equals the widest first, so that it gets the longest document.
    heap = [(ring.seconds(0.0), -ring.size, group) for group, ring in enumerate(rings)]
    heapq.heapify(heap)
    while heap and left:
        _, width, group = heap[0]
        place = bisect_right(left, bisect_right(lengths, room[group]) - 1)
        if place == 0 or (width < -1 and len(inside[group]) == most):
            slowest = max(slowest, heapq.heappop(heap)[0])
            continue
        rank = left.pop(place - 1)
        length, ring = lengths[rank], rings[group]
        room[group] -= length
        pairs[group] += ring.pairs(length)
        value += values[rank]
        inside[group].append(rank)
        heapq.heapreplace(heap, (ring.seconds(pairs[group]), width, group))
    slowest = max([slowest, *(item[0] for item in heap)])
    dense = problem.cost.dense_seconds(problem.tokens)
    return Filled(layout, inside, dense + slowest, value)
