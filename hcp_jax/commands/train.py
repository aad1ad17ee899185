"""Run `hcp train`: parse its arguments, start the run, and choose the exit code."""

import argparse
import functools
import importlib.metadata
import os
import pathlib
import platform
import signal
from typing import TYPE_CHECKING, Any

from hcp_jax import program_cache
from hcp_jax.base import arguments, terminal, watch
from hcp_jax.base.settings import CONSENT
from hcp_jax.train import config as configuration
from hcp_jax.train import here
from hcp_jax.train.config import TrainConfig
from hcp_jax.train.hosts import cluster
from hcp_jax.train.hosts.signals import Signals
from hcp_jax.train.hosts.watchdog import Peers
from hcp_jax.train.metrics import wandb

if TYPE_CHECKING:
    from hcp_jax.train.steps import Outcome


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `hcp train`."""
    add_run_arguments(parser)
    parser.add_argument(
        "--folder",
        metavar="RUN",
        type=arguments.writable_folder,
        help="use this run folder: continue if it has a checkpoint, else start; so a scheduler can "
        "give the same command again and again until the run is done",
    )
    cluster.add_arguments(parser)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say what is trained."""
    configuration.add_arguments(parser)
    parser.add_argument(
        "--resume",
        metavar="RUN",
        type=arguments.non_empty,
        help="continue from the last checkpoint of this run folder, or of the 'latest' one, with "
        "its own config unless one is given",
    )
    parser.add_argument(
        "--accept",
        metavar="WORD",
        action="append",
        choices=CONSENT,
        help="continue although something has changed since the last checkpoint: 'numbers' "
        "(settings that change what is computed) or 'data' (the text); can be given twice",
    )
    parser.add_argument(
        "--profile",
        metavar="N",
        type=arguments.whole(),
        help="trace N steps into the folder 'profile' of the run (docs/watching.md)",
    )
    parser.add_argument(
        "--profile-from",
        metavar="STEP",
        type=arguments.whole(least=0),
        help="the first traced step; without this option the first few steps are skipped",
    )


def num_devices(args: argparse.Namespace) -> int:
    """Return the number of devices that this process simulates if there is no GPU."""
    total = resolve_config(args, _folder(args)).parallel.num_devices
    return max(1, total // cluster.num_processes(args))


def keep_programs(args: argparse.Namespace) -> None:
    """Keep compiled programs for the next start, unless the config says not to."""
    if resolve_config(args, _folder(args)).program_cache:
        joins = args.distributed or args.coordinator is not None
        program_cache.turn_on(
            several_hosts=joins and cluster.LAUNCHER not in os.environ,
            tell=not args.process_id,
        )


def run(args: argparse.Namespace) -> int:
    """Run `hcp train`.

    Returns:
        0, also if SIGTERM (preemption) stopped the run, because it is saved; 130 after Ctrl-C;
        `cluster.WENT_WRONG` after an error that the user did not cause.
    """
    met: list[Peers] = []
    with Signals(functools.partial(_end, args, met)) as signals:
        return _run(args, signals, met)


def _end(args: argparse.Namespace, met: list[Peers], number: int, stepping: bool) -> None:
    """End this process after a signal that cannot wait; see `Signals`."""
    name = signal.Signals(number).name
    for peers in met:
        peers.fail(f"it was stopped by {name}")
    if stepping:
        said = "The run goes on from its last checkpoint."
    elif args.resume is not None:
        said = f"Nothing is lost. Go on with:\n  hcp train --resume {args.resume}"
    else:
        said = "Nothing is lost; give the same command again."
    when = "while it was stopping" if stepping else "before the first step"
    watch.end_now(f"hcp: stopped by {name} {when}. {said}", 130 if number == signal.SIGINT else 0)


def _run(args: argparse.Namespace, signals: Signals, met: list[Peers]) -> int:
    folder = _folder(args)
    config = resolve_config(args, folder)
    require_can_begin(config, folder, 0 if has_gpus() else num_devices(args))

    from hcp_jax.train.loop import train
    from hcp_jax.train.metrics.profile import ProfileSteps, check_profile

    profile = None if args.profile is None else ProfileSteps(args.profile, args.profile_from)
    if folder is None:
        check_profile(profile, 0, config.steps)
    with cluster.joined(args, _same_everywhere(config, folder)) as peers:
        met += [] if peers is None else [peers]
        try:
            outcome = train(
                config,
                resume=folder,
                begin=args.folder is not None,
                profile=profile,
                peers=peers,
                accept=args.accept or (),
                signals=signals,
            )
        except (ValueError, NotImplementedError, FloatingPointError):
            raise
        except Exception as error:
            if peers is not None:
                raise
            _tell(error)
            return cluster.WENT_WRONG
    return _exit_code(outcome)


def has_gpus() -> bool:
    """Return whether jax will use real devices instead of simulating them on the CPU."""
    import jax

    return not (jax.config.values["jax_platforms"] or "").startswith("cpu")


def require_can_begin(config: TrainConfig, folder: pathlib.Path | None, simulated: int) -> None:
    """Refuse a run that cannot run or be written here, before data is read or anything compiles.

    Args:
        config: config of the run.
        folder: its run folder; None for a new one in `run_dir`.
        simulated: number of devices that this machine would simulate; 0 if it has GPUs.

    Raises:
        ValueError: says what is wrong, and what to do.
    """
    here.require_filled_in(config)
    wandb.require_installed(config.log.wandb)
    here.require_runs_here(config, simulated)
    if folder is None:
        try:
            arguments.writable_folder(config.run_dir)
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"run_dir: {error}") from None


def _exit_code(outcome: "Outcome") -> int:
    return 130 if outcome.stopped_by == signal.SIGINT else 0


def _tell(error: Exception) -> None:
    """Print a line for an error of the machine, and a traceback for any other error."""
    if isinstance(error, OSError) and os.environ.get("HCP_DEBUG", "0") in ("", "0"):
        terminal.say_error(f"hcp: {error}")
    else:
        terminal.say_traceback(error)


def _same_everywhere(config: TrainConfig, folder: pathlib.Path | None) -> dict[str, Any]:
    """Return the values that all processes must share, by names for people."""
    packages = ("jax", "jaxlib", "numpy", "hcp_jax")
    return {
        **configuration.flatten(config),
        "the run folder": None if folder is None else str(folder),
        "the version of Python": platform.python_version(),
        **{f"the version of {name}": _version(name) for name in packages},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _folder(args: argparse.Namespace) -> pathlib.Path | None:
    if args.folder is None:
        return resumed_folder(args)
    if args.resume is not None:
        raise ValueError("--folder and --resume both name the run folder; give one of them.")
    return args.folder


def resumed_folder(args: argparse.Namespace) -> pathlib.Path | None:
    """Return the folder of the run that a command line continues; None for a new run."""
    if args.accept and args.resume is None and getattr(args, "folder", None) is None:
        raise ValueError("--accept is for a resumed run; name it with --resume or --folder.")
    if args.resume is None:
        return None
    if any(key == "init_from" for key, _ in args.overrides or ()):
        raise ValueError(
            "--init_from starts a new run from a folder's weights, and --resume continues with a "
            "run's own; give one of the two."
        )
    if args.resume != "latest":
        folder = pathlib.Path(args.resume)
        if not (folder / "config.yaml").is_file():
            raise ValueError(f"--resume: {folder} is not a run folder: it has no config.yaml.")
        return folder
    from hcp_jax.train import folder as run_folders

    return run_folders.latest(configuration.from_arguments(args).run_dir)


def resolve_config(args: argparse.Namespace, folder: pathlib.Path | None) -> TrainConfig:
    """Return the named config, or that of the resumed run, with the overrides applied."""
    saved = folder is not None and (folder / "config.yaml").is_file()
    if args.config is not None or not saved:
        if args.config is None:
            raise ValueError("hcp train needs a config (configs/quickstart.yaml) or --resume.")
        return configuration.from_arguments(args)
    assert folder is not None
    return configuration.load(folder / "config.yaml", args.overrides or ())
