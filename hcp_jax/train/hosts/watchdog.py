"""Watch the processes of a run: end all of them, and name the cause, when one fails.

jax's own service ends every process when one is gone, but late (it counts missed heartbeats), by an
abort, and without naming the process; it does not compare what the hosts were started with. So each
process keeps a connection to process 0, a star, from the start of a run to its end:

    1. they meet at the coordinator's port (see `meeting`), and those that do not come in time are
       named; the port is then given to jax, and the connections stay;
    2. they compare what must be the same everywhere, and all report what differs;
    3. a connection that closes means that its process died, a silent one that its host is gone, and
       an error of one process is sent to all. The first of these ends every process, each with a
       line that names the process that failed first.

Without a secret (see `meeting`) nobody is authenticated: the port must be inside the cluster's
network, as jax's own port must in any case.
"""

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

from hcp_jax.base import terminal
from hcp_jax.base.terminal import printable
from hcp_jax.train.hosts import meeting
from hcp_jax.train.hosts.line import Line
from hcp_jax.train.hosts.meeting import Address

GONE = 75
"""Exit code of a process that ends because of another one (EX_TEMPFAIL: try again)."""


class Peers:
    """The connections of this process to the others; see the module.

    Args:
        address: of this process.
        timeout: seconds to wait for the others at the start.
        silence: seconds without a sign of life after which a process counts as gone.
    """

    def __init__(self, address: Address, timeout: float = 300.0, silence: float = 60.0):
        self.address, self._timeout, self._silence = address, timeout, silence
        self._lines: dict[int, Line] = {}
        self._told = threading.Lock()
        self._closing = False
        self._inbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        # Wakes the thread that watches.
        self._wake, self._woken = socket.socketpair()
        self._watcher = threading.Thread(target=self._watch, name="peers", daemon=True)

    def meet(self) -> None:
        """Wait for all processes; start to watch them, and free the port.

        Raises:
            ValueError: if some did not come in time, or came with wrong numbers; names them.
        """
        if self.address.process == 0:
            others = self.address.processes - 1
            if others:
                terminal.say_error(
                    f"hcp: process 0 on {socket.gethostname()} waits at "
                    f"{self.address.coordinator} for {others} other process"
                    f"{'es' * (others != 1)}, {self._timeout:.0f} s at most"
                )
            self._lines = meeting.Admission(self.address, self._timeout).gather()
        else:
            self._lines = {0: meeting.join(self.address, self._timeout)}
        self._watcher.start()

    def agree(self, same: Mapping[str, Any]) -> None:
        """Compare values that must be the same in every process; all of them must call this.

        Args:
            same: plain values for JSON, by their names.

        Raises:
            ValueError: in every process, if a value differs; names the value and the processes.
        """
        mine = json.loads(json.dumps(same))
        if self.address.process:
            self._lines[0].send(same=mine)
            differ = self._inbox.get()["differ"]
        else:
            differ = self._differences(mine)
            self._closing = bool(differ)  # From here on, others may end.
            for line in self._lines.values():
                line.send(differ=differ)
        if differ:
            raise ValueError(
                "the processes were started differently: "
                f"{meeting.some(differ, '; ', 'differences')}. Start all of them with the same "
                "config, data and versions."
            )

    def fail(self, error: str) -> None:
        """Tell the others that this process ends, and why; they end, too."""
        with self._told:
            self._closing = True
            for line in self._lines.values():
                line.send(failed=error, process=self.address.process, host=socket.gethostname())
        self._wait_for_delivery()

    def wait_for_cause(self, seconds: float) -> None:
        """Wait whether the watch ends this process because another one's death caused its error."""
        self._watcher.join(seconds)

    def close(self) -> None:
        """Tell the others that this process is done, and close the connections."""
        with self._told:
            self._closing = True
            for line in self._lines.values():
                line.send(done=True)
        self._wake.close()
        self._watcher.join()
        self._woken.close()
        for line in self._lines.values():
            line.sock.close()

    def _differences(self, mine: dict[str, Any]) -> list[str]:
        theirs = dict(self._inbox.get()["from"] for _ in self._lines)
        return [
            f"{key} is {_short(same.get(key))} in {self._lines[process].peer} and "
            f"{_short(mine.get(key))} in process 0"
            for process, same in sorted(theirs.items())
            for key in dict.fromkeys([*mine, *same])
            if same.get(key) != mine.get(key)
        ]

    def _watch(self) -> None:
        """Exchange signs of life until a process fails, dies or is silent; runs in a thread."""
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

    def _listen(self, line: Line) -> bool:
        """Act on the messages that have come; return whether more may come from there."""
        try:
            got = line.receive()
            if got is None:
                self._end(f"{line.peer} died")
                return False
            return all(self._take(line, message) for message in got)
        except (ValueError, KeyError, TypeError) as error:
            self._end(f"{line.peer} sent what is not a message of a run ({printable(error)})")
            return False

    def _take(self, line: Line, message: dict[str, Any]) -> bool:
        """Act on a message; return whether more may come from there."""
        if "done" in message:
            return False
        if "failed" in message:
            origin = f"process {message['process']} on {message['host']}"
            self._end(f"{origin} stopped: {message['failed']}")
        if "end" in message:
            self._end(str(message["end"]))
        if "same" in message:
            process = next(p for p, other in self._lines.items() if other is line)
            self._inbox.put({"from": (process, dict(message["same"]))})
        if "differ" in message:
            differ = list(map(str, message["differ"]))
            # Process 0 will end because of them; the main thread here must get to say why.
            self._closing = bool(differ)
            self._inbox.put({"differ": differ})
        return True

    def _wait_for_delivery(self) -> None:
        """Give the others time to read the reason before jax's service ends with this process.

        That service's own message only names the 'leader'.
        """
        if self.address.process == 0:
            time.sleep(0.5)

    def _end(self, why: str) -> None:
        """End this process because of another one; process 0 first tells all the others."""
        with self._told:
            if self._closing:
                return
            for line in self._lines.values():
                line.send(end=why)
            me = f"process {self.address.process} on {socket.gethostname()}"
            sys.stdout.flush()
            terminal.say_error(f"hcp: {why}; so {me} ends too.")
            self._wait_for_delivery()
            # The main thread cannot be interrupted while it waits for a collective.
            os._exit(GONE)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
