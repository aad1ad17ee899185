"""`hcp verify`: proof, on the devices at hand, that context parallelism computes what one does.

Three things are measured, and a table tells them: attention against dense attention in float64, a
training step against the same step on one device, and the bytes that the compiled programs move
against what the algorithm must move. `streams.py` does it for streams that are cut over the mesh,
`groups.py` for documents on groups of devices (`parallel.dynamic`).

The sequences are short and large models are made narrow, with their heads, masks, comm types and
mesh kept: the mathematics does not depend on the rest.
"""

import argparse
import sys

import rich.box
import rich.table

from hcp_jax import terminal
from hcp_jax.train import config as configuration
from hcp_jax.verify import groups, streams


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hcp verify`."""
    configuration.add_arguments(parser)


def num_devices(args: argparse.Namespace) -> int:
    """How many devices to simulate where there is no GPU."""
    return configuration.from_arguments(args).parallel.num_devices


def run(args: argparse.Namespace) -> int:
    """Runs `hcp verify`; returns 0, or 1 if a check failed."""
    config = configuration.from_arguments(args)
    width = None if sys.stdout.isatty() else 100  # a file has room
    console = terminal.console(width=width)
    cp = config.parallel.context_parallel(config.model.num_layers)
    console.print(cp.describe(), markup=False, soft_wrap=True)
    if config.parallel.dynamic.enabled:
        tables = groups.checks(config, cp, console)
    else:
        tables = streams.checks(config, cp)
    total = failed = 0
    for title, rows in tables:
        table = rich.table.Table(
            title=title, title_justify="left", box=rich.box.SIMPLE_HEAD, pad_edge=False
        )
        for check in rows:
            if not table.columns:
                for heading in (*check.cells, ""):
                    table.add_column(heading, no_wrap=True)
            table.add_row(*check.cells.values(), "ok" if check.passed else "FAILED")
            total, failed = total + 1, failed + (not check.passed)
        if table.row_count:
            console.print(table)
    if failed:
        console.print(f"{failed} of {total} checks FAILED")
        return 1
    console.print(f"all {total} checks passed: this computes what one device computes")
    return 0
