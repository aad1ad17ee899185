"""`hcp dynamic simulate` and `hcp dynamic calibrate`: the words behind `hcp dynamic`."""

import argparse

from hcp_jax.dynamic import calibrate, simulate

_ACTIONS = {
    "simulate": (simulate, "what dynamic context parallelism brings for a length distribution"),
    "calibrate": (calibrate, "fit the cost model to timed microbatches"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give `parser` an action for each module, with that module's arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="|".join(_ACTIONS))
    for name, (module, summary) in _ACTIONS.items():
        module.add_arguments(actions.add_parser(name, help=summary, description=summary))


def uses_jax(args: argparse.Namespace) -> bool:
    """Return False: schedules are made without devices."""
    return False


def run(args: argparse.Namespace) -> int:
    """Run the action that was asked for; the exit status."""
    return _ACTIONS[args.action][0].run(args)
