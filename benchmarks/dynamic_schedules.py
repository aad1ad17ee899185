"""Print the tables of docs/dynamic.md: modelled schedules, no devices and no jax.

    python benchmarks/dynamic_schedules.py [--devices 8 64] [--batches 2]

1. This library's scheduler, fixed CP and the reference's second scheduler, on four distributions of
   lengths and under this library's cost model.
2. The same schedules under a cost model that is not ours: L² and tokens only.
3. What scheduling the documents of several steps together saves.
4. Network bytes and seconds of a step of Llama-3-8B on 64 H200.
"""

import argparse
from collections.abc import Callable, Sequence

import numpy as np

from hcp_jax.dynamic import Cost, Schedule, baselines, model_cost, schedule, schedule_batches
from hcp_jax.dynamic.lengths import draw_lengths, mean_length
from hcp_jax.dynamic.simulate import OURS, PADDED, REFERENCE, TOGETHER, Limits, simulate

DISTRIBUTIONS = {
    "lognormal:mean=1024,sigma=1.5,min=128,max=8192": 2048,
    "lognormal:mean_before=1024,sigma=1.5,min=128,max=8192": 2048,
    "lognormal:mean=3000,sigma=1.8,min=16,max=32768": 8192,
    "mix:0.90@2048,0.09@32768,0.01@262144": 65536,
}
MIX = "mix:0.90@2048,0.09@32768,0.01@262144"


def main() -> None:
    """Print all tables as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--devices", type=int, nargs="+", default=[4, 6, 8, 12, 16, 24, 32, 64, 128]
    )
    parser.add_argument("--batches", type=int, default=2)
    args = parser.parse_args()
    for spec, tokens in DISTRIBUTIONS.items():
        print(f"\n**{spec}**, M = {tokens}\n")
        head_to_head(spec, tokens, args.devices, args.batches)
    lookahead()
    network()


def batches_of(spec: str, tokens: int, num_devices: int, count: int) -> list[np.ndarray]:
    """Draw batches of about 8 buffers' worth of tokens."""
    documents = max(1, round(8 * num_devices * tokens / mean_length(spec)))
    return [draw_lengths(spec, documents, seed) for seed in range(count)]


def head_to_head(spec: str, tokens: int, devices: Sequence[int], count: int) -> None:
    """Print times as multiples of ours, under our cost model and one that knows L² and tokens."""
    head(
        *("devices", "ours, ms", "fixed CP, packed", "fixed CP, DP-balanced"),
        *("reference's second", "with its padding", "its padding", "under L²", "L² and tokens"),
        *("batches together", "token fill", "programs", "above the bound"),
    )
    for num_devices in devices:
        batches = batches_of(spec, tokens, num_devices, count)
        record = simulate(batches, Limits(num_devices, tokens))
        rows = record["strategies"]
        given = [(batch.tolist(), num_devices, tokens) for batch in batches]
        pairs = [(schedule(*of), baselines.seeded_greedy(*of, Cost())) for of in given]
        ratios = [
            sum(simple_seconds(theirs, linear) for _, theirs in pairs)
            / sum(simple_seconds(ours, linear) for ours, _ in pairs)
            for linear in (0, tokens)
        ]
        padded = rows.get(PADDED)
        row(
            num_devices,
            f"{1e3 * rows[OURS]['seconds']:.1f}",
            *(times(rows[f"fixed CP, {how}"]) for how in ("packed", "DP-balanced")),
            times(rows[REFERENCE]),
            times(padded) if padded else "does not fit",
            f"{padded['padding']:.1%}" if padded else "",
            *(f"{ratio:.3f}" for ratio in ratios),
            times(rows[TOGETHER]) if TOGETHER in rows else "",
            f"{rows[OURS]['token_fill']:.3f}",
            ", ".join(map(str, record["programs"])),
            f"{record['above_lower_bound']:.1%}",
        )


def simple_seconds(plan: Schedule, linear: int) -> float:
    """Return the time under a cost of L² / 2 and `linear` for each token, whatever the links do."""
    return sum(
        max(
            sum(length * length / 2 + linear * length for length in held) / size
            for size, held in zip(mb.grouping, mb.lengths(plan.lengths), strict=True)
        )
        for mb in plan.microbatches
    )


def lookahead() -> None:
    """Print the time of 32 steps as a share of that of steps scheduled alone, and the fill."""
    print("\n**Lookahead**\n")
    ahead = (1, 2, 4, 8, 16)
    head("lengths", "devices", "documents a step", *ahead)
    for spec, tokens in DISTRIBUTIONS.items():
        for num_devices, each in ((8, 2), (64, 2), (8, 16), (64, 16)):
            batches = [draw_lengths(spec, each * num_devices, seed) for seed in range(32)]
            found = [together(batches, many, num_devices, tokens) for many in ahead]
            cells = [f"{seconds / found[0][0]:.2f}, fill {fill:.2f}" for seconds, fill in found]
            row(spec.split(",")[0], num_devices, each * num_devices, *cells)


def together(
    batches: Sequence[np.ndarray], many: int, num_devices: int, tokens: int
) -> tuple[float, float]:
    """Return the seconds and the fill of batches of which `many` are scheduled together."""
    plans = [
        step.plan
        for first in range(0, len(batches), many)
        for step in schedule_batches(batches[first : first + many], num_devices, tokens)
    ]
    slots = num_devices * tokens * sum(len(plan.microbatches) for plan in plans)
    return sum(p.modelled_seconds for p in plans), sum(sum(p.lengths) for p in plans) / slots


def network() -> None:
    """Print the step of Llama-3-8B on 64 H200, 90/9/1 mix, M = 16K, with and without exchange."""
    print("\n**Llama-3-8B on 64 H200**\n")
    head("heads exchanged over", "seconds a step", "network GB a device", "programs", "fill")
    for lanes in (1, 8):
        cost = model_cost("llama3-8b", lanes=lanes)
        plans = [schedule(b, 64, 16384, cost=cost) for b in batches_of(MIX, 16384, 64, 4)]
        row(
            f"{lanes} devices",
            f"{np.mean([plan.modelled_seconds for plan in plans]):.1f}",
            f"{np.mean([network_gb(plan) for plan in plans]):.1f}",
            sorted({mb.widest for plan in plans for mb in plan.microbatches}),
            f"{np.mean([plan.token_fill for plan in plans]):.3f}",
        )


def network_gb(plan: Schedule) -> float:
    """Return the GB that each device sends over the network in all microbatches."""
    send: Callable[..., float] = plan.cost.network_bytes
    return sum(send(mb.grouping, plan.max_tokens_per_device) for mb in plan.microbatches) / 1e9


def times(row: dict) -> str:
    """Format how many times as long as ours a strategy takes."""
    return f"{row['ours_is_faster_by']:.3f}"


def head(*cells: object) -> None:
    """Print the first line of a table, and the line below it."""
    row(*cells)
    print("|" + "---|" * len(cells))


def row(*cells: object) -> None:
    """Print a line of a table."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
