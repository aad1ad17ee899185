"""Exchange small messages between the processes of a run where a collective would not do.

A collective needs all processes. If one fails on its way there, the others wait for it for ever, or
enter another collective by mistake. Messages may carry errors; any thread can wait for one, with a
timeout; and a missing sender is identified. They are held by the key-value store through which
jax's processes find each other.
"""

import itertools
import json
import socket
import time
from typing import Any

import jax

from hcp_jax import compat

PATIENCE = 3600.0
"""Seconds to wait for a message: longer than anything that a process does before it sends one."""

_SLICE = 1.0  # seconds of waiting after which Ctrl-C is noticed


class RemoteError(RuntimeError):
    """An error of another process, with the text that it sent."""


class Messages:
    """Messages between all processes about one topic.

    All processes must make the same objects of a topic in the same order: the store counts them, so
    that a later one does not read what was meant for an earlier one.

    Args:
        topic: what the messages are about.
    """

    def __init__(self, topic: str):
        self._process, self._processes = jax.process_index(), jax.process_count()
        self._store = compat.key_value_store() if self._processes > 1 else None
        self._rounds = itertools.count()
        number = 0
        if self._store is not None:
            number = self._store.key_value_increment(f"hcp_jax/{topic}/made/{self._process}", 1)
        self._folder = f"hcp_jax/{topic}/{number}"

    def send(self, key: str, message: Any) -> None:
        """Send a message of plain values to all processes; once for each key."""
        if self._store is not None:
            self._store.key_value_set(self._path(key, self._process), json.dumps(message))

    def receive(self, key: str, process: int, seconds: float = PATIENCE) -> Any:
        """Return the message of another process; wait until it is sent.

        Raises:
            TimeoutError: if it has not been sent after `seconds`.
        """
        assert self._store is not None
        deadline = time.monotonic() + seconds
        while True:
            left = min(max(deadline - time.monotonic(), 0.001), _SLICE)
            try:
                path = self._path(key, process)
                return json.loads(self._store.blocking_key_value_get(path, int(1000 * left)))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
            if time.monotonic() >= deadline:
                raise TimeoutError(
                    f"process {process} has not reported on {key} in {self._folder} within "
                    f"{seconds:.0f} s: it hangs"
                )

    def gather(self, message: Any) -> list[Any]:
        """Return the messages of all processes, by process; all of them must call this."""
        if self._store is None:
            return [message]
        number = next(self._rounds)
        self.send(f"round-{number}", message)
        found = [self.receive(f"round-{number}", process) for process in range(self._processes)]
        # All processes have reached this round, so that none still reads the one before.
        self.delete(f"round-{number - 1}")
        return found

    def first_error(self, error: Exception | None) -> str | None:
        """Return the error of the first process that has one, as text; None if there is none.

        All processes must call this.

        Args:
            error: what failed in this process; None if nothing did.
        """
        return next((text for text in self.gather(describe_error(error)) if text is not None), None)

    def delete(self, key: str) -> None:
        """Delete the messages of a key, which all processes have received."""
        if self._store is not None and self._process == 0:
            self._store.key_value_delete(f"{self._folder}/{key}/")

    def _path(self, key: str, process: int) -> str:
        return f"{self._folder}/{key}/{process}"


def describe_error(error: Exception | None) -> str | None:
    """Return an error in one line; with several processes, name the process and its host."""
    if error is None:
        return None
    first: BaseException = error
    while first.__cause__ is not None:  # What a library wraps around it is pages long.
        first = first.__cause__
    text = (" ".join(str(first).split()) or type(first).__name__)[:600]
    if jax.process_count() == 1 or isinstance(error, RemoteError):
        return text
    return f"process {jax.process_index()} on {socket.gethostname()}: {text}"
