"""The processes of a run, known to each other before jax knows of them, and while it trains.

jax's own service ends every process when one is gone, but late (it counts missed heartbeats), by
an abort, and without naming it; what differs between hosts it cannot tell at all. So the processes
hold a connection each to process 0, a star, from the start of a run to its end:

    1. they meet at the coordinator's port, and whoever has not come in time is named; the port is
       then given to jax, the connections stay;
    2. they compare what must be the same everywhere, and each is told what differs;
    3. a connection that closes is a process that died, one that is silent is a host that is gone,
       and an error of one is told to all. Whichever comes first ends every process, each with a
       line that names the one it began with.

Nothing here authenticates: the port belongs inside the cluster's network, as jax's own does.
"""

import contextlib
import dataclasses
import json
import os
import queue
import selectors
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from hcp_jax import terminal

GONE = 75
"""Exit code of a process that ends because of another one (EX_TEMPFAIL: try again)."""

_LONGEST_GREETING = 2**14

_SHOWN = 8  # names, or differences, in one message


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


class _Line:
    """Messages over a connection: JSON, one a line."""

    def __init__(self, sock: socket.socket):
        self.sock = sock
        self.peer = "?"
        self.heard = time.monotonic()
        self._read = b""
        self._sending = threading.Lock()

    def send(self, **message: Any) -> None:
        """Sends; a peer that is gone is noticed where it is listened to."""
        with self._sending, contextlib.suppress(OSError):
            self.sock.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """What has come, after waiting for something; None at the end of the connection."""
        try:
            got = self.sock.recv(2**16)
        except OSError:
            got = b""
        if not got:
            return None
        self.heard = time.monotonic()
        *lines, self._read = (self._read + got).split(b"\n")
        return [json.loads(line) for line in lines]

    def first(self, deadline: float) -> dict[str, Any]:
        """The message that a connection begins with; empty if in time there is none of ours."""
        got = b""
        try:
            # Not a byte more: what follows is for the thread that watches.
            while not got.endswith(b"\n") and len(got) < _LONGEST_GREETING:
                self.sock.settimeout(max(deadline - time.monotonic(), 1e-3))
                byte = self.sock.recv(1)
                if not byte:
                    return {}
                got += byte
            self.sock.settimeout(None)
            message = json.loads(got)
        except (OSError, ValueError):
            return {}
        return message if isinstance(message, dict) else {}


class Peers:
    """This process's connections to the others; see the module.

    Args:
        place: where this process stands.
        timeout: seconds to wait for the others at the start.
        silence: seconds without a sign of life after which a process counts as gone.
    """

    def __init__(self, place: Place, timeout: float = 300.0, silence: float = 60.0):
        self.place, self._timeout, self._silence = place, timeout, silence
        self._lines: dict[int, _Line] = {}
        self._told = threading.Lock()
        self._closing = False
        self._inbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        # Wakes the thread that watches.
        self._wake, self._woken = socket.socketpair()
        self._watcher = threading.Thread(target=self._watch, name="peers", daemon=True)

    def meet(self) -> None:
        """Waits for all processes; from then on they watch each other, and the port is free again.

        Raises:
            ValueError: if some did not come in time, or came with wrong numbers; names them.
        """
        deadline = time.monotonic() + self._timeout
        if self.place.process == 0:
            self._gather(deadline)
        else:
            self._join(deadline)
        self._watcher.start()

    def agree(self, same: Mapping[str, Any]) -> None:
        """Compares what must be the same in every process; all of them must call this.

        Args:
            same: names, and plain values for JSON.

        Raises:
            ValueError: in every process, if something differs; says what it is where.
        """
        mine = json.loads(json.dumps(same))
        if self.place.process:
            self._lines[0].send(same=mine)
            differ = self._inbox.get()["differ"]
        else:
            differ = self._differences(mine)
            for line in self._lines.values():
                line.send(differ=differ)
        if differ:
            self._closing = True
            raise ValueError(
                f"the processes were started differently: {_some(differ, '; ', 'differences')}. "
                "Start all of them with the same config, data and versions."
            )

    def fail(self, error: str) -> None:
        """Tells the others that this process ends, and why; they end too."""
        with self._told:
            self._closing = True
            for line in self._lines.values():
                line.send(failed=error, process=self.place.process, host=socket.gethostname())
        self._let_others_hear()

    def wait_for_cause(self, seconds: float) -> None:
        """Lets the watch end this process, if an error here came of another one's death."""
        self._watcher.join(seconds)

    def close(self) -> None:
        """Says goodbye: from now on nobody here or there minds that this connection ends."""
        with self._told:
            self._closing = True
            for line in self._lines.values():
                line.send(done=True)
        self._wake.close()
        self._watcher.join()
        self._woken.close()
        for line in self._lines.values():
            line.sock.close()

    def _gather(self, deadline: float) -> None:
        """Process 0: all others come."""
        place = self.place
        with _listening(place) as server:
            while len(self._lines) < place.processes - 1:
                server.settimeout(max(deadline - time.monotonic(), 1e-3))
                try:
                    line = _Line(server.accept()[0])
                except TimeoutError:
                    self._refuse(self._missing())
                said = line.first(min(deadline, time.monotonic() + 10))
                if said.keys() != {"hcp", "process", "processes"}:
                    line.sock.close()  # a scanner, or one that has died again
                    continue
                process, processes = said["process"], said["processes"]
                line.peer = f"process {process} on {said['hcp']}"
                if processes != place.processes or process in (0, *self._lines):
                    self._lines[-1] = line
                    self._refuse(
                        f"{line.peer} was started as number {process} of {processes}, but this run "
                        f"has {place.processes} processes, each with a number of its own. Check "
                        "--num-processes and --process-id."
                    )
                self._lines[process] = line
        for line in self._lines.values():
            line.send(met=socket.gethostname())

    def _differences(self, mine: dict[str, Any]) -> list[str]:
        theirs = dict(self._inbox.get()["of"] for _ in self._lines)
        return [
            f"{key} is {_short(same.get(key))} in {self._lines[process].peer} and "
            f"{_short(mine.get(key))} in process 0"
            for process, same in sorted(theirs.items())
            for key in dict.fromkeys([*mine, *same])
            if same.get(key) != mine.get(key)
        ]

    def _missing(self) -> str:
        absent = [str(p) for p in range(1, self.place.processes) if p not in self._lines]
        here = ", ".join(line.peer for line in list(self._lines.values())[:_SHOWN])
        return (
            f"process {_some(absent, ', ', 'processes')} of {self.place.processes} did not come to "
            f"{self.place.address} within {self._timeout:.0f} s"
            + (f" (here are process 0 on {socket.gethostname()}, {here})" if here else "")
            + ". Have they been started, can they reach this port, and is --num-processes right?"
        )

    def _refuse(self, why: str) -> None:
        for line in self._lines.values():
            line.send(refused=why)
            line.sock.close()
        raise ValueError(why)

    def _join(self, deadline: float) -> None:
        """Another process: finds process 0, and hears whether all is well."""
        place, wait, failure = self.place, 0.05, "no answer"
        while True:
            try:
                left = max(deadline - time.monotonic(), 1e-3)
                line = _Line(socket.create_connection((place.host, place.port), left))
                break
            except OSError as error:
                failure = error.strerror or str(error)
            # Process 0 may not have begun to listen, or its host not to exist.
            wait = min(2 * wait, 2.0)
            if time.monotonic() + wait > deadline:
                raise ValueError(
                    f"process {place.process} cannot reach the coordinator at {place.address} "
                    f"after {self._timeout:.0f} s ({failure}). Is process 0 running there, and can "
                    "this host reach that port?"
                ) from None
            time.sleep(wait)
        line.send(hcp=socket.gethostname(), process=place.process, processes=place.processes)
        # Process 0 gives up first and says why.
        answer = line.first(deadline + 10)
        if "met" not in answer:
            line.sock.close()
            gone = f"the coordinator at {place.address} went away before all processes had come."
            raise ValueError(answer.get("refused", gone))
        line.peer = f"process 0 on {answer['met']}"
        self._lines[0] = line

    def _watch(self) -> None:
        """The thread: signs of life to and fro, until one fails, dies or is silent."""
        every = self._silence / 4
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            for line in self._lines.values():
                selector.register(line.sock, selectors.EVENT_READ, line)
                line.heard = time.monotonic()
            sent = 0.0
            while len(selector.get_map()) > 1 and not self._closing:
                if time.monotonic() - sent >= every:
                    sent = time.monotonic()
                    for line in self._lines.values():
                        line.send(alive=True)
                for key, _ in selector.select(every):
                    if key.data is None:
                        return
                    if not self._listen(key.data):
                        selector.unregister(key.data.sock)
                for key in list(selector.get_map().values()):
                    silent = key.data and time.monotonic() - key.data.heard
                    if silent and silent > self._silence:
                        self._end(
                            f"{key.data.peer} has given no sign of life for {silent:.0f} s: it "
                            "hangs, or its host or the network is gone"
                        )

    def _listen(self, line: _Line) -> bool:
        """Takes in what has come; whether more may come."""
        got = line.receive()
        if got is None:
            self._end(f"{line.peer} died")
        for message in got or ():
            if "done" in message:
                return False
            if "failed" in message:
                origin = f"process {message['process']} on {message['host']}"
                self._end(f"{origin} stopped: {message['failed']}")
            if "end" in message:
                self._end(message["end"])
            if "same" in message:
                process = next(p for p, of in self._lines.items() if of is line)
                self._inbox.put({"of": (process, message["same"])})
            if "differ" in message:
                self._inbox.put(message)
        return True

    def _let_others_hear(self) -> None:
        """They must not learn of this end from that of jax's service, which only says 'leader'."""
        if self.place.process == 0:
            time.sleep(0.5)

    def _end(self, why: str) -> None:
        """Ends this process because of another one, and from process 0 all the others."""
        with self._told:
            if self._closing:
                return
            for line in self._lines.values():
                line.send(end=why)
            me = f"process {self.place.process} on {socket.gethostname()}"
            sys.stdout.flush()
            terminal.say_error(f"hcp: {why}; so {me} ends too.")
            self._let_others_hear()
            # Nothing else reaches the main thread while it waits for a collective.
            os._exit(GONE)


def _listening(place: Place) -> socket.socket:
    try:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        return socket.create_server(
            ("", place.port), family=family, dualstack_ipv6=both, backlog=place.processes
        )
    except OSError as error:
        raise ValueError(
            f"--coordinator: port {place.port} cannot be used here "
            f"({os.strerror(error.errno or 0)}); choose "
            "another one, the same for every process."
        ) from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _some(names: list[str], between: str, what: str) -> str:
    rest = len(names) - _SHOWN
    return between.join(names[:_SHOWN]) + (f" and {rest} more {what}" if rest > 0 else "")
