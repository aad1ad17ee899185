"""Schedule documents, given their lengths, into microbatches on groups of devices.

Microbatches are built one after another from the remaining documents. For each, a few groupings are
tried, of group sizes in `groupings.chain`, sorted by size so that groups are aligned. A grouping is
filled as jobs are assigned to machines (longest processing time first, Graham 1969): the group with
the least work so far takes the longest document that it has room for. This rule has three effects.
Documents of similar length meet in one microbatch, so its groups finish together. Groups end up
full, because nearly every gap has a document that fits it. Wide groups, whose hops cost time even
when empty, take documents only while that time is hidden.

The grouping with the highest efficiency is kept: the minimum cost of its documents
(`bound.document_prices`, their share of the lower bound) over the seconds of the microbatch.

Only the order of documents of equal length is random (from the seed), and all arithmetic is plain
floats in a fixed order, so every host gets the same schedule. Every microbatch takes the longest
remaining document, so scheduling always ends.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from hcp_jax.base import checks
from hcp_jax.dynamic.bound import document_prices, group_costs
from hcp_jax.dynamic.cost import Cost, GroupCost
from hcp_jax.dynamic.fill import Filled, Problem, Unscheduled, fill
from hcp_jax.dynamic.plan import Schedule
from hcp_jax.dynamic.refine import refine
from hcp_jax.sequence import groupings
from hcp_jax.sequence.groupings import Grouping
from hcp_jax.sequence.packing import Microbatch

_TIE = 1.0002  # schedules closer than this ratio count as equal: the cost model is not more exact


# A function that proposes groupings for the unscheduled documents; at least one holds the longest.
_Propose = Callable[[Problem, Unscheduled], Sequence[Grouping]]


def schedule(
    lengths: Sequence[int] | np.ndarray,
    num_devices: int = 64,
    max_tokens_per_device: int = 2048,
    min_cp_size: int = 1,
    max_cp_size: int | None = None,
    menu: Iterable[int] | None = None,
    cost: Cost | None = None,
    seed: int = 0,
    lanes: int = 1,
) -> Schedule:
    """Schedule every document on as many devices as it needs.

    Args:
        lengths: tokens of each document, each at least 1.
        num_devices: N, the number of data-parallel times context-parallel devices.
        max_tokens_per_device: M, tokens of the buffer that each device holds in each microbatch; a
            group of g devices holds g·M tokens.
        min_cp_size: smallest size of a group.
        max_cp_size: largest size of a group; N if None.
        menu: devices of the widest group of each program that may be used; if None, every possible
            group size has a program.
        cost: cost model; `Cost()` if None.
        seed: decides the order of documents of equal length.
        lanes: A, devices that exchange heads with each other; 1 without exchange.

    Returns:
        The schedule, immutable, with every document exactly once and no device above M tokens.

    Raises:
        ValueError: if an argument is invalid, or a document is longer than the widest group holds;
            names it and the smallest max_tokens_per_device that would do.

    >>> plan = schedule([3000, 500, 700, 900], num_devices=4, max_tokens_per_device=1024)
    >>> [(m.grouping, m.documents) for m in plan.microbatches]
    [((4,), ((0, 3),)), ((1, 1, 1, 1), ((2,), (1,), (), ()))]
    """
    cost = Cost() if cost is None else cost
    by_index = check_lengths(lengths)
    num_devices = checks.integer("num_devices", num_devices, least=1)
    lanes = checks.integer("lanes", lanes, least=1)
    _check_tokens(max_tokens_per_device, num_devices)
    max_tokens_per_device = int(max_tokens_per_device)
    sizes = groupings.widths(num_devices, cost.devices_per_host, lanes, min_cp_size, max_cp_size)
    programs = check_menu(menu, sizes)
    sizes = tuple(size for size in sizes if size <= programs[-1])
    _check_fits(by_index, max_tokens_per_device, sizes[-1])

    order = _ascending(by_index, checks.integer("seed", seed, least=0))
    problem = _problem(
        by_index[order], num_devices, max_tokens_per_device, cost, sizes, programs, lanes
    )
    return Schedule(
        lengths=tuple(by_index.tolist()),
        num_devices=num_devices,
        max_tokens_per_device=max_tokens_per_device,
        menu=programs,
        microbatches=tuple(_microbatch(mb, order, lanes) for mb in _search(problem)),
        cost=cost,
        sizes=sizes,
        lanes=lanes,
    )


def check_menu(menu: Iterable[int] | None, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the widest groups of the programs, ascending; all sizes if `menu` is None.

    Raises:
        ValueError: if one of them is not a possible group size.
    """
    if menu is None:
        return sizes
    widths = sorted({checks.integer("menu", width, least=1) for width in menu})
    wrong = [width for width in widths if width not in sizes]
    if wrong or not widths:
        raise ValueError(
            f"menu must be widths of groups out of {', '.join(map(str, sizes))}, got "
            f"{wrong or 'none'}."
        )
    return tuple(widths)


def check_lengths(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return `lengths` as int64.

    Raises:
        ValueError: if they are not integers of at least 1 in one dimension.
    """
    array = np.asarray(lengths)
    if array.size == 0 and array.ndim == 1:
        return np.zeros(0, np.int64)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"lengths must be integers in one dimension, got {array.dtype} of shape {array.shape}."
        )
    wrong = np.flatnonzero(array < 1)
    if wrong.size:
        raise ValueError(
            f"document {wrong[0]} has length {array[wrong[0]]}; lengths must be >= 1: leave empty "
            "documents out."
        )
    return array.astype(np.int64)


def _check_tokens(max_tokens_per_device: int, num_devices: int) -> None:
    value = checks.integer("max_tokens_per_device", max_tokens_per_device, least=1)
    if value * num_devices > np.iinfo(np.int32).max:
        raise ValueError(
            f"num_devices={num_devices} times max_tokens_per_device={value} passes 2**31 - 1, the "
            "greatest index of a token in a group; lower one of them."
        )


def _check_fits(lengths: np.ndarray, max_tokens_per_device: int, widest: int) -> None:
    if lengths.size == 0 or int(lengths.max()) <= widest * max_tokens_per_device:
        return
    longest = int(lengths.argmax())
    length = int(lengths[longest])
    raise ValueError(
        f"document {longest} has {length} tokens, but the widest group, of {widest} devices, holds "
        f"{widest} * {max_tokens_per_device} = {widest * max_tokens_per_device}. Raise "
        f"max_tokens_per_device to {-(-length // widest)} or more, allow wider groups, or cut it."
    )


def _ascending(lengths: np.ndarray, seed: int) -> np.ndarray:
    """Sort documents by length; the seed decides the order of documents of equal length."""
    shuffled = np.random.default_rng(seed).permutation(lengths.size)
    return shuffled[np.argsort(lengths[shuffled], kind="stable")]


def _problem(
    ascending: np.ndarray,
    num_devices: int,
    tokens: int,
    cost: Cost,
    sizes: tuple[int, ...],
    programs: tuple[int, ...],
    lanes: int,
) -> Problem:
    groups = group_costs(sizes, tokens, cost, lanes)
    unique, inverse, count = np.unique(ascending, return_inverse=True, return_counts=True)
    prices = document_prices(unique, count, groups, tokens, cost.dense_seconds(tokens))
    values = prices / num_devices
    density = np.maximum.accumulate(values / unique) if unique.size else values
    return Problem(
        lengths=ascending.tolist(),
        values=values[inverse].tolist(),
        density=density[inverse].tolist(),
        num_devices=num_devices,
        tokens=tokens,
        cost=cost,
        lanes=lanes,
        sizes=sizes,
        programs=programs,
        groups=groups,
    )


def _search(problem: Problem) -> list[Filled]:
    """Try a few ways to choose groupings; return the microbatches of the best one.

    The ways are: by efficiency, one microbatch at a time, which is best for most data; each
    document in the narrowest group that holds it; equal groups in every microbatch; and groups of
    one size throughout, which packs tightest if there are few documents. Among ways that take the
    same time within the model's accuracy, the most even one is chosen.
    """
    found: list[tuple[float, list[Filled]]] = []
    for propose in (_by_target, _narrowest_only, _equal_groups, *_one_size(problem)):
        give_up = min((seconds for seconds, _ in found), default=float("inf")) * _TIE
        filled = _build(problem, propose, give_up)
        if filled is not None:
            filled = refine(problem, filled)
            found.append((sum(mb.seconds for mb in filled), filled))
    least = min(seconds for seconds, _ in found)
    tied = [filled for seconds, filled in found if seconds <= least * _TIE]
    return min(tied, key=lambda filled: _busiest_pairs(filled, problem.lengths))


def _busiest_pairs(filled: Sequence[Filled], lengths: list[int]) -> float:
    """Sum the attention pairs of the busiest device over microbatches; less is more even."""
    total = 0.0
    for mb in filled:
        total += max(
            sum(lengths[rank] * (lengths[rank] + 1) for rank in group) / size
            for size, group in zip(mb.grouping, mb.groups, strict=True)
        )
    return total


def _build(
    problem: Problem, propose: _Propose, give_up: float = float("inf")
) -> list[Filled] | None:
    """Build microbatches for all documents, from groupings that are proposed on the way.

    Return None as soon as they are certain to take `give_up` seconds or more.
    """
    unscheduled = Unscheduled(len(problem.lengths))
    filled: list[Filled] = []
    worth = sum(problem.values)
    seconds = 0.0
    while unscheduled.count:
        if (seconds + worth) * (1 + 1e-12) >= give_up:
            return None
        best = _best(problem, unscheduled, propose(problem, unscheduled))
        unscheduled.remove(itertools.chain.from_iterable(best.groups))
        filled.append(best)
        seconds += best.seconds
        worth -= best.value
    return None if seconds * (1 + 1e-12) >= give_up else filled


def _best(problem: Problem, unscheduled: Unscheduled, candidates: Iterable[Grouping]) -> Filled:
    """Return the most efficient candidate; candidates that cannot beat the best are not filled."""
    rank = unscheduled.longest()
    longest = problem.lengths[rank]
    worth = problem.num_devices * problem.tokens * problem.density[rank]
    queue = []
    for order, grouping in enumerate(candidates):
        costs = problem.costs(grouping)
        able = [cost for cost in set(costs) if cost.size * problem.tokens >= longest]
        if able:
            least = min(cost.seconds(cost.pairs(longest)) for cost in able)
            empty = max(cost.seconds(0.0) for cost in set(costs))
            dense = problem.dense_seconds(grouping)
            queue.append((dense + max(least, empty), order, grouping, costs))
    best, efficiency = None, 0.0
    for least, _, grouping, costs in sorted(queue, key=lambda item: item[:2]):
        if best is not None and worth <= efficiency * least:
            break
        filled = fill(problem, unscheduled, grouping, costs)
        if best is None or filled.value > efficiency * filled.seconds * (1 + 1e-12):
            best, efficiency = filled, filled.value / filled.seconds
    assert best is not None, "a grouping that holds the longest document is always among them"
    return best


def _by_target(problem: Problem, unscheduled: Unscheduled) -> list[Grouping]:
    """Propose groupings, from wide groups that are fast to narrow ones that are cheap.

    For each of several target times, every document, longest first, gets the narrowest group that
    holds it within the target. The targets are fractions of the time of the longest document in the
    narrowest group that holds it. One more grouping for every size has equal groups of it; sizes
    below the lanes occur only so, in programs with a narrower exchange.
    """
    longest = problem.lengths[unscheduled.longest()]
    narrowest = _able(problem, longest)[0]
    slowest = narrowest.seconds(narrowest.pairs(longest))
    parts = (1.0, 0.8, 0.6, 0.4, 0.2, 0.1)
    proposed = [_narrowest(problem, unscheduled, slowest * part) for part in parts]
    proposed += _narrowest_only(problem, unscheduled)
    proposed += _equal_groups(problem, unscheduled)
    return list(dict.fromkeys(proposed))


def _narrowest_only(problem: Problem, unscheduled: Unscheduled) -> list[Grouping]:
    return [_narrowest(problem, unscheduled, float("inf"))]


def _equal_groups(problem: Problem, unscheduled: Unscheduled) -> list[Grouping]:
    longest = problem.lengths[unscheduled.longest()]
    return [_equal(problem, cost.size) for cost in _able(problem, longest)]


def _one_size(problem: Problem) -> Iterator[_Propose]:
    for cost in _able(problem, problem.lengths[-1]) if problem.lengths else ():
        grouping = _equal(problem, cost.size)
        yield lambda *_, grouping=grouping: [grouping]


def _able(problem: Problem, length: int) -> list[GroupCost]:
    """Return the groups that hold a document of `length` tokens, narrowest first."""
    return [cost for cost in problem.groups if cost.size * problem.tokens >= length]


def _equal(problem: Problem, size: int) -> Grouping:
    return (size,) * (problem.num_devices // size)


def _narrowest(problem: Problem, unscheduled: Unscheduled, target: float) -> Grouping:
    """Return a grouping that gives each document the narrowest group within the target.

    Devices that are left over form groups of the smallest size. A size of the chain divides all
    wider ones, so groups in descending order are aligned.
    """
    whole = [cost for cost in problem.groups if cost.size >= problem.lanes] or problem.groups
    smallest, rest = whole[0].size, problem.num_devices
    chosen: list[int] = []
    for rank in unscheduled.descending():
        size = _narrowest_size(whole, problem, problem.lengths[rank], target)
        if size == smallest or size > rest:
            break
        chosen.append(size)
        rest -= size
    return tuple(sorted([*chosen, *[smallest] * (rest // smallest)], reverse=True))


def _narrowest_size(
    groups: Sequence[GroupCost], problem: Problem, length: int, target: float
) -> int:
    """Return the narrowest group size that needs at most `target` seconds, or else the fastest."""
    quickest, least = 0, float("inf")
    for cost in groups:
        if cost.size * problem.tokens >= length:
            seconds = cost.seconds(cost.pairs(length))
            if seconds <= target:
                return cost.size
            if seconds < least:
                quickest, least = cost.size, seconds
    return quickest


def _microbatch(filled: Filled, order: np.ndarray, lanes: int) -> Microbatch:
    return Microbatch(
        grouping=filled.grouping,
        documents=tuple(tuple(int(order[rank]) for rank in group) for group in filled.groups),
        lanes=min(lanes, max(filled.grouping)),
    )
