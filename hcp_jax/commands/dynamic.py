"""Run `hcp dynamic simulate` and `hcp dynamic calibrate`; docs/dynamic.md has examples."""

import argparse
import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hcp_jax.base import arguments, terminal
from hcp_jax.cost.models import MODELS
from hcp_jax.dynamic.calibrate import read_cost, read_rows, write_cost
from hcp_jax.dynamic.cost import DEFAULT_MODEL, Cost, model_cost
from hcp_jax.dynamic.lengths import draw_lengths, mean_length
from hcp_jax.dynamic.simulate import MOST_DOCUMENTS, OURS, Limits, simulate

if TYPE_CHECKING:
    import rich.progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a subcommand for each action, with its arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="simulate|calibrate")
    summary = "show the gain of dynamic context parallelism for given lengths"
    _add_simulate(actions.add_parser("simulate", help=summary, description=summary))
    summary = "fit the cost model to timed microbatches"
    _add_calibrate(actions.add_parser("calibrate", help=summary, description=summary))


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=sorted(MODELS), default=DEFAULT_MODEL)
    parser.add_argument("--devices-per-host", type=arguments.whole(), default=8)
    parser.add_argument(
        "--lanes",
        type=arguments.whole(),
        default=None,
        help="devices that exchange heads (those of a host that divide the heads); 1 for p2p",
    )


def _add_simulate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lengths",
        type=arguments.non_empty,
        required=True,
        help="lognormal:mean=…,sigma=…,min=…,max=… (mean of the clipped lengths; mean_before=… for "
        "that before clipping), uniform:min=…,max=…, mix:share@length,…, a CSV file, or a folder "
        "that hcp tokenize made",
    )
    parser.add_argument(
        "--devices",
        type=arguments.whole(most=2**16),
        nargs="+",
        default=[64],
        help="dp · cp; several",
    )
    parser.add_argument("--max-tokens-per-device", type=arguments.length, default=2048, metavar="M")
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
    parser.add_argument(
        "--pp",
        type=arguments.whole(most=256),
        default=1,
        help="stages of a pipeline, each of the --devices; microbatches pass them in ticks",
    )
    parser.add_argument(
        "--virtual-stages",
        type=arguments.whole(most=64),
        default=1,
        help="chunks of layers on each stage",
    )
    _add_model(parser)
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


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "rows", type=arguments.existing_file, help="a JSON object per line and microbatch"
    )
    _add_model(parser)
    parser.add_argument(
        "--output", type=arguments.output(), default=None, metavar="FILE", help="write JSON here"
    )


def uses_jax(args: argparse.Namespace) -> bool:
    """Return False: schedules are made without devices."""
    return False


def run(args: argparse.Namespace) -> int:
    """Run the chosen subcommand; return the exit code.

    Raises:
        ValueError: if an argument or a file is invalid.
    """
    return {"simulate": _simulate, "calibrate": _calibrate}[args.action](args)


def _modelled(args: argparse.Namespace) -> Cost:
    return model_cost(args.model, devices_per_host=args.devices_per_host, lanes=args.lanes)


def _calibrate(args: argparse.Namespace) -> int:
    """Fit the cost, print its changes and errors, and write it."""
    rows = read_rows(args.rows)
    before = _modelled(args)
    after = before.calibrate(rows)
    for field in dataclasses.fields(Cost):
        old, new = getattr(before, field.name), getattr(after, field.name)
        told = f"{old:.4g} -> {new:.4g}" if old != new else f"{old}"
        terminal.say(f"{field.name:26} {told}")
    errors = [
        after.microbatch_seconds(row.grouping, row.lengths, row.tokens) / row.seconds - 1
        for row in rows
    ]
    terminal.say(f"{len(rows)} microbatches, modelled within {max(map(abs, errors)):.1%} of each")
    if args.output is not None:
        write_cost(after, Path(args.output))
    return 0


def _simulate(args: argparse.Namespace) -> int:
    """Simulate, print, and write the requested files."""
    import rich.progress

    from hcp_jax.base import tables

    if args.virtual_stages > 1 and args.pp == 1:
        raise ValueError(
            f"--virtual-stages {args.virtual_stages} needs a pipeline: give --pp the number of "
            "stages."
        )
    cost = _modelled(args) if args.cost is None else read_cost(args.cost)
    mean = mean_length(args.lengths)
    records = []
    for num_devices in args.devices:
        count = _count(args, num_devices, mean)
        batches = [draw_lengths(args.lengths, count, args.seed + i) for i in range(args.batches)]
        limits = Limits(
            num_devices,
            args.max_tokens_per_device,
            args.min_cp_size,
            args.max_cp_size,
            cost,
            args.seed,
            args.pp,
            args.virtual_stages,
        )
        with rich.progress.Progress(console=tables.console(), transient=True) as bar:
            task = bar.add_task(f"{num_devices} devices", total=count)
            record = simulate(batches, limits, functools.partial(_show, bar, task))
        model = args.model if args.cost is None else str(args.cost)
        records.append({**record, "lengths": args.lengths, "model": model})
    _print(records)
    if args.json is not None:
        Path(args.json).write_text(json.dumps(records, indent=2) + "\n")
    if args.plot is not None:
        title = f"{args.lengths} on {num_devices} devices × {args.max_tokens_per_device} tokens"
        from hcp_jax import viz

        viz.draw_schedule(limits.schedule(batches[0]), title).savefig(args.plot, dpi=130)
    return 0


def _show(bar: "rich.progress.Progress", task: "rich.progress.TaskID", done: int) -> None:
    bar.update(task, completed=done)


def _count(args: argparse.Namespace, num_devices: int, mean: float) -> int:
    """Return the number of documents of a batch."""
    if args.documents is not None:
        return args.documents
    slots = args.microbatches * num_devices * args.max_tokens_per_device
    count = max(1, round(min(slots / mean, 2.0**53)))
    if count > MOST_DOCUMENTS:
        raise ValueError(
            f"a batch of {count:.3g} documents is too large to schedule here; at most "
            f"{MOST_DOCUMENTS:,}. Lower --microbatches or --max-tokens-per-device, or give "
            "--documents."
        )
    return count


_HEADINGS = (
    *("strategy", "ms", "ours is faster by", "unpadded ms", "microbatches"),
    *("programs", "token fill", "balance", "idle", "padding"),
)


def _print(records: Sequence[dict]) -> None:
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
        stages = record["stages"]
        if stages["pp"] > 1:
            console.print(
                f"{stages['pp']} stages of {record['devices']} devices, "
                f"{stages['virtual_stages']} chunks on each: {stages['over_ideal']:.3f} times the "
                "time of stages that never wait for each other"
            )
        programs = ", ".join(map(str, record["programs"]))
        console.print(f"programs: widest groups of {programs} devices")
        if record["advice"]:
            console.print(record["advice"])
        console.print()
