"""Share documents out over microbatches of about equal work, for pipelines; NumPy only.

In a pipeline the longest microbatch passes every stage, so it costs its own time and (pp - 1) times
more. Long documents are then better spread over microbatches than put together, where groups that
work beside each other would wait for none.
"""

import heapq

from hcp_jax.dynamic.fill import Filled, Problem


def even_microbatches(problem: Problem, size: int, at_least: int) -> list[Filled]:
    """Return microbatches of equal groups that have about equal work.

    Each document, longest first, goes to the group with the least work that has room for it. More
    microbatches are opened where there is none.

    Args:
        problem: documents and devices.
        size: devices of each group; a group of this size holds the longest document.
        at_least: number of microbatches to begin with.
    """
    group = problem.group(size, size)
    beside, capacity, most = problem.num_devices // size, size * problem.tokens, problem.most(group)
    # Least work first, then as many microbatches as possible: the groups of one work side by side.
    places = [(0.0, g * at_least + i, i) for g in range(beside) for i in range(at_least)]
    heapq.heapify(places)
    held: dict[int, list[int]] = {place: [] for _, place, _ in places}
    room = dict.fromkeys(held, capacity)
    of_microbatch = {place: i for _, place, i in places}
    number = at_least
    for rank in reversed(range(len(problem.lengths))):
        length, full = problem.lengths[rank], []
        while places and room[places[0][1]] < length:
            full.append(heapq.heappop(places))
        if not places:
            for _ in range(beside):
                place = len(held)
                held[place], room[place], of_microbatch[place] = [], capacity, number
                heapq.heappush(places, (0.0, place, number))
            number += 1
        pairs, place, microbatch = heapq.heappop(places)
        held[place].append(rank)
        room[place] -= length
        for one in full:
            heapq.heappush(places, one)
        if len(held[place]) < most:
            heapq.heappush(places, (pairs + group.pairs(length), place, microbatch))
    filled = [[held[p] for p in held if of_microbatch[p] == i] for i in range(number)]
    return [_filled(problem, size, groups) for groups in filled if any(groups)]


def _filled(problem: Problem, size: int, groups: list[list[int]]) -> Filled:
    group = problem.group(size, size)
    busiest = max(sum(group.pairs(problem.lengths[rank]) for rank in ranks) for ranks in groups)
    return Filled(
        (size,) * len(groups),
        groups,
        problem.cost.dense_seconds(problem.tokens) + group.seconds(busiest),
        sum(problem.values[rank] for ranks in groups for rank in ranks),
    )
