"""Compute a proven lower bound on the seconds of any schedule, and a price for each document.

This module judges the scheduler, so it shares no code with it: it uses the cost model and the
possible group sizes, and does not depend on how documents are combined.

Let a schedule have microbatches k = 1 … K over N devices, buffers of M tokens, dense seconds
C = `Cost.dense_seconds(M)`, and T_k the seconds of the slowest group of microbatch k. It takes
K·C + Σ T_k. Write f_g(a) for a group of g devices with a pairs on each, a = Σ a_g(L) over its
documents.

**Prices.** A group costs least in the program of its own width, which has the fewest hops; f_g is
its cost there. It is a maximum of lines α·a + β with β >= 0 (a hop is hidden, or it is not).
So a group of g devices that holds documents S has, for any one of the lines and any function φ with
Σ_S φ(L / gM) <= 1 whenever Σ_S L <= gM,

    g·f_g >= Σ_S [g·α·a_g(L) + g·β·φ(L / gM)].

φ may be the identity, or 1 where x > 1/2 and 1/2 at 1/2 (two such do not fit), or a mean of both.
A document may be in a group of any size that holds it, so the least of the right side over g is a
price p(L) that it costs wherever it goes. As N·T_k >= Σ of g·f_g over the groups of k,

    Σ T_k >= Σ_documents p(L) / N.                                                (average)

**Big documents.** Two documents longer than NM / 2 share no microbatch. Let b be those, and d the
greatest price per token of any other. The microbatch of b takes t(L_b) = min_g f_g(a_g(L_b)) at
least, and holds others for at most o_b = d·(NM - L_b). As N·T >= p(L_b) + others and T >= t(L_b)
there, the least that Σ T can be has as much as possible hidden beside the big ones:

    Σ T_k >= [Σ_others p + Σ_b max(N·t(L_b) - o_b, p(L_b))] / N.          (average, with big ones)

**Volume.** A microbatch holds N·M tokens at most. With documents in descending order, the first
ones whose tokens exceed (k-1)·N·M are in k microbatches at least, so the k-th largest T is no less
than τ_k, the greater of t of the last of them and t of the k-th big document. Of any j microbatches
the prices add up to at most Q(j), the price of the dearest j·N·M tokens. With P the prices of the
j microbatches of largest T, these take at least Σ τ_k, and all others P_all - P over N:

    Σ T_k >= P_all / N + max_j [Σ_{k<=j} τ_k - Q(j) / N].                           (volume)

**Microbatches.** K >= K0 = max(⌈Σ L / NM⌉, number of documents longer than NM / 2). So a schedule
takes at least K0·C + max(average, volume).

**Slots.** Instead of counting microbatches, put C into the prices, at g·C per group of g devices:
N·(C + T_k) >= Σ g·(C + f_g) since the groups of k have N devices. Hence total >= Σ p_C(L) / N with
β + C in place of β. That is tighter where documents fill their groups badly.

The bound is the larger of the two. What it leaves out: that groups must add up to N in every
microbatch, that documents come in whole pieces (beyond φ), and that slots of different microbatches
cannot be mixed. So it is loose where few documents meet many devices.
"""

from collections.abc import Sequence

import numpy as np

from hcp_jax.dynamic.cost import Cost
from hcp_jax.dynamic.group import Group

_PHI_MIX = (0.0, 0.5, 1.0)  # weight of the step function in φ


def lower_bound(
    lengths: Sequence[int] | np.ndarray,
    num_devices: int,
    max_tokens_per_device: int,
    sizes: Sequence[int],
    cost: Cost,
) -> float:
    """Return a lower bound on the seconds of any schedule with groups of these sizes.

    Args:
        lengths: tokens of each document.
        num_devices: N.
        max_tokens_per_device: M.
        sizes: sizes that groups may have.
        cost: the cost model.
    """
    lengths = np.asarray(lengths, np.int64)
    if lengths.size == 0:
        return 0.0
    capacity = num_devices * max_tokens_per_device
    groups = best_groups(sizes, num_devices, max_tokens_per_device, cost)
    unique, count = np.unique(lengths, return_counts=True)
    dense = cost.dense_seconds(max_tokens_per_device)

    total = int(lengths.sum())
    num_microbatches = max(-(-total // capacity), int(np.sum(2 * lengths > capacity)))
    prices = document_prices(unique, count, groups, max_tokens_per_device, 0.0)
    big = 2 * unique > capacity
    least = np.min(
        [_seconds(group, unique[big], max_tokens_per_device) for group in groups], axis=0
    )
    beside = np.max(prices[~big] / unique[~big], initial=0.0) * (capacity - unique[big])
    with_big = prices.copy()
    with_big[big] = np.maximum(num_devices * least - beside, prices[big])
    average = float(np.sum(with_big * count)) / num_devices

    volume = _volume(unique, count, prices, groups, num_devices, max_tokens_per_device)

    slots = document_prices(unique, count, groups, max_tokens_per_device, dense)
    return max(
        num_microbatches * dense + max(average, volume),
        float(np.sum(slots * count)) / num_devices,
    )


def _volume(
    unique: np.ndarray,
    count: np.ndarray,
    prices: np.ndarray,
    groups: Sequence[Group],
    num_devices: int,
    max_tokens_per_device: int,
) -> float:
    capacity = num_devices * max_tokens_per_device
    descending = np.repeat(unique, count)[::-1]
    after = np.cumsum(descending)
    steps = np.arange(-(-int(after[-1]) // capacity))
    # The first document at which the tokens so far exceed each multiple of the capacity, or the
    # k-th big one if that is longer.
    last = np.searchsorted(after, steps * capacity, side="right")
    num_big = int(np.sum(2 * descending > capacity))
    last = np.concatenate([np.arange(num_big), last[num_big:]])
    seconds = [_seconds(group, descending[last], max_tokens_per_device) for group in groups]
    slowest = np.concatenate([[0.0], np.cumsum(np.min(seconds, axis=0))])

    dearest = np.argsort(-prices / unique, kind="stable")
    tokens = np.concatenate([[0], np.cumsum((unique * count)[dearest])])
    price = np.concatenate([[0.0], np.cumsum((prices * count)[dearest])])
    held = np.interp(np.arange(slowest.size) * capacity, tokens, price)
    return float(price[-1] + np.max(num_devices * slowest - held)) / num_devices


def best_groups(sizes: Sequence[int], num_devices: int, tokens: int, cost: Cost) -> list[Group]:
    """Return the cheapest group of each size: in the program of its own width, with fewest hops."""
    return [cost.group(size, size, num_devices, tokens) for size in sorted(sizes)]


def document_prices(
    lengths: np.ndarray,
    count: np.ndarray,
    groups: Sequence[Group],
    max_tokens_per_device: int,
    slot_seconds: float,
) -> np.ndarray:
    """Return the least device-seconds p(L) that a document of each length costs in any group.

    Args:
        lengths: distinct lengths.
        count: number of documents of each length.
        groups: one per group size.
        max_tokens_per_device: M.
        slot_seconds: seconds of a device added to every group: 0, or the dense seconds.
    """
    options = [
        _group_prices(group, lengths, max_tokens_per_device, slot_seconds) for group in groups
    ]
    # Groups with fewer kinds of transfers have fewer lines: repeat their last row.
    rows = max(len(option) for option in options)
    options = [np.pad(o, ((0, rows - len(o)), (0, 0)), mode="edge") for o in options]
    # Any choice of line and φ per size is valid. Start with the best one common to all sizes, then
    # improve one size after another for a few rounds.
    alike = np.sum(np.min(options, axis=0) * count, axis=1)
    start = int(np.argmax(alike))
    chosen = np.array([of_size[start] for of_size in options])
    best = float(alike[start])
    for _ in range(2):
        before = best
        for i, of_size in enumerate(options):
            others = np.min(np.delete(chosen, i, axis=0), axis=0, initial=np.inf)
            totals = np.sum(np.minimum(of_size, others) * count, axis=1)
            pick = int(np.argmax(totals))
            if totals[pick] > best:
                best, chosen[i] = float(totals[pick]), of_size[pick]
        if best == before:
            break
    return np.min(chosen, axis=0)


def _group_prices(
    group: Group, lengths: np.ndarray, max_tokens_per_device: int, slot_seconds: float
) -> np.ndarray:
    """Return prices in groups of one size, a row per line and φ; infinite where it does not fit."""
    fraction = lengths / (group.size * max_tokens_per_device)
    step = np.where(fraction > 0.5, 1.0, np.where(fraction == 0.5, 0.5, 0.0))
    work = _pairs(group, lengths) * group.work
    rows = []
    for alpha, beta in lines(group):
        for mix in _PHI_MIX:
            phi = mix * step + (1 - mix) * fraction
            rows.append(group.size * (alpha * work + (beta + slot_seconds) * phi))
    return np.where(fraction <= 1, np.array(rows), np.inf)


def lines(group: Group) -> list[tuple[float, float]]:
    """Return (slope in work, seconds at none) of the lines whose maximum is `Group.seconds`.

    Transfers are hidden one kind after the other as the work grows: first those that take the
    least time per share of the work.
    """
    exposed = sorted(group.hidden, key=lambda move: move[1] / move[0])
    return [
        (
            1 - sum(share * times for share, _, times in exposed[i:]),
            group.fixed + sum(seconds * times for _, seconds, times in exposed[i:]),
        )
        for i in range(len(exposed) + 1)
    ]


def _seconds(group: Group, lengths: np.ndarray, max_tokens_per_device: int) -> np.ndarray:
    pairs = _pairs(group, lengths)
    seconds = np.array([group.seconds(p) for p in pairs.tolist()])
    return np.where(lengths <= group.size * max_tokens_per_device, seconds, np.inf)


def _pairs(group: Group, lengths: np.ndarray) -> np.ndarray:
    padded = (lengths + group.padding).astype(np.float64)
    return padded * padded / (2 * group.size)
