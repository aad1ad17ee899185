"""Read timed microbatches and fitted costs from files, and write costs.

Each line of a file of timed microbatches is one microbatch that ran, as JSON:

    {"grouping": [16, 8], "lengths": [[8000, 900], [3000]], "tokens": 2048, "seconds": 0.0312}
"""

import dataclasses
import json
from pathlib import Path

from hcp_jax.base import reading
from hcp_jax.dynamic.cost import Cost
from hcp_jax.dynamic.group import TimedMicrobatch


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
    """Read a cost that `write_cost` wrote.

    Raises:
        ValueError: if the file contains something else.
    """
    try:
        return Cost(**reading.read_json(path))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no cost of `hcp dynamic calibrate`: {error}") from None


def write_cost(cost: Cost, path: Path) -> None:
    """Write a cost as JSON."""
    path.write_text(json.dumps(dataclasses.asdict(cost), indent=2) + "\n")
