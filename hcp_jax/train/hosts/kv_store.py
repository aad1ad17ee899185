"""What the processes of a run say to each other in words, where a collective would not do.

A collective is entered by all processes or by none: one that fails on its way there leaves the
others in it for ever, or lets them take part in another one by mistake. A word may be of an error,
is waited for in any thread and for a bounded time, and whose is missing is known. They are held by
the key-value store by which jax's processes find each other.
"""

import itertools
import json
import socket
import time
from typing import Any

import jax

from hcp_jax import compat

PATIENCE = 3600.0
"""Seconds to wait for a word: longer than anything that is done before one is said."""

_SLICE = 1.0  # seconds of waiting after which Ctrl-C is noticed


class ElsewhereError(RuntimeError):
    """An error of another process, in its words."""


class Words:
    """Words between all processes about one thing.

    All of them must make it, and those of other things, in the same order.

    Args:
        about: what they are about.
    """

    _made = itertools.count()

    def __init__(self, about: str):
        self._process, self._processes = jax.process_index(), jax.process_count()
        self._folder = f"hcp_jax/{about}/{next(Words._made)}"
        self._store = compat.key_value_store() if self._processes > 1 else None
        self._rounds = itertools.count()

    def say(self, key: str, word: Any) -> None:
        """Says a word, of plain values; once for each key."""
        if self._store is not None:
            self._store.key_value_set(self._path(key, self._process), json.dumps(word))

    def hear(self, key: str, process: int, seconds: float = PATIENCE) -> Any:
        """The word of another process, once it is said.

        Raises:
            TimeoutError: if it has not been said after so many seconds.
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
                    f"process {process} has not said how it went with {key} in {self._folder} "
                    f"within {seconds:.0f} s: it hangs"
                )

    def of_all(self, word: Any) -> list[Any]:
        """The words of all processes; each says its own, in the same place of the program."""
        if self._store is None:
            return [word]
        number = next(self._rounds)
        self.say(f"round-{number}", word)
        words = [self.hear(f"round-{number}", process) for process in range(self._processes)]
        # All have come to this round: nobody listens to the one before any more.
        self.forget(f"round-{number - 1}")
        return words

    def error_of_any(self, error: Exception | None) -> str | None:
        """What went wrong in the first process in which something did; None if all is well."""
        return next((word for word in self.of_all(in_words(error)) if word is not None), None)

    def forget(self, key: str) -> None:
        """Removes what all have heard."""
        if self._store is not None and self._process == 0:
            self._store.key_value_delete(f"{self._folder}/{key}/")

    def _path(self, key: str, process: int) -> str:
        return f"{self._folder}/{key}/{process}"


def in_words(error: Exception | None) -> str | None:
    """An error in a line; with the process and host that it is of, where there are several."""
    if error is None:
        return None
    first: BaseException = error
    while first.__cause__ is not None:  # What a library wraps around it is pages long.
        first = first.__cause__
    said = (" ".join(str(first).split()) or type(first).__name__)[:600]
    if jax.process_count() == 1 or isinstance(error, ElsewhereError):
        return said
    return f"process {jax.process_index()} on {socket.gethostname()}: {said}"
