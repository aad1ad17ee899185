"""Schedule documents, given their lengths, into microbatches on groups of devices.

Microbatches are built one after another from the remaining documents. For each, a few groupings are
tried. A grouping is filled as jobs are assigned to machines (longest processing time first, Graham
1969): the group with the least work so far takes the longest document that it has room for. This
rule has three effects. Documents of similar length meet in one microbatch, so its groups finish
together. Groups end up full, because nearly every gap has a document that fits it. Wide groups,
whose hops cost time even when empty, take documents only while that time is hidden.

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
from hcp_jax.dynamic.bound import best_rings, document_prices
from hcp_jax.dynamic.cost import Cost, Ring
from hcp_jax.dynamic.fill import Filled, Problem, Unscheduled, fill
from hcp_jax.dynamic.plan import Schedule
from hcp_jax.dynamic.refine import refine
from hcp_jax.sequence import groupings
from hcp_jax.sequence.groupings import Layout
from hcp_jax.sequence.packing import Microbatch

MAX_MENU = 16  # most programs worth compiling before the first step
_TIE = 1.0002  # schedules closer than this ratio count as equal: the cost model is not more exact


# A function that proposes groupings for the unscheduled documents; at least one holds the longest.
_Propose = Callable[[Problem, Unscheduled], Sequence[Layout]]


def schedule(
    lengths: Sequence[int] | np.ndarray,
    num_devices: int = 64,
    max_tokens_per_device: int = 2048,
    min_cp_size: int = 1,
    max_cp_size: int | None = None,
    menu: Iterable[Sequence[int]] | None = None,
    cost: Cost | None = None,
    seed: int = 0,
) -> Schedule:
    """Schedule every document on as many devices as it needs.

    Args:
        lengths: tokens of each document, each at least 1.
        num_devices: N, the number of data-parallel times context-parallel devices.
        max_tokens_per_device: M, tokens of the buffer that each device holds in each microbatch; a
            group of g devices holds g·M tokens.
        min_cp_size: smallest size of a group.
        max_cp_size: largest size of a group; N if None.
        menu: groupings that may be used, each a sequence of group sizes that add up to N; if None,
            chosen for these documents (`choose_menu` chooses one for a data set).
        cost: cost model; `Cost()` if None.
        seed: decides the order of documents of equal length.

    Returns:
        The schedule, immutable, with every document exactly once and no device above M tokens.

    Raises:
        ValueError: if an argument is invalid, or a document is longer than the widest group holds;
            names it and the smallest max_tokens_per_device that would do.

    >>> plan = schedule([3000, 500, 700, 900], num_devices=4, max_tokens_per_device=1024)
    >>> [(m.layout, m.documents) for m in plan.microbatches]
    [((4,), ((0, 3),)), ((1, 1, 1, 1), ((2,), (1,), (), ()))]
    """
    cost = Cost() if cost is None else cost
    sizes = groupings.group_sizes(num_devices, min_cp_size, max_cp_size)
    of_length = check_lengths(lengths)
    _check_tokens(max_tokens_per_device, num_devices)
    num_devices, max_tokens_per_device = int(num_devices), int(max_tokens_per_device)
    given = None if menu is None else _check_menu(menu, num_devices, sizes)
    if given is not None:
        sizes = tuple(sorted({size for layout in given for size in layout}))
    _check_fits(of_length, max_tokens_per_device, sizes[-1])

    order = _ascending(of_length, checks.integer("seed", seed, least=0))
    problem = _problem(of_length[order], num_devices, max_tokens_per_device, cost, sizes)
    chosen, filled = _search(problem, given)
    return Schedule(
        lengths=tuple(of_length.tolist()),
        num_devices=num_devices,
        max_tokens_per_device=max_tokens_per_device,
        menu=chosen,
        microbatches=tuple(_microbatch(mb, order) for mb in filled),
        cost=cost,
        sizes=sizes,
    )


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


def _check_menu(
    menu: Iterable[Sequence[int]], num_devices: int, sizes: tuple[int, ...]
) -> tuple[Layout, ...]:
    layouts = tuple(dict.fromkeys(groupings.check_layout(m, num_devices) for m in menu))
    if not layouts:
        raise ValueError("menu holds no layout; give at least one, or None to have it chosen.")
    for layout in layouts:
        if min(layout) < sizes[0] or max(layout) > sizes[-1]:
            raise ValueError(
                f"layout {groupings.describe(layout)} of the menu has groups outside of "
                f"min_cp_size={sizes[0]} to max_cp_size={sizes[-1]}."
            )
    return layouts


def _ascending(lengths: np.ndarray, seed: int) -> np.ndarray:
    """Sort documents by length; the seed decides the order of documents of equal length."""
    shuffled = np.random.default_rng(seed).permutation(lengths.size)
    return shuffled[np.argsort(lengths[shuffled], kind="stable")]


def _problem(
    ascending: np.ndarray, num_devices: int, tokens: int, cost: Cost, sizes: tuple[int, ...]
) -> Problem:
    rings = best_rings(sizes, tokens, cost)
    unique, inverse, count = np.unique(ascending, return_inverse=True, return_counts=True)
    prices = document_prices(unique, count, rings, tokens, cost.dense_seconds(tokens))
    values = prices / num_devices
    density = np.maximum.accumulate(values / unique) if unique.size else values
    return Problem(
        lengths=ascending.tolist(),
        values=values[inverse].tolist(),
        density=density[inverse].tolist(),
        num_devices=num_devices,
        tokens=tokens,
        cost=cost,
        sizes=sizes,
        rings=rings,
    )


def _search(
    problem: Problem, given: tuple[Layout, ...] | None
) -> tuple[tuple[Layout, ...], list[Filled]]:
    """Try a few ways to choose groupings; return the menu and the microbatches of the best one.

    The ways are: by efficiency, one microbatch at a time, which is best for most data; each
    document in the narrowest group that holds it; equal groups in every microbatch; and groups of
    one size throughout, which packs tightest if there are few documents. Among ways that take the
    same time within the model's accuracy, the most even one is chosen.
    """
    if given is not None:
        filled = _build(problem, given)
        assert filled is not None, "nothing makes it give up"
        return given, refine(problem, filled)
    found: list[tuple[float, list[Filled]]] = []
    for propose in (_by_target, _narrowest_only, _equal_groups, *_one_size(problem)):
        give_up = min((seconds for seconds, _ in found), default=float("inf")) * _TIE
        filled = _build(problem, propose, give_up)
        menu = _frequent(filled or [], problem)
        if filled is not None and any(mb.layout not in menu for mb in filled):
            filled = _build(problem, menu, give_up)
        if filled is not None:
            filled = refine(problem, filled)
            found.append((sum(mb.seconds for mb in filled), filled))
    least = min(seconds for seconds, _ in found)
    tied = [filled for seconds, filled in found if seconds <= least * _TIE]
    best = min(tied, key=lambda filled: _busiest_pairs(filled, problem.lengths))
    return _frequent(best, problem), best


def _busiest_pairs(filled: Sequence[Filled], lengths: list[int]) -> float:
    """Sum the attention pairs of the busiest device over microbatches; less is more even."""
    total = 0.0
    for mb in filled:
        total += max(
            sum(lengths[rank] * (lengths[rank] + 1) for rank in group) / size
            for size, group in zip(mb.layout, mb.groups, strict=True)
        )
    return total


def _build(
    problem: Problem,
    menu: Sequence[Layout] | _Propose,
    give_up: float = float("inf"),
) -> list[Filled] | None:
    """Build microbatches for all documents, from a menu or from groupings proposed on the way.

    Return None as soon as they are certain to take `give_up` seconds or more.
    """
    unscheduled = Unscheduled(len(problem.lengths))
    filled: list[Filled] = []
    worth = sum(problem.values)
    seconds = 0.0
    while unscheduled.count:
        if (seconds + worth) * (1 + 1e-12) >= give_up:
            return None
        candidates = menu(problem, unscheduled) if callable(menu) else menu
        best = _best(problem, unscheduled, candidates)
        unscheduled.remove(itertools.chain.from_iterable(best.groups))
        filled.append(best)
        seconds += best.seconds
        worth -= best.value
    return None if seconds * (1 + 1e-12) >= give_up else filled


def _best(problem: Problem, unscheduled: Unscheduled, candidates: Iterable[Layout]) -> Filled:
    """Return the most efficient candidate; candidates that cannot beat the best are not filled."""
    rank = unscheduled.longest()
    longest = problem.lengths[rank]
    worth = problem.num_devices * problem.tokens * problem.density[rank]
    dense = problem.cost.dense_seconds(problem.tokens)
    queue = []
    for order, layout in enumerate(candidates):
        rings = problem.cost.rings(layout, problem.tokens)
        able = [ring for ring in set(rings) if ring.size * problem.tokens >= longest]
        if able:
            least = min(ring.seconds(ring.pairs(longest)) for ring in able)
            empty = max(ring.seconds(0.0) for ring in set(rings))
            queue.append((dense + max(least, empty), order, layout, rings))
    best, efficiency = None, 0.0
    for least, _, layout, rings in sorted(queue, key=lambda item: item[:2]):
        if best is not None and worth <= efficiency * least:
            break
        filled = fill(problem, unscheduled, layout, rings)
        if best is None or filled.value > efficiency * filled.seconds * (1 + 1e-12):
            best, efficiency = filled, filled.value / filled.seconds
    assert best is not None, "a layout that holds the longest document is always among them"
    return best


def _by_target(problem: Problem, unscheduled: Unscheduled) -> list[Layout]:
    """Propose groupings, from wide groups that are fast to narrow ones that are cheap.

    For each of several target times, every document, longest first, gets the narrowest group that
    holds it within the target. The targets are fractions of the time of the longest document in the
    narrowest group that holds it. One more grouping for every size has as many groups of it as
    possible.
    """
    longest = problem.lengths[unscheduled.longest()]
    narrowest = _able(problem, longest)[0]
    slowest = narrowest.seconds(narrowest.pairs(longest))
    parts = (1.0, 0.8, 0.6, 0.4, 0.2, 0.1)
    proposed = [_narrowest(problem, unscheduled, slowest * part) for part in parts]
    proposed += _narrowest_only(problem, unscheduled)
    proposed += [_uniform(problem, ring.size) for ring in _able(problem, longest)]
    return list(dict.fromkeys(proposed))


def _narrowest_only(problem: Problem, unscheduled: Unscheduled) -> list[Layout]:
    return [_narrowest(problem, unscheduled, float("inf"))]


def _equal_groups(problem: Problem, unscheduled: Unscheduled) -> list[Layout]:
    able = _able(problem, problem.lengths[unscheduled.longest()])
    even = [ring for ring in able if problem.num_devices % ring.size == 0]
    return [_uniform(problem, ring.size) for ring in even or able]


def _one_size(problem: Problem) -> Iterator[_Propose]:
    for ring in _able(problem, problem.lengths[-1]) if problem.lengths else ():
        layout = _uniform(problem, ring.size)
        yield lambda *_, layout=layout: [layout]


def _able(problem: Problem, length: int) -> list[Ring]:
    """Return the rings that hold a document of `length` tokens, narrowest first."""
    return [ring for ring in problem.rings if ring.size * problem.tokens >= length]


def _uniform(problem: Problem, size: int) -> Layout:
    sizes = groupings.uniform(size, problem.num_devices, problem.sizes)
    return groupings.canonical(sizes, problem.cost.devices_per_host)


def _narrowest(problem: Problem, unscheduled: Unscheduled, target: float) -> Layout:
    can = groupings.composable(problem.num_devices, problem.sizes)
    rest = problem.num_devices
    chosen: list[int] = []
    for rank in unscheduled.descending():
        size = _narrowest_size(problem, problem.lengths[rank], target)
        if size == problem.sizes[0] or size > rest or not can[rest - size]:
            break
        chosen.append(size)
        rest -= size
    if not chosen and size > problem.sizes[0]:
        return _uniform(problem, problem.sizes[-1])
    sizes = groupings.complete(chosen, problem.num_devices, problem.sizes)
    return groupings.canonical(sizes, problem.cost.devices_per_host)


def _narrowest_size(problem: Problem, length: int, target: float) -> int:
    """Return the narrowest group size that needs at most `target` seconds, or else the fastest."""
    quickest, least = 0, float("inf")
    for ring in problem.rings:
        if ring.size * problem.tokens >= length:
            seconds = ring.seconds(ring.pairs(length))
            if seconds <= target:
                return ring.size
            if seconds < least:
                quickest, least = ring.size, seconds
    return quickest


def _frequent(filled: Sequence[Filled], problem: Problem) -> tuple[Layout, ...]:
    """Return at most `MAX_MENU` groupings: those that take most time, and the fallback."""
    fallback = _uniform(problem, problem.sizes[-1])
    seconds: dict[Layout, float] = {}
    for mb in filled:
        seconds[mb.layout] = seconds.get(mb.layout, 0.0) + mb.seconds
    ranked = sorted(seconds, key=lambda layout: (-seconds[layout], layout))
    kept = [layout for layout in ranked if layout != fallback][: MAX_MENU - 1]
    return tuple(sorted([*kept, fallback], reverse=True))


def _microbatch(filled: Filled, order: np.ndarray) -> Microbatch:
    return Microbatch(
        layout=filled.layout,
        documents=tuple(tuple(int(order[rank]) for rank in group) for group in filled.groups),
    )
