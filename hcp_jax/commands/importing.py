"""Run `hcp import`; hcp_jax.train.hf.importing does the work."""

import argparse

from hcp_jax.base import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `hcp import`."""
    parser.add_argument(
        "folder",
        type=arguments.non_empty,
        help="a Hugging Face folder: config.json, safetensors, tokenizer.json",
    )
    parser.add_argument(
        "--out",
        type=arguments.writable_folder,
        metavar="RUNFOLDER",
        help="write config.yaml there, for hcp train; without this option, print it",
    )


def run(args: argparse.Namespace) -> int:
    """Run `hcp import`; return the exit code."""
    from hcp_jax.train.hf import importing

    return importing.run(args)
