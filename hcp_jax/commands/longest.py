"""Run `hcp longest`: find the longest sequence that fits a cluster, by compiling.

hcp longest configs/llama3-8b-long.yaml --gpu h200 --hosts 1
"""

import argparse
from typing import TYPE_CHECKING

from hcp_jax.base import arguments, terminal
from hcp_jax.commands.arguments import add_cluster_arguments, cluster
from hcp_jax.train import config as configuration

if TYPE_CHECKING:
    from hcp_jax.compiled.report import Memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `hcp longest`."""
    configuration.add_arguments(parser)
    add_cluster_arguments(parser)
    parser.add_argument(
        "--first",
        type=arguments.length,
        nargs=2,
        default=(65536, 131072),
        metavar="TOKENS",
        help="tokens per GPU of the first two lengths to compile (65536 131072)",
    )


def run(args: argparse.Namespace) -> int:
    """Run `hcp longest`; return the exit code."""
    from hcp_jax.planner.longest import longest_of_config

    config = configuration.from_arguments(args)
    sizes = config.parallel.resolve()
    cp_size = sizes.cp_outer * sizes.cp_inner

    def report(tokens: int, memory: "Memory") -> None:
        terminal.say_error(_summary(tokens * cp_size, tokens, memory))

    found = longest_of_config(config, cluster(args), tuple(args.first), report)
    terminal.say(_summary(found.tokens_per_device * cp_size, found.tokens_per_device, found.memory))
    return 0


def _summary(seq_len: int, tokens: int, memory: "Memory") -> str:
    return (
        f"{seq_len:,} tokens, {tokens:,} per GPU: {memory.peak_bytes / 2**30:.1f} of "
        f"{memory.device_bytes / 2**30:.0f} GiB, and {memory.host_bytes / 2**30:.1f} GiB of the "
        "host's memory"
    )
