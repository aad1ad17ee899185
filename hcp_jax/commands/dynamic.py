"""Run `hcp dynamic simulate` and `hcp dynamic calibrate`."""

import argparse

from hcp_jax.dynamic import calibrate, simulate

_ACTIONS = {
    "simulate": (simulate, "show the gain of dynamic context parallelism for given lengths"),
    "calibrate": (calibrate, "fit the cost model to timed microbatches"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a subcommand for each module, with the arguments of the module."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="|".join(_ACTIONS))
    for name, (module, summary) in _ACTIONS.items():
        module.add_arguments(actions.add_parser(name, help=summary, description=summary))


def uses_jax(args: argparse.Namespace) -> bool:
    """Return False: schedules are made without devices."""
    return False


def run(args: argparse.Namespace) -> int:
    """Run the chosen subcommand; return the exit code."""
    return _ACTIONS[args.action][0].run(args)
