"""Run `hcp launch`: start the processes of `hcp train` on one machine, watch them, restart them.

Use it to run several processes on the GPUs of one machine, or to try a run of several hosts on one
machine: real processes with real sockets, on loopback. On a cluster, Slurm or Kubernetes starts the
processes; see configs/launch.

All processes get the same run folder, so a restart after a death continues from the last
checkpoint. The output of each process goes to the usual streams; lines of all processes except the
first begin with the number of the process.
"""

import argparse
import contextlib
import os
import pathlib
import queue
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

from hcp_jax.base import arguments, terminal
from hcp_jax.commands import train
from hcp_jax.train.config import TrainConfig
from hcp_jax.train.hosts import cluster, meeting
from hcp_jax.train.hosts.watchdog import GONE

GRACE = 30.0
"""Seconds that the other processes have to end after one has died; then they are killed."""

_FINAL = (1, 2, 130)
"""Exit codes after which a restart would end in the same way."""


class End(NamedTuple):
    """Result of one start of all processes.

    Attributes:
        codes: exit code of each process; the negative signal number if a signal killed it.
        killed: processes that were killed because another one had died.
        stopped_by: signal that this process received and passed on; None if there was none.
    """

    codes: dict[int, int]
    killed: set[int]
    stopped_by: int | None

    @property
    def ended_first(self) -> list[int]:
        """Processes that ended on their own, not because another one had died."""
        bad = [p for p, code in self.codes.items() if code not in (0, GONE)]
        return sorted(set(bad) - self.killed) or sorted(p for p, c in self.codes.items() if c)

    def describe(self) -> str:
        """Return the processes that died, and the cause of each death."""
        return ", ".join(f"process {p} {_cause(self.codes[p])}" for p in self.ended_first)

    @property
    def code(self) -> int:
        """Exit code for the whole launch."""
        first = self.ended_first
        if not first:
            return 0
        code = self.codes[first[0]]
        return 128 - code if code < 0 else code


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `hcp launch`: those of `hcp train`, and the number of processes."""
    train.add_run_arguments(parser)
    of = parser.add_argument_group("processes")
    of.add_argument(
        "--num-processes",
        type=arguments.whole(most=1024),
        required=True,
        metavar="N",
        help="how many",
    )
    of.add_argument(
        "--devices-per-process",
        type=arguments.whole(most=1024),
        metavar="D",
        help="GPUs, or simulated devices, of each; all there are, shared out, if not given",
    )
    of.add_argument(
        "--restarts",
        type=arguments.whole(least=0),
        default=0,
        metavar="R",
        help="how often to start all of them again, from the last checkpoint, when one dies (0)",
    )
    cluster.add_timeouts(of)


def run(args: argparse.Namespace) -> int:
    """Run `hcp launch`; return 0, or the exit code of the first process that failed."""
    from hcp_jax.train import folder as run_folders

    folder = train.resumed_folder(args)
    config = train.resolve_config(args, folder)
    train.require_can_begin(config, folder, 0 if train.has_gpus() else config.parallel.num_devices)
    environments = _environments(args, config)
    made = folder is None
    folder = folder or run_folders.make_numbered(config)
    try:
        for left in reversed(range(args.restarts + 1)):
            with _Processes(_commands(args, folder), environments) as processes:
                end = processes.wait()
            if end.code == 0 or end.stopped_by is not None:
                break
            again = left > 0 and end.code not in _FINAL
            _say(f"{end.describe()}" + (f"; starting again, {left - 1} left" if again else ""))
            if not again:
                break
    finally:
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # nothing came of it
    return end.code


class _Processes:
    """All processes of one start; a context manager that ends them on exit."""

    def __init__(self, commands: list[list[str]], environments: list[dict[str, str]]):
        self._ended: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._stopped_by: int | None = None
        self._threads: list[threading.Thread] = []
        self._all: list[subprocess.Popen[bytes]] = []
        self._before = {
            number: signal.signal(number, self._pass_on)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        for number, (command_line, environment) in enumerate(
            zip(commands, environments, strict=True)
        ):
            piped = subprocess.PIPE if number else None
            # A session of its own, so that a Ctrl-C arrives once, from here, and not also from the
            # terminal.
            process = subprocess.Popen(
                command_line,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                stdout=piped,
                stderr=piped,
            )
            self._all.append(process)
            self._follow(self._wait_for, number, process)
            if process.stdout is not None and process.stderr is not None:
                self._follow(_prefix, f"[{number}] ", process.stdout, sys.stdout)
                self._follow(_prefix, f"[{number}] ", process.stderr, sys.stderr)

    def __enter__(self) -> "_Processes":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._all:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        for thread in self._threads:
            thread.join()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wait(self) -> End:
        """Wait until all have ended, at most `GRACE` seconds after the first has died."""
        codes: dict[int, int] = {}
        killed: set[int] = set()
        deadline: float | None = None
        while len(codes) < len(self._all):
            try:
                left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
                number = self._ended.get(timeout=left)
            except queue.Empty:
                killed = set(range(len(self._all))) - set(codes)
                for one in killed:
                    self._all[one].kill()
                deadline = None
                continue
            codes[number] = self._all[number].returncode
            if codes[number] and deadline is None and not killed:
                deadline = time.monotonic() + GRACE
        return End(codes, killed, self._stopped_by)

    def _follow(self, target: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _wait_for(self, number: int, process: subprocess.Popen[bytes]) -> None:
        process.wait()
        self._ended.put(number)

    def _pass_on(self, number: int, frame: object) -> None:
        self._stopped_by = number
        for process in self._all:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)


def _commands(args: argparse.Namespace, folder: pathlib.Path) -> list[list[str]]:
    """Return the command of each process."""
    common = [sys.executable, "-m", "hcp_jax.cli", "train"]
    common += [] if args.config is None else [str(args.config)]
    common += [part for key, text in args.overrides or () for part in (f"--{key}", text)]
    common += [f"--accept={word}" for word in args.accept or ()]
    common += [f"--folder={folder}"]
    if args.num_processes == 1:
        return [common]
    common += [
        f"--coordinator=127.0.0.1:{_free_port()}",
        f"--num-processes={args.num_processes}",
        f"--start-timeout={args.start_timeout}",
        f"--heartbeat-timeout={args.heartbeat_timeout}",
    ]
    return [[*common, f"--process-id={i}"] for i in range(args.num_processes)]


def _environments(args: argparse.Namespace, config: TrainConfig) -> list[dict[str, str]]:
    """Return the environment of each process, with its part of the machine's devices."""
    processes, wanted = args.num_processes, config.parallel.num_devices
    gpus = _gpus() if train.has_gpus() else []
    each = args.devices_per_process or (len(gpus) or wanted) // processes or 1
    if each * processes != wanted:
        raise ValueError(
            f"{processes} processes of {each} devices have {processes * each}, but the config's "
            f"mesh needs {wanted}; change --num-processes, --devices-per-process or parallel."
        )
    if not gpus:
        simulated = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(each)}
        return [_from_launcher() | simulated] * processes
    if len(gpus) < wanted:
        raise ValueError(
            f"{processes} processes of {each} GPUs need {wanted}, but this machine has {len(gpus)}."
        )
    parts = [gpus[i * each : (i + 1) * each] for i in range(processes)]
    # NCCL also listens on loopback only, unless the user has chosen an interface.
    common = _from_launcher() | {"NCCL_SOCKET_IFNAME": os.environ.get("NCCL_SOCKET_IFNAME", "lo")}
    return [common | {"CUDA_VISIBLE_DEVICES": ",".join(part)} for part in parts]


def _gpus() -> list[str]:
    """Return the GPUs that this process may use, as names for CUDA_VISIBLE_DEVICES."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    smi = shutil.which("nvidia-smi")
    if smi is None:
        raise ValueError(
            "there are GPUs, but no nvidia-smi to count them; say which to use in "
            "CUDA_VISIBLE_DEVICES."
        )
    query = [smi, "--query-gpu=index", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()


def _from_launcher() -> dict[str, str]:
    """Return environment variables that only the processes of this launch share."""
    secret = meeting.secret() or secrets.token_hex(16)
    return {cluster.LAUNCHER: str(os.getpid()), meeting.SECRET: secret}


def _free_port() -> int:
    """Return a free port below the range that the system uses for outgoing connections.

    So no outgoing connection can take it while the processes start.
    """
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("there is no free port on 127.0.0.1")


def _prefix(prefix: str, lines: IO[bytes], to: IO[str]) -> None:
    for line in _decoded(lines):
        to.write(prefix + line)
        to.flush()


def _decoded(lines: IO[bytes]) -> Iterator[str]:
    with lines:
        for line in lines:
            text = line.decode(errors="replace")
            yield text if text.endswith("\n") else f"{text}\n"


def _cause(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _say(text: str) -> None:
    terminal.say_error(f"hcp launch: {text}")
