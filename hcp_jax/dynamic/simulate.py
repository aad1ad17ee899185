r"""Run `hcp dynamic simulate`: show the gain of dynamic CP for a distribution of lengths.

    hcp dynamic simulate --lengths lognormal:mean=1024,sigma=1.5,min=128,max=8192 --devices 64 \
        --max-tokens-per-device 2048

It draws batches, schedules them with this library's scheduler and with each of `baselines`, and
compares all of them under one cost model, in a table, JSON and a picture. It needs no jax and no
devices.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from hcp_jax.base import arguments
from hcp_jax.cost.models import MODELS
from hcp_jax.dynamic import baselines, gantt
from hcp_jax.dynamic.baselines import Outcome
from hcp_jax.dynamic.calibrate import read_cost
from hcp_jax.dynamic.cost import Cost, model_cost
from hcp_jax.dynamic.lengths import draw_lengths, mean_length
from hcp_jax.dynamic.menu import schedule_batches
from hcp_jax.dynamic.plan import Schedule
from hcp_jax.dynamic.scheduler import schedule

MOST_DOCUMENTS = 1_000_000
"""Most documents of a batch that can be scheduled in reasonable time."""

OURS = "dynamic (ours)"
TOGETHER = "dynamic, batches filled together"

_Strategy = Callable[[list[int], int, int, Cost], Schedule]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `run` reads."""
    parser.add_argument(
        "--lengths",
        type=arguments.non_empty,
        required=True,
        help="lognormal:mean=…,sigma=…,min=…,max=… (mean of the clipped lengths), "
        "uniform:min=…,max=…, mix:share@length,…, a CSV file, or a folder that hcp tokenize made",
    )
    parser.add_argument(
        "--devices",
        type=arguments.whole(most=2**16),
        nargs="+",
        default=[64],
        help="dp · cp; several",
    )
    parser.add_argument("--max-tokens-per-device", type=arguments.length, default=2048, metavar="M")
    parser.add_argument(
        "--lanes",
        type=arguments.whole(),
        default=1,
        help="devices that exchange heads with each other (cp_inner of a2a+p2p; 1 for p2p)",
    )
    parser.add_argument("--min-cp-size", type=arguments.whole(), default=1)
    parser.add_argument("--max-cp-size", type=arguments.whole(), default=None)
    parser.add_argument(
        "--documents",
        type=arguments.whole(most=MOST_DOCUMENTS),
        default=None,
        help="per batch (default: by tokens)",
    )
    parser.add_argument(
        "--microbatches",
        type=arguments.positive,
        default=8.0,
        help="buffers' worth of tokens per batch (8)",
    )
    parser.add_argument(
        "--batches", type=arguments.whole(most=10**4), default=1, help="batches to average over"
    )
    parser.add_argument("--seed", type=arguments.whole(least=0, most=2**32 - 1), default=0)
    parser.add_argument("--model", choices=sorted(MODELS), default="gpt-12x2048")
    parser.add_argument("--devices-per-host", type=arguments.whole(), default=8)
    parser.add_argument(
        "--cost",
        type=arguments.existing_file,
        default=None,
        metavar="FILE",
        help="of `hcp dynamic calibrate`",
    )
    parser.add_argument("--json", type=arguments.output(), default=None, metavar="FILE")
    parser.add_argument(
        "--plot",
        type=arguments.output(".png", ".pdf", ".svg"),
        default=None,
        metavar="FILE",
        help="a Gantt chart",
    )


def run(args: argparse.Namespace) -> int:
    """Simulate, print, write the requested files, and return the exit code.

    Raises:
        ValueError: if an argument is invalid.
    """
    cost = model_cost(args.model, devices_per_host=args.devices_per_host)
    if args.cost is not None:
        cost = read_cost(args.cost)
    mean = mean_length(args.lengths)
    records = []
    for num_devices in args.devices:
        count = args.documents
        if count is None:
            places = args.microbatches * num_devices * args.max_tokens_per_device
            count = max(1, round(min(places / mean, 2.0**53)))
        if count > MOST_DOCUMENTS:
            raise ValueError(
                f"a batch of {count:.3g} documents is too large to schedule here; at most "
                f"{MOST_DOCUMENTS:,}. Lower --microbatches or --max-tokens-per-device, or give "
                "--documents."
            )
        batches = [draw_lengths(args.lengths, count, args.seed + i) for i in range(args.batches)]
        records.append(_simulate(batches, num_devices, cost, args))
    _print(records, args)
    if args.json is not None:
        Path(args.json).write_text(json.dumps(records, indent=2) + "\n")
    if args.plot is not None:
        plan = _ours(batches[0].tolist(), num_devices, cost, args)
        title = f"{args.lengths} on {num_devices} devices × {args.max_tokens_per_device} tokens"
        gantt.save(plan, str(args.plot), title)
    return 0


def _ours(lengths: list[int], num_devices: int, cost: Cost, args: argparse.Namespace) -> Schedule:
    return schedule(
        lengths,
        num_devices,
        args.max_tokens_per_device,
        min_cp_size=args.min_cp_size,
        max_cp_size=args.max_cp_size,
        cost=cost,
        seed=args.seed,
        lanes=args.lanes,
    )


def _together(
    batches: Sequence[np.ndarray], num_devices: int, cost: Cost, args: argparse.Namespace
) -> list[Schedule]:
    steps = schedule_batches(
        batches,
        num_devices,
        args.max_tokens_per_device,
        min_cp_size=args.min_cp_size,
        max_cp_size=args.max_cp_size,
        cost=cost,
        seed=args.seed,
        lanes=args.lanes,
    )
    return [step.plan for step in steps]


def _simulate(
    batches: Sequence[np.ndarray], num_devices: int, cost: Cost, args: argparse.Namespace
) -> dict:
    strategies: dict[str, _Strategy] = {
        "fixed CP, packed": baselines.fixed_packed,
        "fixed CP, DP-balanced": baselines.fixed_balanced,
        "one size per microbatch": baselines.one_size_per_microbatch,
        "seeded greedy (reference)": baselines.seeded_greedy,
    }
    record: dict = {
        "devices": num_devices,
        "documents": sum(batch.size for batch in batches),
        "tokens": int(sum(batch.sum() for batch in batches)),
        "mean_length": float(np.mean(np.concatenate(batches))),
        "lengths": args.lengths,
        "max_tokens_per_device": args.max_tokens_per_device,
        "model": args.model if args.cost is None else str(args.cost),
        "strategies": {},
    }
    ours = [_ours(batch.tolist(), num_devices, cost, args) for batch in batches]
    record["programs"] = sorted({mb.widest for plan in ours for mb in plan.microbatches})
    record["lanes"] = args.lanes
    record["lower_bound"] = sum(plan.lower_bound for plan in ours) / len(ours)
    plans_of = {OURS: ours}
    together = _together(batches, num_devices, cost, args)
    if len(batches) > 1 and all(plan.microbatches for plan in together):
        plans_of[TOGETHER] = together
    for name, strategy in strategies.items():
        limits = num_devices, args.max_tokens_per_device, cost
        plans_of[name] = [strategy(batch.tolist(), *limits) for batch in batches]
    for name, plans in plans_of.items():
        # Pad as the compared systems do: to twice the devices of a group; the reference pads to
        # twice all devices.
        pad = {OURS: 1, TOGETHER: 1, "seeded greedy (reference)": 2 * num_devices}.get(name)
        outcome = _mean([baselines.outcome(plan, pad) for plan in plans])
        record["strategies"][name] = dataclasses.asdict(outcome)
    seconds = record["strategies"][OURS]["seconds"]
    for of_strategy in record["strategies"].values():
        of_strategy["ours_is_faster_by"] = of_strategy["seconds"] / seconds
    record["above_lower_bound"] = seconds / record["lower_bound"] - 1
    return record


def _mean(outcomes: Sequence[Outcome]) -> Outcome:
    """Return the mean of each figure over batches."""
    columns = zip(*(dataclasses.astuple(outcome) for outcome in outcomes), strict=True)
    return Outcome(*(float(np.mean(column)) for column in columns))


_HEADINGS = (
    *("strategy", "ms", "ours is faster by", "unpadded ms", "microbatches"),
    *("programs", "token fill", "balance", "idle", "padding"),
)


def _print(records: Sequence[dict], args: argparse.Namespace) -> None:
    from hcp_jax.base import tables

    console = tables.console()
    for record in records:
        rows = [
            (
                name,
                f"{1e3 * row['seconds']:.2f}",
                "" if name == OURS else f"{row['ours_is_faster_by']:.3f} ×",
                f"{1e3 * row['seconds_unpadded']:.2f}",
                f"{row['num_microbatches']:g}",
                f"{row['num_programs']:g}",
                f"{row['token_fill']:.3f}",
                f"{row['balance']:.3f}",
                f"{row['idle_share']:.3f}",
                f"{row['padding']:.2%}",
            )
            for name, row in record["strategies"].items()
        ]
        title = (
            f"{record['devices']} devices × {record['max_tokens_per_device']} tokens, "
            f"{record['documents']} documents of {record['mean_length']:.0f} tokens on average, "
            f"{record['model']}"
        )
        drop = ("padding", "unpadded ms", "programs", "balance", "microbatches", "token fill")
        tables.show(console, _HEADINGS, rows, left=("strategy",), drop=drop, title=title)
        console.print(f"ours is {record['above_lower_bound']:.2%} above the proven lower bound")
        widths = ", ".join(map(str, record["programs"]))
        console.print(f"programs for groups of up to {widths} devices\n")
