"""One process of several: which one it is, how all of them start, and how all of them end.

`joined` is a context in which this process is one of the cluster's: around it nothing is known of
the others, inside it no process is left waiting for one that is gone.
"""

import argparse
import contextlib
import ctypes
import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from hcp_jax.base import arguments, terminal
from hcp_jax.train.hosts.watchdog import Peers, Place

LAUNCHER = "HCP_LAUNCHER"
"""The environment's variable that has the process id of `hcp launch`, where that started us."""

WENT_WRONG = 70
"""Exit code of a process in which something happened that nobody foresaw (EX_SOFTWARE)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that say which process this is."""
    of = parser.add_argument_group(
        "several processes",
        "One process on each host (or for each GPU); every one of them is started with the same "
        "config.",
    )
    of.add_argument(
        "--distributed",
        action="store_true",
        help="find out from Slurm, Open MPI or Kubernetes what of the next three is not given",
    )
    of.add_argument(
        "--coordinator",
        type=arguments.non_empty,
        metavar="ADDRESS:PORT",
        help="where process 0 is reached by the others",
    )
    of.add_argument(
        "--num-processes",
        type=arguments.whole(),
        metavar="N",
        help="how many processes there are",
    )
    of.add_argument(
        "--process-id",
        type=arguments.whole(least=0),
        metavar="I",
        help="which one this is, from 0",
    )
    add_timeouts(of)


def add_timeouts(of: argparse._ActionsContainer) -> None:
    """How long processes wait for each other."""
    of.add_argument(
        "--start-timeout",
        type=arguments.positive,
        default=300.0,
        metavar="SECONDS",
        help="how long the processes wait for each other at the start (300)",
    )
    of.add_argument(
        "--heartbeat-timeout",
        type=arguments.positive,
        default=60.0,
        metavar="SECONDS",
        help="after how long a silent process counts as dead; one that exits is noticed at once "
        "(60)",
    )


def num_processes(args: argparse.Namespace) -> int:
    """How many processes share the run's devices, as far as the command line says."""
    return args.num_processes or 1


@contextlib.contextmanager
def joined(args: argparse.Namespace, same: Mapping[str, Any]) -> Iterator[Peers | None]:
    """This process as one of several, if the command line says that it is.

    If what is done inside raises, all processes end; the others say what it was.

    Args:
        args: of `add_arguments`.
        same: what must be the same in every process; see `Peers.agree`.

    Yields:
        The connections to the others; None for a process on its own.

    Raises:
        ValueError: if the arguments cannot be, if the others do not come, or if they were started
            differently.
    """
    _end_with_launcher()
    found = _find(args)
    if found is None:
        yield None
        return
    place, local_devices = found
    peers = Peers(place, args.start_timeout, args.heartbeat_timeout)
    peers.meet()
    try:
        _name_host_in_logs(place)
        peers.agree(same)
        import jax

        jax.distributed.initialize(
            place.address,
            place.processes,
            place.process,
            local_devices,
            cluster_detection_method="deactivate",
            initialization_timeout=math.ceil(args.start_timeout),
            # Behind our own watch, should that fail itself.
            heartbeat_timeout_seconds=max(10, math.ceil(2 * args.heartbeat_timeout)),
            coordinator_bind_address=_bind_address(place),
        )
        yield peers
        peers.close()
    except BaseException as error:
        _leave(peers, error)


def _find(args: argparse.Namespace) -> tuple[Place, list[int] | None] | None:
    """Where this process stands, and which GPUs of its host are its own if not all."""
    from hcp_jax import compat

    given = compat.Detected(args.coordinator, args.num_processes, args.process_id, None)
    if args.distributed:
        try:
            given = compat.detect_cluster(*given[:3], math.ceil(args.start_timeout))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"--distributed: {error}") from None
    if given[:3] == (None, None, None) and not args.distributed:
        return None
    if given.address is None or given.processes is None or given.process is None:
        raise ValueError(
            "--distributed: this is no job of Slurm, Open MPI or Kubernetes that jax knows of "
            "(for Kubernetes it needs the kubernetes package). Give --coordinator, --num-processes "
            "and --process-id."
            if args.distributed
            else "--coordinator, --num-processes and --process-id belong together: give all three, "
            "or --distributed under Slurm, Open MPI or Kubernetes."
        )
    place = Place(given.address, given.process, given.processes)
    if given.local_devices is None or "JAX_LOCAL_DEVICE_IDS" in os.environ:
        return place, None  # all, or those that jax is told of there
    return place, list(given.local_devices)


def _bind_address(place: Place) -> str | None:
    """Return where jax's service listens, as the meeting did; None for jax's choice, everywhere."""
    host = place.bind_host
    if not host:
        return None
    return f"[{host}]:{place.port}" if ":" in host else f"{host}:{place.port}"


def _end_with_launcher() -> None:
    """If `hcp launch` is killed, its processes get a SIGTERM: they save and end (Linux)."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is None or sys.platform != "linux":
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if os.getppid() != int(launcher):
        raise ValueError("hcp launch, which started this process, is gone.")


def _leave(peers: Peers, error: BaseException) -> None:
    """Ends this process after an error, and with it all others.

    It ends here and now: on the usual way out jax would wait for the others, minutes long.
    """
    told = isinstance(error, ValueError | NotImplementedError | OSError | FloatingPointError)
    if not isinstance(error, KeyboardInterrupt):
        # When a process dies in a collective, that is an error of jax's here, of whatever type
        # (ValueError is among them); its name comes a little later.
        peers.wait_for_cause(3.0)
    if os.environ.get("HCP_DEBUG", "0") not in ("", "0") or not (
        told or isinstance(error, KeyboardInterrupt)
    ):
        terminal.say_traceback(error)
    said = " ".join(str(error).split()) or type(error).__name__
    where = f" process {peers.place.process} on {socket.gethostname()}:"
    terminal.say_error(f"hcp:{where} {said}")
    peers.fail(said)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code(error))


def exit_code(error: BaseException) -> int:
    """2 for what the user has to change, 1 for a loss that is not finite, 130 for Ctrl-C."""
    if isinstance(error, ValueError | NotImplementedError):
        return 2
    if isinstance(error, FloatingPointError):
        return 1
    return 130 if isinstance(error, KeyboardInterrupt) else WENT_WRONG


def _name_host_in_logs(place: Place) -> None:
    if place.process == 0:
        return
    name = f"process {place.process} on {socket.gethostname()}"
    for handler in logging.getLogger().handlers:
        handler.setFormatter(terminal.Formatter(f"{name}: %(message)s"))
