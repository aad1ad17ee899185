"""`hcp train`: what its command line says, and which process of which cluster this one is."""

import argparse
import pathlib
import socket
from typing import Any

import jax

from hcp_jax.train import config as configuration
from hcp_jax.train import folder as run_folders
from hcp_jax.train.config import TrainConfig
from hcp_jax.train.loop import train
from hcp_jax.train.profile import ProfileSteps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hcp train`."""
    configuration.add_arguments(parser)
    parser.add_argument(
        "--resume",
        metavar="RUN",
        help="go on from the last checkpoint of this run folder, or of the 'latest'; with its own "
        "config unless one is given",
    )
    parser.add_argument(
        "--profile",
        metavar="N",
        type=int,
        help="trace N steps into the folder 'profile' of the run (docs/watching.md)",
    )
    parser.add_argument(
        "--profile-from",
        metavar="STEP",
        type=int,
        help="the first step that is traced; else the first few are skipped",
    )
    parser.add_argument(
        "--distributed",
        metavar="HOW",
        help="be one of several processes: 'auto' under Slurm, Open MPI or Kubernetes, elsewhere "
        "ADDRESS:PORT,PROCESS,PROCESSES of the first process, of this one, and of all",
    )


def num_devices(args: argparse.Namespace) -> int:
    """How many devices this process must simulate where there is no GPU."""
    total = _config_of(args, _resumed_folder(args)).parallel.num_devices
    return total // _cluster(args.distributed).get("num_processes", 1)


def run(args: argparse.Namespace) -> int:
    """Runs `hcp train`; returns 0, or 128 plus the number of the signal that stopped it."""
    if args.distributed:
        cluster = _cluster(args.distributed)
        if cluster.get("process_id") == 0:
            _require_free_port(cluster["coordinator_address"])
        jax.distributed.initialize(**cluster)
    folder = _resumed_folder(args)
    profile = None if args.profile is None else ProfileSteps(args.profile, args.profile_from)
    outcome = train(_config_of(args, folder), resume=folder, profile=profile)
    return 0 if outcome.stopped_by is None else 128 + outcome.stopped_by


def _resumed_folder(args: argparse.Namespace) -> pathlib.Path | None:
    """The folder of the run that a command line goes on with."""
    if args.resume is None:
        return None
    if args.resume != "latest":
        folder = pathlib.Path(args.resume)
        if not (folder / "config.yaml").is_file():
            raise ValueError(f"--resume: {folder} is no run folder: it has no config.yaml.")
        return folder
    return run_folders.latest(configuration.from_arguments(args).run_dir)


def _config_of(args: argparse.Namespace, folder: pathlib.Path | None) -> TrainConfig:
    """The config named, or that of the run resumed; overridden."""
    if args.config is not None or folder is None:
        if args.config is None:
            raise ValueError("hcp train needs a config (configs/quickstart.yaml) or --resume.")
        return configuration.from_arguments(args)
    return configuration.load(folder / "config.yaml", args.overrides or ())


def _cluster(how: str | None) -> dict[str, Any]:
    """What `jax.distributed.initialize` needs to be told."""
    if how in (None, "auto"):
        return {}
    parts = how.split(",")
    host, _, port = parts[0].rpartition(":")
    if len(parts) != 3 or not host or not all(p.isdecimal() for p in (port, *parts[1:])):
        raise ValueError(
            f"--distributed must be 'auto' or ADDRESS:PORT,PROCESS,PROCESSES (such as "
            f"10.0.0.1:1234,0,4), got {how!r}."
        )
    process, processes = int(parts[1]), int(parts[2])
    if process >= processes:
        raise ValueError(
            f"--distributed {how}: the processes of {processes} count from 0; {process} is none "
            "of them."
        )
    return {
        "coordinator_address": parts[0],
        "process_id": process,
        "num_processes": processes,
    }


def _require_free_port(address: str) -> None:
    """Told here, since jax's coordinator dies of a segmentation fault where a port is taken."""
    port = int(address.rpartition(":")[2])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ValueError(
                f"--distributed: port {port} cannot be used here ({error.strerror}); choose "
                "another one, the same for every process."
            ) from None
