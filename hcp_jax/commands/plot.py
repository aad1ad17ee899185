"""Run `hcp plot`; hcp_jax.viz does the work."""

import argparse
import pathlib

from hcp_jax.base import arguments, terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `hcp plot`."""
    parser.add_argument(
        "runs", nargs="+", type=arguments.existing_folder, metavar="RUN", help="a run folder"
    )
    parser.add_argument(
        "--out",
        type=arguments.output(".png", ".pdf", ".svg"),
        default=pathlib.Path("runs.png"),
        help="the picture (runs.png); .pdf and .svg work, too",
    )
    parser.add_argument(
        "--against", choices=("step", "tokens"), default="step", help="the axis of all curves"
    )


def run(args: argparse.Namespace) -> int:
    """Run `hcp plot`; return the exit code."""
    from hcp_jax import viz

    runs = [viz.read_run(folder) for folder in args.runs]
    viz.draw_runs(runs, args.against).savefig(args.out, dpi=150)
    terminal.say(args.out)
    return 0


def uses_jax(args: argparse.Namespace) -> bool:
    """Return False: pictures are drawn from files."""
    return False
