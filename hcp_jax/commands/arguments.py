"""Define the arguments that several commands share."""

import argparse

from hcp_jax.base import arguments
from hcp_jax.hardware import GPUS, Cluster, gpu


def add_cluster_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name a cluster: --gpu, --hosts and --gpus-per-host."""
    parser.add_argument(
        "--gpu",
        type=arguments.non_empty,
        required=True,
        help=f"one of {', '.join(GPUS)}, or a YAML file that describes another",
    )
    parser.add_argument(
        "--hosts", type=arguments.whole(most=2**15), required=True, help="number of hosts"
    )
    parser.add_argument(
        "--gpus-per-host",
        type=arguments.whole(most=2**10),
        default=8,
        help="GPUs in each (8)",
    )


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """Add --json, which writes all figures to a file or to the screen."""
    parser.add_argument(
        "--json",
        type=arguments.output(screen=True),
        metavar="FILE",
        help="write all figures there; - for the screen",
    )


def cluster(args: argparse.Namespace) -> Cluster:
    """Return the cluster given by the arguments.

    Raises:
        ValueError: if the GPU is unknown or a size is not positive.
    """
    return Cluster(gpu(args.gpu), args.hosts, args.gpus_per_host)
