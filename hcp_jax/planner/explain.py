"""A plan in words, for somebody who has not split a sequence before.

Each sentence is made of the figures that decided: what a hop sends and computes, what stands alone,
what would not fit. The best split of every other comm type is set against the winner.
"""

from typing import TYPE_CHECKING

from hcp_jax.cost.step import Split
from hcp_jax.cost.traffic import COMM_TYPES
from hcp_jax.hardware import INSIDE

if TYPE_CHECKING:
    from hcp_jax.planner.search import Candidate, Plan


def describe_strategy(split: Split) -> str:
    """Return a sentence on what attention does with a split's comm type, for beginners.

    >>> describe_strategy(Split(cp_outer=4, comm_type="p2p"))
    'keys and values go round a ring of 4 GPUs while attention computes'
    """
    exchange, move, by = split.strategy
    moves = {
        "ring": "keys and values go round a ring of {} while attention computes",
        "gather": "keys and values of all {} are gathered before attention starts",
    }[by]
    if not exchange:
        return moves.format(f"{split.move} GPUs")
    if not move:
        return (
            f"{split.exchange} GPUs exchange heads for sequence: each then has all tokens of a "
            "few heads"
        )
    groups = moves.format(f"{split.move} such groups")
    return f"{split.exchange} neighbours exchange heads for sequence, and {groups}"


def explain(plan: "Plan") -> str:
    """Why the best split is the best; one sentence or two to a line."""
    lines = [*_sequence(plan), *_tensor(plan), *_transfers(plan), *_memory(plan)]
    return "\n".join([*lines, *_alternatives(plan)])


def _sequence(plan: "Plan") -> list[str]:
    split = plan.best.split
    if split.cp == 1:
        return [f"A stream of {plan.seq_len:,} tokens fits one GPU's memory: no need to cut it."]
    does = describe_strategy(split)
    cut = f"Each stream of {plan.seq_len:,} tokens is cut over {split.cp} GPUs"
    why = _least_cp(plan)
    return [f"{cut}{why}: {does}."]


def _least_cp(plan: "Plan") -> str:
    """What says that it is cut so often."""
    fewer = [c for c in plan.candidates if c.split.cp < plan.best.split.cp]
    if not fewer:
        return ""
    if not any(c.fits for c in fewer):
        return ", because over fewer it would not fit"
    best = next(c for c in fewer if c.fits)
    share = plan.best.cost.tokens_per_s / best.cost.tokens_per_s - 1
    if share < 0.01:
        return f", as fast as over {best.split.cp} and with more memory to spare"
    return f", {share:.0%} faster than over {best.split.cp}"


def _tensor(plan: "Plan") -> list[str]:
    split = plan.best.split
    if split.tp > 1:
        sums = _waits(plan.best, "summed over tp")
        return [
            f"Weights are cut over {split.tp} GPUs (tp) as well: sums that nothing hides take "
            f"{sums:.0%} of the step, and each GPU has fewer heads and less memory to fill."
        ]
    best = _best_of(plan, lambda c: c.split.tp > 1)
    if best is None:
        return []
    slower = 1 - best.cost.tokens_per_s / plan.best.cost.tokens_per_s
    if slower < 0.005:
        return [
            f"Tensor parallelism (tp {best.split.tp}) would be as fast; without it, it is simpler."
        ]
    sums = _waits(best, "summed over tp")
    return [
        f"No tensor parallelism: with tp {best.split.tp} the activations are summed after every "
        f"block, which nothing hides ({sums:.0%} of the step), and it is {slower:.0%} slower."
    ]


def _transfers(plan: "Plan") -> list[str]:
    lines = []
    cost = plan.best.cost
    for transfer in cost.transfers:
        hidden = transfer.seconds - transfer.exposed
        size = f"{transfer.bytes / 1e9:.1f} GB per GPU and step {transfer.link}"
        if transfer.exposed == 0:
            lines.append(f"{transfer.what}: {size}, all of it hidden ({hidden:.2g} s).")
        elif transfer.exposed > 0.01 * cost.step_s:
            share = transfer.exposed / cost.step_s
            lines.append(f"{transfer.what}: {size}; the GPU waits for {share:.0%} of the step.")
    most = max(cost.compute, key=lambda part: cost.compute[part])
    share = cost.compute[most] / cost.step_s
    lines.append(f"The step is bound by {most} ({share:.0%} of {cost.step_s:.2g} s).")
    return [line[0].upper() + line[1:] for line in lines]


def _memory(plan: "Plan") -> list[str]:
    best = plan.best
    words = {
        "none": "nothing is recomputed",
        "attention": "layers are recomputed in backward, attention is kept",
        "full": "whole layers are recomputed in backward, attention too",
    }[best.split.remat]
    gib = best.peak_bytes / 2**30
    shard = "parameters and optimizer cut over all of dp and cp (fsdp)"
    shard = shard if best.split.fsdp else "every replica with all parameters"
    return [f"{gib:.0f} of {best.device_bytes / 2**30:.0f} GiB per GPU: {words}; {shard}."]


def _alternatives(plan: "Plan") -> list[str]:
    lines = []
    for comm_type in COMM_TYPES:
        if comm_type == plan.best.split.comm_type or plan.best.split.cp == 1:
            continue
        best = _best_of(plan, lambda c, x=comm_type: c.split.comm_type == x and c.split.cp > 1)
        if best is None:
            lines.append(f"{comm_type}: does not fit, or the heads do not divide.")
            continue
        slower = 1 - best.cost.tokens_per_s / plan.best.cost.tokens_per_s
        verdict = (
            f"{slower:.1%} slower" if slower >= 0.01 else f"as fast, {_more_memory(plan, best)}"
        )
        most = max(best.cost.transfers, key=lambda t: t.exposed, default=None)
        why = ""
        if most is not None and most.exposed > 0.005 * best.cost.step_s:
            waits = most.exposed / best.cost.step_s
            where = "over NVLink" if most.link == INSIDE else "over the network"
            why = f"; it waits {waits:.1%} of the step for: {most.what} {where}"
        lines.append(f"{comm_type}, at its best ({best.split}): {verdict}{why}.")
    return lines


def _more_memory(plan: "Plan", candidate: "Candidate") -> str:
    gib = (candidate.peak_bytes - plan.best.peak_bytes) / 2**30
    return f"{gib:.0f} GiB more memory" if gib >= 0.5 else "with the same memory"


def _best_of(plan: "Plan", condition) -> "Candidate | None":
    return next((c for c in plan.candidates if c.fits and condition(c)), None)


def _waits(candidate: "Candidate", words: str) -> float:
    waits = sum(t.exposed for t in candidate.cost.transfers if words in t.what)
    return waits / candidate.cost.step_s
