"""Run `hcp export`; hcp_jax.train.hf.exporting does the work."""

import argparse

from hcp_jax.base import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `hcp export`."""
    parser.add_argument("run", type=arguments.existing_folder, help="a run folder")
    parser.add_argument("out", type=arguments.writable_folder, help="a new folder")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the tensors (as in the folder that the run started from; else float32)",
    )
    parser.add_argument(
        "--shard-gb",
        type=arguments.positive,
        default=5.0,
        help="most gigabytes in one file (5)",
    )


def run(args: argparse.Namespace) -> int:
    """Run `hcp export`; return the exit code."""
    from hcp_jax.train.hf import exporting

    return exporting.run(args)
