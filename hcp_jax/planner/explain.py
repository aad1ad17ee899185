"""Explain a plan in words, for readers who have not split a sequence before.

Each sentence gives the figures that decided: what a hop sends and computes, what is not hidden,
what would not fit. The best split of every other comm type is compared with the winner.
"""

from collections.abc import Callable, Sequence

from hcp_jax.cost.split import Split
from hcp_jax.cost.traffic import COMM_TYPES, CommType
from hcp_jax.hardware import INSIDE
from hcp_jax.planner.candidate import Candidate

Candidates = Sequence[Candidate]


def describe_strategy(split: Split) -> str:
    """Return a sentence that describes how attention works with a split's comm type.

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


def explain(candidates: Candidates, seq_len: int, no_pipeline: str | None = None) -> str:
    """Return the reasons why the best split is the best, one or two sentences per line.

    Args:
        candidates: all splits, the best first.
        seq_len: T.
        no_pipeline: why the model has no pipeline (`cost.stages.refusal`); None if it has one.
    """
    lines = [*_sequence(candidates, seq_len), *_tensor(candidates), *_experts(candidates)]
    lines += [*_pipeline(candidates, no_pipeline), *_transfers(candidates[0])]
    return "\n".join([*lines, *_memory(candidates[0]), *_alternatives(candidates)])


def _sequence(candidates: Candidates, seq_len: int) -> list[str]:
    split = candidates[0].split
    if split.cp == 1:
        return [f"A stream of {seq_len:,} tokens fits one GPU's memory: no need to cut it."]
    does = describe_strategy(split)
    cut = f"Each stream of {seq_len:,} tokens is cut over {split.cp} GPUs"
    why = _least_cp(candidates)
    return [f"{cut}{why}: {does}."]


def _least_cp(candidates: Candidates) -> str:
    """Return the reason why the sequence is not cut over fewer GPUs."""
    fewer = [c for c in candidates if c.split.cp < candidates[0].split.cp]
    if not fewer:
        return ""
    if not any(c.fits for c in fewer):
        return ", because over fewer it would not fit"
    best = next(c for c in fewer if c.fits)
    share = candidates[0].cost.tokens_per_s / best.cost.tokens_per_s - 1
    if share < 0.01:
        return f", as fast as over {best.split.cp} and with more memory to spare"
    return f", {share:.0%} faster than over {best.split.cp}"


def _tensor(candidates: Candidates) -> list[str]:
    split = candidates[0].split
    if split.tp > 1:
        sums = _waits(candidates[0], "summed over tp")
        return [
            f"Weights are also cut over {split.tp} GPUs (tp): sums that nothing hides take "
            f"{sums:.0%} of the step, and each GPU has fewer heads and less memory to fill."
        ]
    best = _best_of(candidates, lambda c: c.split.tp > 1)
    if best is None:
        return []
    slower = _share_slower(best, candidates[0])
    if slower < 0.005:
        return [
            f"Tensor parallelism (tp {best.split.tp}) would be as fast; without it, it is simpler."
        ]
    sums = _waits(best, "summed over tp")
    return [
        f"No tensor parallelism: with tp {best.split.tp} the activations are summed after every "
        f"block, which nothing hides ({sums:.0%} of the step), and it is {slower:.0%} slower."
    ]


def _experts(candidates: Candidates) -> list[str]:
    """Return why experts are cut over so many GPUs; nothing for a model without experts."""
    chosen = candidates[0]
    ep = chosen.split.ep
    other = _best_of(candidates, lambda c: (c.split.ep > 1) != (ep > 1))
    if ep == 1 and not any(c.split.ep > 1 for c in candidates):
        return []
    if ep > 1:
        text = (
            f"Experts are cut over {ep} GPUs (ep): rows travel to them and back, which nothing "
            f"hides ({_waits(chosen, 'rows sent'):.0%} of the step)"
        )
        if other is None:
            return [f"{text}; with all experts on every GPU, nothing would fit."]
        memory = _more_memory(chosen, other)
        slower = _slower(other, chosen)
        return [f"{text}; with all experts on every GPU it would be {slower}, {memory}."]
    if other is None:
        return ["Experts are not cut over GPUs (ep 1): no split with more fits."]
    return [
        f"Every GPU computes all experts (ep 1): with ep {other.split.ep}, rows that travel take "
        f"{_waits(other, 'rows sent'):.0%} of the step, and it is {_slower(other, chosen)}, "
        f"{_more_memory(chosen, other)}."
    ]


def _pipeline(candidates: Candidates, no_pipeline: str | None) -> list[str]:
    """Return why there is a pipeline, or none."""
    chosen = candidates[0]
    split = chosen.split
    if no_pipeline is not None:
        return [f"No pipeline: {no_pipeline}."]
    other = _best_of(candidates, lambda c: (c.split.pp > 1) != (split.pp > 1))
    if split.pp > 1:
        chunks = f", {split.virtual_stages} chunks on each" if split.virtual_stages > 1 else ""
        text = (
            f"Layers are cut over {split.pp} stages (pp{chunks}): stages wait for each other for "
            f"{chosen.cost.bubble_s / chosen.cost.step_s:.0%} of the step"
        )
        if other is None:
            return [f"{text}; without a pipeline, nothing fits."]
        return [
            f"{text}. Without a pipeline, at its best ({other.split}), it would be "
            f"{_slower(other, chosen)}{_because(other)}."
        ]
    if other is None:
        return ["No pipeline: none fits, or its stages would not divide the layers."]
    return [
        f"No pipeline: with pp {other.split.pp}, at its best, layers are computed once more in "
        f"backward, stages wait for each other for {other.cost.bubble_s / other.cost.step_s:.0%} "
        f"of the step, and it is {_slower(other, chosen)}."
    ]


def _share_slower(other: Candidate, chosen: Candidate) -> float:
    """Return the share of the chosen split's tokens per second that another one lacks."""
    return 1 - other.cost.tokens_per_s / chosen.cost.tokens_per_s


def _slower(other: Candidate, chosen: Candidate) -> str:
    share = _share_slower(other, chosen)
    return f"{share:.0%} slower" if share >= 0.005 else "as fast"


def _transfers(best: Candidate) -> list[str]:
    lines = []
    cost = best.cost
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


def _memory(best: Candidate) -> list[str]:
    words = {
        "none": "nothing is recomputed",
        "mlp": "norms and activations are recomputed in backward",
        "projections": "MLPs are recomputed in backward, attention and its projections are kept",
        "attention": "layers are recomputed in backward, attention is kept",
        "full": "whole layers are recomputed in backward, attention too",
    }[best.split.remat]
    gib = best.peak_bytes / 2**30
    shard = "parameters and optimizer cut over all of dp and cp (fsdp)"
    whole = "its parameters" if best.split.pp > 1 else "all parameters"
    shard = shard if best.split.fsdp else f"every replica with {whole}"
    if best.split.pp > 1:
        words = f"a chunk of layers is computed again in backward; there, {words}"
    return [f"{gib:.0f} of {best.device_bytes / 2**30:.0f} GiB per GPU: {words}; {shard}."]


def _alternatives(candidates: Candidates) -> list[str]:
    chosen = candidates[0]
    if chosen.split.cp == 1:
        return []
    return [
        _compared(chosen, _best_of(candidates, _with_comm_type(comm_type)), comm_type)
        for comm_type in COMM_TYPES
        if comm_type != chosen.split.comm_type
    ]


def _with_comm_type(comm_type: CommType) -> Callable[[Candidate], bool]:
    return lambda candidate: candidate.split.comm_type == comm_type and candidate.split.cp > 1


def _compared(chosen: Candidate, best: Candidate | None, comm_type: CommType) -> str:
    """Return a sentence on how much slower the best split of another comm type is, and why."""
    if best is None:
        return f"{comm_type}: does not fit, or the heads do not divide."
    slower = _share_slower(best, chosen)
    memory = _more_memory(chosen, best)
    verdict = f"{slower:.1%} slower" if slower >= 0.01 else f"as fast, {memory}"
    return f"{comm_type}, at its best ({best.split}): {verdict}{_because(best)}."


def _because(candidate: Candidate) -> str:
    """Return what a split waits for most; nothing if it hardly waits."""
    cost = candidate.cost
    most = max(cost.transfers, key=lambda t: t.exposed, default=None)
    if most is None or most.exposed <= 0.005 * cost.step_s:
        return ""
    where = "over NVLink" if most.link == INSIDE else "over the network"
    return f"; it waits {most.exposed / cost.step_s:.1%} of the step for: {most.what} {where}"


def _more_memory(chosen: Candidate, other: Candidate) -> str:
    gib = (other.peak_bytes - chosen.peak_bytes) / 2**30
    if abs(gib) < 0.5:
        return "with the same memory"
    return f"{abs(gib):.0f} GiB {'more' if gib > 0 else 'less'} memory"


def _best_of(candidates: Candidates, condition: Callable[[Candidate], bool]) -> Candidate | None:
    return next((c for c in candidates if c.fits and condition(c)), None)


def _waits(candidate: Candidate, words: str) -> float:
    waits = sum(t.exposed for t in candidate.cost.transfers if words in t.what)
    return waits / candidate.cost.step_s
