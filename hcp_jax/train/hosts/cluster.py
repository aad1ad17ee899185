"""Find out which process of several this is, join the others, and end with them.

`joined` is a context in which this process is connected to the others; inside it, no process is
left waiting for one that is gone.
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
from hcp_jax.train.hosts.meeting import Address
from hcp_jax.train.hosts.watchdog import Peers

LAUNCHER = "HCP_LAUNCHER"
"""The environment variable with the process id of `hcp launch`, if that started this process."""

WENT_WRONG = 70
"""Exit code after an error that is not expected (EX_SOFTWARE)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say which process this is."""
    group = parser.add_argument_group(
        "several processes",
        "Start one process on each host (or for each GPU), all with the same config.",
    )
    group.add_argument(
        "--distributed",
        action="store_true",
        help="ask Slurm, Open MPI or Kubernetes for those of the next three that are not given",
    )
    group.add_argument(
        "--coordinator",
        type=arguments.non_empty,
        metavar="ADDRESS:PORT",
        help="where the others reach process 0",
    )
    group.add_argument(
        "--num-processes",
        type=arguments.whole(),
        metavar="N",
        help="how many processes there are",
    )
    group.add_argument(
        "--process-id",
        type=arguments.whole(least=0),
        metavar="I",
        help="which one this is, from 0",
    )
    add_timeouts(group)


def add_timeouts(group: argparse._ActionsContainer) -> None:
    """Add the arguments that say how long processes wait for each other."""
    group.add_argument(
        "--start-timeout",
        type=arguments.positive,
        default=300.0,
        metavar="SECONDS",
        help="how long the processes wait for each other at the start (300)",
    )
    group.add_argument(
        "--heartbeat-timeout",
        type=arguments.positive,
        default=60.0,
        metavar="SECONDS",
        help="after how long a silent process counts as dead; one that exits is noticed at once "
        "(60)",
    )


def num_processes(args: argparse.Namespace) -> int:
    """Return how many processes share the run's devices; 1 if the command line does not say."""
    return int(args.num_processes or 1)


@contextlib.contextmanager
def joined(args: argparse.Namespace, same: Mapping[str, Any]) -> Iterator[Peers | None]:
    """Join the other processes, if the command line says that there are some.

    An error inside the context ends all processes; the others report it, too.

    Args:
        args: from `add_arguments`.
        same: values that must be the same in every process; see `Peers.agree`.

    Yields:
        The connections to the others; None for a single process.

    Raises:
        ValueError: if the arguments do not fit together, if the others do not come, or if they were
            started differently.
    """
    _end_with_launcher()
    found = _find(args)
    if found is None:
        yield None
        return
    address, local_devices = found
    peers = Peers(address, args.start_timeout, args.heartbeat_timeout)
    peers.meet()
    try:
        _name_host_in_logs(address)
        peers.agree(same)
        import jax

        jax.distributed.initialize(
            address.coordinator,
            address.processes,
            address.process,
            local_devices,
            cluster_detection_method="deactivate",
            initialization_timeout=math.ceil(args.start_timeout),
            # Longer than that of our own watch, which should notice first.
            heartbeat_timeout_seconds=max(10, math.ceil(2 * args.heartbeat_timeout)),
            coordinator_bind_address=_bind_address(address),
        )
        yield peers
        peers.close()
    except BaseException as error:
        _leave(peers, error)


def _find(args: argparse.Namespace) -> tuple[Address, list[int] | None] | None:
    """Return the address of this process, and its GPUs of this host (None: all of them).

    Return None if this is a single process.
    """
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
            "--distributed: jax finds no job of Slurm, Open MPI or Kubernetes here "
            "(for Kubernetes it needs the kubernetes package). Give --coordinator, --num-processes "
            "and --process-id."
            if args.distributed
            else "--coordinator, --num-processes and --process-id belong together: give all three, "
            "or --distributed under Slurm, Open MPI or Kubernetes."
        )
    address = Address(given.address, given.process, given.processes)
    if given.local_devices is None or "JAX_LOCAL_DEVICE_IDS" in os.environ:
        return address, None  # all, or those of that variable
    return address, list(given.local_devices)


def _bind_address(address: Address) -> str | None:
    """Return the address that jax's service listens at; None: all addresses, as jax does."""
    host = address.bind_host
    if not host:
        return None
    return f"[{host}]:{address.port}" if ":" in host else f"{host}:{address.port}"


def _end_with_launcher() -> None:
    """Ask Linux for a SIGTERM if `hcp launch`, which started this process, is killed."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is None or sys.platform != "linux":
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if os.getppid() != int(launcher):
        raise ValueError("hcp launch, which started this process, is gone.")


def _leave(peers: Peers, error: BaseException) -> None:
    """End this process and all others after an error.

    It exits at once: in a normal exit, jax would wait for the others for minutes.
    """
    expected = isinstance(error, ValueError | NotImplementedError | OSError | FloatingPointError)
    if not isinstance(error, KeyboardInterrupt):
        # If another process died in a collective, jax raises an error of any type here (also a
        # ValueError); the watch learns a little later which process it was.
        peers.wait_for_cause(3.0)
    if os.environ.get("HCP_DEBUG", "0") not in ("", "0") or not (
        expected or isinstance(error, KeyboardInterrupt)
    ):
        terminal.say_traceback(error)
    text = " ".join(str(error).split()) or type(error).__name__
    where = f" process {peers.address.process} on {socket.gethostname()}:"
    terminal.say_error(f"hcp:{where} {text}")
    peers.fail(text)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code(error))


def exit_code(error: BaseException) -> int:
    """Return 2 for an error of the user, 1 for a loss that is not finite, 130 for Ctrl-C."""
    if isinstance(error, ValueError | NotImplementedError):
        return 2
    if isinstance(error, FloatingPointError):
        return 1
    return 130 if isinstance(error, KeyboardInterrupt) else WENT_WRONG


def _name_host_in_logs(address: Address) -> None:
    if address.process == 0:
        return
    name = f"process {address.process} on {socket.gethostname()}"
    for handler in logging.getLogger().handlers:
        handler.setFormatter(terminal.Formatter(f"{name}: %(message)s"))
