"""How the processes of a run meet: at the coordinator's port, where strangers may come, too.

Process 0 listens; the others come, say who they are, and are let in once all are there. Whatever
else comes to the port (a scanner, a process of another run, somebody who means harm) costs neither
time nor the run: all guests are heard at once, each says at most a few bytes within a few seconds,
so many and no more wait at one time, and whoever is not expected is sent away. Process 0 never ends
because of a guest; when its time is up, it says who did not come and who was sent away.

A secret in the environment variable `HCP_SECRET`, the same for all processes, keeps out whoever
does not know it (`hcp launch` makes one for each run). It is sent as it is: against those who read
the network's traffic it is no protection.
"""

import contextlib
import dataclasses
import hmac
import ipaddress
import json
import logging
import os
import selectors
import socket
import threading
import time
from typing import Any, NoReturn

from hcp_jax.base import reading
from hcp_jax.base.terminal import printable

SECRET = "HCP_SECRET"
"""The environment variable with what all processes of a run know, if anything."""

SHOWN = 8
"""Names, or differences, in one message."""

GUESTS = 64
"""Connections that may wait at one time to be known; the oldest makes room for the next."""

PATIENCE = 10.0
"""Seconds in which a guest must say who it is."""

_LONGEST_GREETING = 2**12
_LONGEST_MESSAGE = 2**24

_log = logging.getLogger("hcp_jax")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where this process stands among all.

    Attributes:
        address: host and port at which process 0 is found, and later jax's service.
        process: number of this process, from 0.
        processes: how many there are.
    """

    address: str
    process: int
    processes: int

    def __post_init__(self):
        host, _, port = self.address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise ValueError(
                f"--coordinator must be ADDRESS:PORT of process 0, such as 10.0.0.1:1234, got "
                f"{self.address!r}."
            )
        if not 0 <= self.process < self.processes:
            raise ValueError(
                f"--process-id {self.process}: the processes of {self.processes} count from 0 to "
                f"{self.processes - 1}."
            )

    @property
    def host(self) -> str:
        """The address without its port."""
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The port."""
        return int(self.address.rpartition(":")[2])

    @property
    def bind_host(self) -> str:
        """Return the one address that process 0 listens at; empty for all of the host's.

        It is the coordinator's own address if that is a number (or localhost) and one of this
        host's. What a name stands for may differ from host to host.
        """
        host = "127.0.0.1" if self.host == "localhost" else self.host
        try:
            family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
            with socket.socket(family) as probe:
                probe.bind((host, 0))
        except (ValueError, OSError):
            return ""
        return host


class NoMessageError(ValueError):
    """What came over a connection is no message of a run."""


class Line:
    """Messages over a connection: JSON, one a line.

    Args:
        sock: the connection.

    Attributes:
        peer: who is at the other end, in words.
        heard: when it was last heard of.
    """

    def __init__(self, sock: socket.socket):
        self.sock = sock
        self.peer = "?"
        self.heard = time.monotonic()
        self._read = b""
        self._sending = threading.Lock()

    def send(self, **message: Any) -> None:
        """Send a message; that a peer is gone is noticed where it is listened to."""
        with self._sending, contextlib.suppress(OSError):
            self.sock.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, longest: int = _LONGEST_MESSAGE) -> list[dict[str, Any]] | None:
        """Return the messages that have come; None at the end of the connection.

        Raises:
            NoMessageError: if something else came, or a message of more than `longest` bytes.
        """
        try:
            got = self.sock.recv(2**16)
        except BlockingIOError:
            return []
        except OSError:
            got = b""
        if not got:
            return None
        self.heard = time.monotonic()
        *lines, self._read = (self._read + got).split(b"\n")
        if max(map(len, [*lines, self._read])) > longest:
            raise NoMessageError("a message that is too long")
        return [_message(line) for line in lines]

    def is_over(self) -> bool:
        """Return whether the other end has closed a connection that does not block."""
        try:
            return not self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True


def _message(line: bytes) -> dict[str, Any]:
    try:
        message = reading.parse_json(reading.decode(line, "the message"), "the message")
    except ValueError as error:
        raise NoMessageError(str(error)) from None
    if not isinstance(message, dict):
        raise NoMessageError("the message has no keys")
    return message


class Door:
    """Process 0: let in all other processes, and nobody else.

    Args:
        place: where this process stands.
        timeout: seconds to wait for the others.
    """

    def __init__(self, place: Place, timeout: float):
        self._place, self._timeout = place, timeout
        self._inside: dict[int, Line] = {}
        self._guests: dict[Line, float] = {}  # each with the time by which it must be known
        self._sent_away: list[str] = []
        self._selector = selectors.DefaultSelector()

    def gather(self) -> dict[int, Line]:
        """Return the connections to all others, by their numbers; the port is free again then.

        Raises:
            ValueError: if some did not come in time; names them, and those that were sent away.
        """
        deadline = time.monotonic() + self._timeout
        with self._selector as selector, listening(self._place) as server:
            server.setblocking(False)
            selector.register(server, selectors.EVENT_READ)
            try:
                while len(self._inside) < self._place.processes - 1:
                    now = time.monotonic()
                    if now >= deadline:
                        self._give_up()
                    for key, _ in selector.select(min([deadline, *self._guests.values()]) - now):
                        if key.data is None:
                            self._open(server)
                        elif key.data.sock.fileno() >= 0:  # it may just have been let go
                            self._hear(key.data)
                    for guest, until in list(self._guests.items()):
                        if time.monotonic() >= until:
                            self._let_go(guest)
            finally:
                for guest in list(self._guests):
                    self._let_go(guest)
        for line in self._inside.values():
            line.sock.setblocking(True)
        for line in self._inside.values():
            line.send(met=socket.gethostname())
        return self._inside

    def _open(self, server: socket.socket) -> None:
        try:
            sock = server.accept()[0]
        except OSError:  # gone again, or no file descriptor is free: the next one may do
            return
        if len(self._guests) >= GUESTS:
            self._let_go(next(iter(self._guests)))
        sock.setblocking(False)
        guest = Line(sock)
        self._guests[guest] = time.monotonic() + PATIENCE
        self._selector.register(sock, selectors.EVENT_READ, guest)

    def _hear(self, line: Line) -> None:
        try:
            messages = line.receive(_LONGEST_GREETING)
        except NoMessageError:
            messages = None
        if line not in self._guests:  # one that is inside says nothing more before all have met
            if messages != []:
                number = next(n for n, of in self._inside.items() if of is line)
                del self._inside[number]
                self._let_go(line)
                self._note(f"{line.peer} came and went again")
            return
        if messages is None:
            self._let_go(line)
        elif messages:
            self._admit(line, messages[0])

    def _admit(self, guest: Line, said: dict[str, Any]) -> None:
        """Let a guest in, or send it away with why."""
        kinds = {"hcp": str, "process": int, "processes": int, "secret": str}
        if said.keys() != kinds.keys() or any(type(said[k]) is not t for k, t in kinds.items()):
            self._let_go(guest)  # it speaks of something else
            return
        number, processes = said["process"], said["processes"]
        guest.peer = f"process {printable(number, 20)} on {printable(said['hcp'], 64)}"
        theirs, ours = (text.encode(errors="replace") for text in (said["secret"], secret()))
        if not hmac.compare_digest(theirs, ours):
            self._send_away(guest, f"{guest.peer} has another {SECRET} than process 0")
            return
        before = self._inside.get(number)
        if before is not None and before.is_over():
            self._hear(before)
            before = None
        fits = processes == self._place.processes and 0 < number < processes
        if before is not None or not fits:
            self._send_away(
                guest,
                f"{guest.peer} was started as number {printable(number, 20)} of "
                f"{printable(processes, 20)}, but this run has {self._place.processes} processes, "
                "each with a number of its own. Check --num-processes and --process-id",
            )
            return
        del self._guests[guest]
        self._inside[number] = guest

    def _send_away(self, guest: Line, why: str) -> None:
        guest.send(refused=f"{why}.")
        self._let_go(guest)
        self._note(why)

    def _note(self, what: str) -> None:
        if what not in self._sent_away and len(self._sent_away) < SHOWN:
            self._sent_away.append(what)
            _log.warning(f"{what}; waiting for the others.")

    def _let_go(self, line: Line) -> None:
        self._guests.pop(line, None)
        self._selector.unregister(line.sock)
        line.sock.close()

    def _give_up(self) -> NoReturn:
        place = self._place
        absent = [str(p) for p in range(1, place.processes) if p not in self._inside]
        here = ", ".join(line.peer for line in list(self._inside.values())[:SHOWN])
        why = (
            f"process {some(absent, ', ', 'processes')} of {place.processes} did not come to "
            f"{place.address} within {self._timeout:.0f} s"
            + (f" (here are process 0 on {socket.gethostname()}, {here})" if here else "")
            + ". Have they been started, can they reach this port, and is --num-processes right?"
            + "".join(f" {what}." for what in self._sent_away)
        )
        for line in self._inside.values():
            line.send(refused=why)
            line.sock.close()
        raise ValueError(why)


def join(place: Place, timeout: float) -> Line:
    """Return the connection to process 0, once all processes have come to it.

    Args:
        place: where this process stands; not process 0.
        timeout: seconds to wait.

    Raises:
        ValueError: if process 0 cannot be reached, goes away, or sends this process away.
    """
    deadline = time.monotonic() + timeout
    met_once = False
    while True:
        line = _connect(place, timeout, deadline, patient=not met_once)
        met_once = True
        line.send(
            hcp=socket.gethostname(),
            process=place.process,
            processes=place.processes,
            secret=secret(),
        )
        # Process 0 gives up first and says why.
        try:
            answer = _first(line, deadline + 10)
        except NoMessageError:
            line.sock.close()
            raise ValueError(
                f"what answers at {place.address} is no run's process 0; is the port right?"
            ) from None
        if isinstance(answer.get("met"), str):
            line.sock.settimeout(None)
            line.peer = f"process 0 on {printable(answer['met'], 64)}"
            return line
        line.sock.close()
        if "refused" in answer:
            raise ValueError(printable(answer["refused"], 2000))
        # It made room for others, or is being started again: once more, if somebody is there.
        if time.monotonic() > deadline:
            raise ValueError(_gone(place))
        time.sleep(0.2)


def secret() -> str:
    """Return what all processes of this run know; empty if they share nothing."""
    return os.environ.get(SECRET, "")


def listening(place: Place) -> socket.socket:
    """Return a socket that listens at the coordinator's port."""
    host, more = place.bind_host, max(128, place.processes)
    try:
        if host:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            return socket.create_server((host, place.port), family=family, backlog=more)
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        return socket.create_server(
            ("", place.port), family=family, dualstack_ipv6=both, backlog=more
        )
    except OSError as error:
        raise ValueError(
            f"--coordinator: port {place.port} cannot be used here "
            f"({os.strerror(error.errno or 0)}); choose "
            "another one, the same for every process."
        ) from None


def some(names: list[str], between: str, what: str) -> str:
    """Return the first of many names, and how many more there are."""
    rest = len(names) - SHOWN
    return between.join(names[:SHOWN]) + (f" and {rest} more {what}" if rest > 0 else "")


def _connect(place: Place, timeout: float, deadline: float, patient: bool) -> Line:
    wait = 0.05
    while True:
        try:
            left = max(deadline - time.monotonic(), 1e-3)
            return Line(socket.create_connection((place.host, place.port), left))
        except OSError as error:
            failure = error.strerror or str(error)
        if not patient:
            raise ValueError(_gone(place))
        # Process 0 may not have begun to listen, or its host not to exist.
        wait = min(2 * wait, 2.0)
        if time.monotonic() + wait > deadline:
            raise ValueError(
                f"process {place.process} cannot reach the coordinator at {place.address} "
                f"after {timeout:.0f} s ({failure}). Is process 0 running there, and can "
                "this host reach that port?"
            )
        time.sleep(wait)


def _gone(place: Place) -> str:
    return f"the coordinator at {place.address} went away before all processes had come."


def _first(line: Line, deadline: float) -> dict[str, Any]:
    """Return the first message of a connection; empty if it ends or there is none of ours."""
    while True:
        line.sock.settimeout(max(deadline - time.monotonic(), 1e-3))
        messages = line.receive()
        if messages is None:
            return {}
        if messages:
            return messages[0]
