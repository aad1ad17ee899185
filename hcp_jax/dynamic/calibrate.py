"""Run `hcp dynamic calibrate`: fit the cost model to timed microbatches.

    hcp dynamic calibrate timed.jsonl --output cost.json
    hcp dynamic simulate --cost cost.json …

Each line of the file is one microbatch that ran, as JSON:

    {"grouping": [4, 2, 1, 1], "lengths": [[8000], [3000], [900, 700], [1500]], "tokens": 2048,
     "seconds": 0.0312}
"""

import argparse
import dataclasses
import json
from pathlib import Path

from hcp_jax.base import arguments, reading, terminal
from hcp_jax.cost.models import MODELS
from hcp_jax.dynamic.cost import Cost, TimedMicrobatch, model_cost


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `run` reads."""
    parser.add_argument(
        "rows", type=arguments.existing_file, help="a JSON object per line and microbatch"
    )
    parser.add_argument("--model", choices=sorted(MODELS), default="gpt-12x2048")
    parser.add_argument("--devices-per-host", type=arguments.whole(), default=8)
    parser.add_argument(
        "--output", type=arguments.output(), default=None, metavar="FILE", help="write JSON here"
    )


def run(args: argparse.Namespace) -> int:
    """Fit the cost, print its changes and errors, write it, and return the exit code.

    Raises:
        ValueError: if the file has no rows, or one of them is not as described.
    """
    rows = read_rows(args.rows)
    before = model_cost(args.model, devices_per_host=args.devices_per_host)
    after = before.calibrate(rows)
    for field in dataclasses.fields(Cost):
        old, new = getattr(before, field.name), getattr(after, field.name)
        told = f"{old:.4g} -> {new:.4g}" if old != new else f"{old}"
        terminal.say(f"{field.name:26} {told}")
    errors = [
        after.microbatch_seconds(row.grouping, row.lengths, row.tokens, row.lanes) / row.seconds - 1
        for row in rows
    ]
    terminal.say(f"{len(rows)} microbatches, modelled within {max(map(abs, errors)):.1%} of each")
    if args.output is not None:
        Path(args.output).write_text(json.dumps(dataclasses.asdict(after), indent=2) + "\n")
    return 0


def read_rows(path: Path) -> list[TimedMicrobatch]:
    """Read the timed microbatches of a file.

    Raises:
        ValueError: names the first invalid line.
    """
    rows = []
    for number, line in enumerate(reading.read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = TimedMicrobatch(**reading.parse_json(line, "it"))
            rows.append(
                TimedMicrobatch(
                    tuple(map(int, row.grouping)),
                    tuple(tuple(map(int, group)) for group in row.lengths),
                    int(row.tokens),
                    float(row.seconds),
                    int(row.lanes),
                )
            )
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{path}:{number} is not an object with grouping, lengths, tokens and seconds: "
                f"{error}"
            ) from None
        if len(rows[-1].grouping) != len(rows[-1].lengths):
            raise ValueError(f"{path}:{number} needs one list of lengths for each group.")
    return rows


def read_cost(path: Path) -> Cost:
    """Read a cost that `run` wrote.

    Raises:
        ValueError: if the file contains something else.
    """
    try:
        return Cost(**reading.read_json(path))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no cost of `hcp dynamic calibrate`: {error}") from None
