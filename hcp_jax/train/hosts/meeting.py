"""Connect the processes of a run to process 0, at the coordinator's port.

Process 0 listens; the others connect, send who they are, and are admitted once all are there. Other
connections to the port (a scanner, a process of another run, an attacker) cost neither time nor the
run: all new connections are read concurrently, each may send a few bytes within a few seconds, a
bounded number may wait at one time, and unexpected ones are refused. Process 0 never ends because
of a new connection; after its timeout, it reports which processes are missing and which were
refused.

A secret in the environment variable `HCP_SECRET`, the same for all processes, keeps out everybody
who does not know it (`hcp launch` makes one for each run). It is sent as plain text, so it does not
protect against those who can read the network's traffic.
"""

import dataclasses
import hmac
import ipaddress
import logging
import os
import selectors
import socket
import time
from typing import Any, NoReturn

from hcp_jax.base.terminal import printable
from hcp_jax.train.hosts.line import Line, NoMessageError

SECRET = "HCP_SECRET"
"""The environment variable with the secret of a run, if it has one."""

SHOWN = 8
"""The most names, or differences, in one message."""

MAX_PENDING = 64
"""The most connections that may wait to be admitted; the oldest makes room for the next."""

GREETING_SECONDS = 10.0
"""Seconds in which a new connection must send who it is."""

_LONGEST_GREETING = 2**12

_log = logging.getLogger("hcp_jax")


@dataclasses.dataclass(frozen=True)
class Address:
    """The address of process 0, and the number of this process.

    Attributes:
        coordinator: host and port of process 0, and later of jax's service.
        process: number of this process, from 0.
        processes: number of processes.

    Raises:
        ValueError: if `coordinator` is not ADDRESS:PORT, or `process` not below `processes`.
    """

    coordinator: str
    process: int
    processes: int

    def __post_init__(self) -> None:
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise ValueError(
                f"--coordinator must be ADDRESS:PORT of process 0, such as 10.0.0.1:1234, got "
                f"{self.coordinator!r}."
            )
        if not 0 <= self.process < self.processes:
            raise ValueError(
                f"--process-id {self.process}: the processes of {self.processes} count from 0 to "
                f"{self.processes - 1}."
            )

    @property
    def host(self) -> str:
        """The host of process 0."""
        return self.coordinator.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The port of process 0."""
        return int(self.coordinator.rpartition(":")[2])

    @property
    def bind_host(self) -> str:
        """The one IP address that process 0 listens at; empty for all addresses of the host.

        It is the coordinator's own address if that is an IP address (or localhost) of this host. A
        name is not used, since it may stand for different addresses on different hosts.
        """
        host = "127.0.0.1" if self.host == "localhost" else self.host
        try:
            family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
            with socket.socket(family) as probe:
                probe.bind((host, 0))
        except (ValueError, OSError):
            return ""
        return host


class Admission:
    """Admits all other processes of the run to process 0, and nobody else.

    Args:
        address: of this process, which is process 0.
        timeout: seconds to wait for the others.
    """

    def __init__(self, address: Address, timeout: float):
        self._address, self._timeout = address, timeout
        self._admitted: dict[int, Line] = {}
        self._pending: dict[Line, float] = {}  # with the time by which it must be admitted
        self._refusals: list[str] = []
        self._selector = selectors.DefaultSelector()

    def gather(self) -> dict[int, Line]:
        """Wait for all others; return their connections by their numbers, and free the port.

        Raises:
            ValueError: if some did not come in time; names them, and those that were refused.
        """
        deadline = time.monotonic() + self._timeout
        with self._selector as selector, listening(self._address) as server:
            server.setblocking(False)
            selector.register(server, selectors.EVENT_READ)
            try:
                while len(self._admitted) < self._address.processes - 1:
                    now = time.monotonic()
                    if now >= deadline:
                        self._give_up()
                    for key, _ in selector.select(min([deadline, *self._pending.values()]) - now):
                        if key.data is None:
                            self._open(server)
                        elif key.data.sock.fileno() >= 0:  # not dropped meanwhile
                            self._hear(key.data)
                    for candidate, until in list(self._pending.items()):
                        if time.monotonic() >= until:
                            self._drop(candidate)
            finally:
                for candidate in list(self._pending):
                    self._drop(candidate)
        for line in self._admitted.values():
            line.sock.setblocking(True)
        for line in self._admitted.values():
            line.send(met=socket.gethostname())
        return self._admitted

    def _open(self, server: socket.socket) -> None:
        try:
            sock = server.accept()[0]
        except OSError:  # it is gone, or no file descriptor is free: go on with the next
            return
        if len(self._pending) >= MAX_PENDING:
            self._drop(next(iter(self._pending)))
        sock.setblocking(False)
        candidate = Line(sock)
        self._pending[candidate] = time.monotonic() + GREETING_SECONDS
        self._selector.register(sock, selectors.EVENT_READ, candidate)

    def _hear(self, line: Line) -> None:
        try:
            messages = line.receive(_LONGEST_GREETING)
        except NoMessageError:
            messages = None
        if line not in self._pending:  # an admitted one sends nothing more before all have met
            if messages != []:
                number = next(n for n, other in self._admitted.items() if other is line)
                del self._admitted[number]
                self._drop(line)
                self._note(f"{line.peer} connected and went away again")
            return
        if messages is None:
            self._drop(line)
        elif messages:
            self._admit(line, messages[0])

    def _admit(self, candidate: Line, said: dict[str, Any]) -> None:
        """Admit a connection, or refuse it and send it the reason."""
        kinds = {"hcp": str, "process": int, "processes": int, "secret": str}
        if said.keys() != kinds.keys() or any(type(said[k]) is not t for k, t in kinds.items()):
            self._drop(candidate)  # not a greeting
            return
        number, processes = said["process"], said["processes"]
        candidate.peer = f"process {printable(number, 20)} on {printable(said['hcp'], 64)}"
        theirs, ours = (text.encode(errors="replace") for text in (said["secret"], secret()))
        if not hmac.compare_digest(theirs, ours):
            self._refuse(candidate, f"{candidate.peer} has another {SECRET} than process 0")
            return
        before = self._admitted.get(number)
        if before is not None and before.is_over():
            self._hear(before)
            before = None
        fits = processes == self._address.processes and 0 < number < processes
        if before is not None or not fits:
            self._refuse(
                candidate,
                f"{candidate.peer} was started as number {printable(number, 20)} of "
                f"{printable(processes, 20)}, but this run has {self._address.processes} "
                "processes, each with a number of its own. Check --num-processes and --process-id",
            )
            return
        del self._pending[candidate]
        self._admitted[number] = candidate

    def _refuse(self, candidate: Line, why: str) -> None:
        candidate.send(refused=f"{why}.")
        self._drop(candidate)
        self._note(why)

    def _note(self, what: str) -> None:
        if what not in self._refusals and len(self._refusals) < SHOWN:
            self._refusals.append(what)
            _log.warning(f"{what}; waiting for the others.")

    def _drop(self, line: Line) -> None:
        self._pending.pop(line, None)
        self._selector.unregister(line.sock)
        line.sock.close()

    def _give_up(self) -> NoReturn:
        address = self._address
        absent = [str(p) for p in range(1, address.processes) if p not in self._admitted]
        here = ", ".join(line.peer for line in list(self._admitted.values())[:SHOWN])
        why = (
            f"process {some(absent, ', ', 'processes')} of {address.processes} did not come to "
            f"{address.coordinator} within {self._timeout:.0f} s"
            + (f" (here are process 0 on {socket.gethostname()}, {here})" if here else "")
            + ". Have they been started, can they reach this port, and is --num-processes right?"
            + "".join(f" {what}." for what in self._refusals)
        )
        for line in self._admitted.values():
            line.send(refused=why)
            line.sock.close()
        raise ValueError(why)


def join(address: Address, timeout: float) -> Line:
    """Wait until all processes have connected to process 0; return the connection to it.

    Args:
        address: of this process, which is not process 0.
        timeout: seconds to wait.

    Raises:
        ValueError: if process 0 cannot be reached, goes away, or refuses this process.
    """
    deadline = time.monotonic() + timeout
    met_once = False
    while True:
        line = _connect(address, timeout, deadline, patient=not met_once)
        met_once = True
        line.send(
            hcp=socket.gethostname(),
            process=address.process,
            processes=address.processes,
            secret=secret(),
        )
        # Process 0 gives up first, and sends the reason.
        try:
            answer = _first(line, deadline + 10)
        except NoMessageError:
            line.sock.close()
            raise ValueError(
                f"the server at {address.coordinator} is no run's process 0; is the port right?"
            ) from None
        if isinstance(answer.get("met"), str):
            line.sock.settimeout(None)
            line.peer = f"process 0 on {printable(answer['met'], 64)}"
            return line
        line.sock.close()
        if "refused" in answer:
            raise ValueError(printable(answer["refused"], 2000))
        # Process 0 dropped this connection for others, or restarts: try again if it is there.
        if time.monotonic() > deadline:
            raise ValueError(_gone(address))
        time.sleep(0.2)


def secret() -> str:
    """Return the secret of this run; empty if it has none."""
    return os.environ.get(SECRET, "")


def listening(address: Address) -> socket.socket:
    """Return a socket that listens at the coordinator's port."""
    host, more = address.bind_host, max(128, address.processes)
    try:
        if host:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            return socket.create_server((host, address.port), family=family, backlog=more)
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        return socket.create_server(
            ("", address.port), family=family, dualstack_ipv6=both, backlog=more
        )
    except OSError as error:
        raise ValueError(
            f"--coordinator: port {address.port} cannot be used here "
            f"({os.strerror(error.errno or 0)}); choose "
            "another one, the same for every process."
        ) from None


def some(names: list[str], between: str, what: str) -> str:
    """Return the first of many names, and how many more there are."""
    rest = len(names) - SHOWN
    return between.join(names[:SHOWN]) + (f" and {rest} more {what}" if rest > 0 else "")


def _connect(address: Address, timeout: float, deadline: float, patient: bool) -> Line:
    wait = 0.05
    while True:
        try:
            left = max(deadline - time.monotonic(), 1e-3)
            return Line(socket.create_connection((address.host, address.port), left))
        except OSError as error:
            failure = error.strerror or str(error)
        if not patient:
            raise ValueError(_gone(address))
        # Process 0 may not listen yet, or its host may not exist yet.
        wait = min(2 * wait, 2.0)
        if time.monotonic() + wait > deadline:
            raise ValueError(
                f"process {address.process} cannot reach the coordinator at {address.coordinator} "
                f"after {timeout:.0f} s ({failure}). Is process 0 running there, and can "
                "this host reach that port?"
            )
        time.sleep(wait)


def _gone(address: Address) -> str:
    return f"the coordinator at {address.coordinator} went away before all processes had come."


def _first(line: Line, deadline: float) -> dict[str, Any]:
    """Return the first message of a connection; empty if it ends before one comes."""
    while True:
        line.sock.settimeout(max(deadline - time.monotonic(), 1e-3))
        messages = line.receive()
        if messages is None:
            return {}
        if messages:
            return messages[0]
