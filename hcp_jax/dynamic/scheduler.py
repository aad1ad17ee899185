"""Schedule documents, given their lengths, into microbatches on groups of devices.

Microbatches are built one after another from the remaining documents. For each, a few groupings are
tried. A grouping is filled as jobs are assigned to machines (longest processing time first, Graham
1969): the group with the least work so far takes the longest document that it has room for. This
rule has three effects. Documents of similar length meet in one microbatch, so its groups finish
together. Groups end up full, because nearly every gap has a document that fits it. Wide groups,
whose hops cost time even when empty, take documents only while that time is hidden.

The grouping with the highest efficiency is kept: the minimum cost of its documents
(`bound.document_prices`, their share of the lower bound) over the seconds of the microbatch. It
decides the program too, which is that of the widest group.

Only the order of documents of equal length is random (from the seed), and all arithmetic is plain
floats in a fixed order, so every host gets the same schedule. Every microbatch takes the longest
remaining document, so scheduling always ends.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from hcp_jax.base import checks
from hcp_jax.dynamic.bound import best_groups, document_prices
from hcp_jax.dynamic.cost import Cost
from hcp_jax.dynamic.even import even_microbatches
from hcp_jax.dynamic.fill import Filled, Problem, Unscheduled, fill
from hcp_jax.dynamic.group import Group
from hcp_jax.dynamic.pipeline import order as order_of_ticks
from hcp_jax.dynamic.pipeline import ratio_to_ideal
from hcp_jax.dynamic.plan import Schedule
from hcp_jax.dynamic.refine import refine
from hcp_jax.sequence import groupings
from hcp_jax.sequence.groupings import Grouping
from hcp_jax.sequence.packing import Microbatch

_TIE = 1.0002  # schedules closer than this ratio count as equal: the cost model is not more exact
# With more documents the first way to choose groupings is the best one, so no other is tried.
_MANY = 4_000


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
    progress: Callable[[int], None] | None = None,
    num_stages: int = 1,
    num_steps: int = 1,
) -> Schedule:
    """Schedule every document on as many devices as it needs.

    Args:
        lengths: tokens of each document, each at least 1.
        num_devices: N, the number of data-parallel times context-parallel devices.
        max_tokens_per_device: M, tokens of the buffer that each device holds in each microbatch; a
            group of g devices holds g·M tokens.
        min_cp_size: smallest width of a program, in devices.
        max_cp_size: largest width of a program; N if None.
        menu: widths of the programs that may be used; all of `cost.widths(num_devices)` if None
            (`choose_menu` chooses fewer for a data set).
        cost: cost model, with the cluster's lanes and devices per host; `Cost()` if None.
        seed: decides the order of documents of equal length.
        progress: called now and then with the number of documents that are in microbatches.
        num_stages: stages of a pipeline that the microbatches pass; the schedule then minimises
            the time of its ticks, which is at most that of all microbatches plus (num_stages - 1)
            times that of the longest, and has them in the order in which stages wait least.
        num_steps: steps of a pipeline that the microbatches are dealt to (`schedule_batches`), each
            of which waits for its own longest; the schedule then has the longest first.

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
    sizes = program_widths(cost, num_devices, min_cp_size, max_cp_size)
    of_length = check_lengths(lengths)
    _check_tokens(max_tokens_per_device, num_devices)
    num_devices, max_tokens_per_device = int(num_devices), int(max_tokens_per_device)
    widths = sizes if menu is None else groupings.check_menu(menu, sizes)
    _check_fits(of_length, max_tokens_per_device, widths[-1])

    order = _ascending(of_length, checks.integer("seed", seed, least=0))
    ascending = of_length[order]
    problem = dataclasses.replace(
        _problem(ascending, num_devices, max_tokens_per_device, cost, sizes, widths),
        num_stages=checks.integer("num_stages", num_stages, least=1),
        num_steps=checks.integer("num_steps", num_steps, least=1),
    )
    filled = _search(problem, progress)
    if num_stages > 1 and num_steps > 1:
        filled = sorted(filled, key=lambda mb: -mb.seconds)
    elif num_stages > 1 and filled:
        filled = [filled[i] for i in order_of_ticks([mb.seconds for mb in filled], num_stages)]
    return Schedule(
        lengths=tuple(of_length.tolist()),
        num_devices=num_devices,
        max_tokens_per_device=max_tokens_per_device,
        menu=widths,
        microbatches=tuple(_microbatch(mb, order, cost) for mb in filled),
        cost=cost,
        sizes=sizes,
    )


def program_widths(
    cost: Cost, num_devices: int, min_cp_size: int = 1, max_cp_size: int | None = None
) -> tuple[int, ...]:
    """Return the widths from `min_cp_size` to `max_cp_size` that programs may have, ascending.

    Raises:
        ValueError: if the bounds are wrong, or no program has such a width.
    """
    num_devices = checks.integer("num_devices", num_devices, least=1)
    max_cp_size = num_devices if max_cp_size is None else max_cp_size
    return groupings.bounded(cost.widths(num_devices), min_cp_size, max_cp_size)


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
    menu: tuple[int, ...],
) -> Problem:
    best = best_groups(sizes, num_devices, tokens, cost)
    unique, inverse, count = np.unique(ascending, return_inverse=True, return_counts=True)
    prices = document_prices(unique, count, best, tokens, cost.dense_seconds(tokens))
    values = prices / num_devices
    density = np.maximum.accumulate(values / unique) if unique.size else values
    return Problem(
        lengths=ascending.tolist(),
        values=values[inverse].tolist(),
        density=density[inverse].tolist(),
        num_devices=num_devices,
        tokens=tokens,
        cost=cost,
        menu=menu,
        smallest=max(sizes[0], cost.chain(num_devices)[0]),
        best=best,
    )


def _search(problem: Problem, progress: Callable[[int], None] | None = None) -> list[Filled]:
    """Try a few ways to choose groupings; return the microbatches of the best one.

    In a pipeline, where the longest microbatch counts once for each stage, the result is compared
    with microbatches of equal work (`even_microbatches`).

    The ways are: by efficiency, one microbatch at a time, which is best for most data; each
    document in the narrowest group that holds it; and groups of one size throughout, which packs
    tightest if there are few documents. Among ways that take the same time within the model's
    accuracy, the most even one is chosen. With many documents it is always the first way.
    """
    ways = [_by_target, _narrowest_only, _equal_groups, *_one_size(problem)]
    found = _try_ways(problem, ways[: 1 if len(problem.lengths) > _MANY else None], progress)
    if problem.num_stages == 1 or not found:
        return found
    able = _able(problem, problem.lengths[-1])
    even = (even_microbatches(problem, group.size, len(found)) for group in able)
    return min([found, *even], key=functools.partial(_step_seconds, problem))


def _try_ways(
    problem: Problem,
    ways: Sequence[_Propose],
    progress: Callable[[int], None] | None = None,
) -> list[Filled]:
    """Return the microbatches of the best way."""
    found: list[tuple[float, list[Filled]]] = []
    for way in ways:
        give_up = min((seconds for seconds, _ in found), default=float("inf")) * _TIE
        filled = _build(problem, way, give_up, progress)
        if filled is not None:
            filled = refine(problem, filled) if filled else filled
            found.append((_step_seconds(problem, filled), filled))
    least = min(seconds for seconds, _ in found)
    tied = [filled for seconds, filled in found if seconds <= least * _TIE]
    return min(tied, key=lambda filled: _busiest_pairs(filled, problem.lengths))


def _step_seconds(problem: Problem, filled: Sequence[Filled]) -> float:
    """Return the seconds of all steps over all layers: in a pipeline, those of their ticks."""
    if problem.num_stages == 1:
        return sum(mb.seconds for mb in filled)
    longest_first = sorted((mb.seconds for mb in filled), reverse=True)
    dealt = (longest_first[i :: problem.num_steps] for i in range(problem.num_steps))
    return sum(ratio_to_ideal(t, problem.num_stages) * sum(t) for t in dealt if t)


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
    problem: Problem,
    propose: _Propose,
    give_up: float = float("inf"),
    progress: Callable[[int], None] | None = None,
) -> list[Filled] | None:
    """Build microbatches for all documents, from groupings proposed on the way.

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
        if progress is not None:
            progress(len(problem.lengths) - unscheduled.count)
    return None if seconds * (1 + 1e-12) >= give_up else filled


def _best(problem: Problem, unscheduled: Unscheduled, candidates: Iterable[Grouping]) -> Filled:
    """Return the most efficient candidate; candidates that cannot beat the best are not filled."""
    rank = unscheduled.longest()
    longest = problem.lengths[rank]
    worth = problem.num_devices * problem.tokens * problem.density[rank]
    dense = problem.cost.dense_seconds(problem.tokens)
    queue = []
    for order, grouping in enumerate(candidates):
        groups = [problem.group(size, grouping[0]) for size in set(grouping)]
        able = [group for group in groups if group.size * problem.tokens >= longest]
        if able:
            least = min(group.seconds(group.pairs(longest)) for group in able)
            empty = max(group.seconds(0.0) for group in groups)
            queue.append((dense + max(least, empty), order, grouping))
    best, efficiency = None, 0.0
    for least, _, grouping in sorted(queue):
        if best is not None and worth <= efficiency * least:
            break
        filled = fill(problem, unscheduled, grouping)
        if best is None or filled.value > efficiency * filled.seconds * (1 + 1e-12):
            best, efficiency = filled, filled.value / filled.seconds
    assert best is not None, "a grouping that holds the longest document is always among them"
    return best


def _by_target(problem: Problem, unscheduled: Unscheduled) -> list[Grouping]:
    """Propose groupings, from wide groups that are fast to narrow ones that are cheap.

    For each of several target times, every document, longest first, gets the narrowest group that
    holds it within the target. The targets are fractions of the time of the longest document in the
    narrowest group that holds it. One more grouping for every width has equal groups.
    """
    longest = problem.lengths[unscheduled.longest()]
    able = _able(problem, longest)
    slowest = able[0].seconds(able[0].pairs(longest))
    parts = (float("inf"), 1.0, 0.8, 0.6, 0.4, 0.2, 0.1)
    # Targets that lead to one width for the longest document mostly lead to one grouping.
    proposed = [_narrowest(problem, unscheduled, slowest * part) for part in parts]
    proposed += [_uniform(problem, group.size) for group in able]
    return list(dict.fromkeys(proposed))


def _narrowest_only(problem: Problem, unscheduled: Unscheduled) -> list[Grouping]:
    return [_narrowest(problem, unscheduled, float("inf"))]


def _equal_groups(problem: Problem, unscheduled: Unscheduled) -> list[Grouping]:
    able = _able(problem, problem.lengths[unscheduled.longest()])
    return [_uniform(problem, group.size) for group in able]


def _one_size(problem: Problem) -> Iterator[_Propose]:
    for group in _able(problem, problem.lengths[-1]) if problem.lengths else ():
        grouping = _uniform(problem, group.size)
        yield lambda *_, grouping=grouping: [grouping]


def _able(problem: Problem, length: int) -> list[Group]:
    """Return the groups of the menu that hold a document of `length` tokens, narrowest first."""
    menu, tokens = problem.menu, problem.tokens
    return [g for g in problem.best if g.size in menu and g.size * tokens >= length]


def _uniform(problem: Problem, size: int) -> Grouping:
    return (size,) * (problem.num_devices // size)


def _narrowest(problem: Problem, unscheduled: Unscheduled, target: float) -> Grouping:
    """Give each document, longest first, the narrowest group that holds it within the target."""
    length, smallest = problem.lengths[unscheduled.longest()], problem.smallest
    widest = _narrowest_size(_able(problem, length), length, target)
    if widest <= smallest:
        return _uniform(problem, widest)
    inside = [group for group in problem.best if smallest <= group.size <= widest]
    rest, chosen, size = problem.num_devices - widest, [widest], widest
    for rank in itertools.islice(unscheduled.descending(), 1, None):
        if problem.lengths[rank] != length:
            length = problem.lengths[rank]
            able = [group for group in inside if group.size * problem.tokens >= length]
            size = _narrowest_size(able, length, target)
        if size == smallest or size > rest:
            break
        chosen.append(size)
        rest -= size
    return tuple(sorted([*chosen, *[smallest] * (rest // smallest)], reverse=True))


def _narrowest_size(able: Sequence[Group], length: int, target: float) -> int:
    """Return the narrowest group size that needs at most `target` seconds, or else the fastest."""
    quickest, least = able[-1].size, float("inf")
    for group in able:
        seconds = group.seconds(group.pairs(length))
        if seconds <= target:
            return group.size
        if seconds < least:
            quickest, least = group.size, seconds
    return quickest


def _microbatch(filled: Filled, order: np.ndarray, cost: Cost) -> Microbatch:
    return Microbatch(
        grouping=filled.grouping,
        documents=tuple(tuple(int(order[rank]) for rank in group) for group in filled.groups),
        lanes=cost.lanes_of(filled.grouping[0], sum(filled.grouping)),
    )
