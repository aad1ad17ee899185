"""Work in a thread, so that Ctrl-C and SIGTERM find the main thread waiting.

Python runs signal handlers in the main thread, between any two instructions. While data are read
that is often inside a callback of the garbage collector (jax has one), and an exception that is
raised there is printed and lost. A main thread that only waits can be interrupted at any time.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class StoppedError(Exception):
    """Nobody waits for this work any more."""


class Work:
    """Tells work in a thread that it should end."""

    def __init__(self) -> None:
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Ask the work to end soon."""
        self._stopped.set()

    def through(self, items: Iterable[T]) -> Iterator[T]:
        """Yield items as long as the work is wanted.

        Raises:
            StoppedError: if it is not wanted any more.
        """
        for item in items:
            if self._stopped.is_set():
                raise StoppedError
            yield item


def in_background(work: Callable[[Work], T], poll_seconds: float = 0.1) -> T:
    """Return what `work` returns, called in a thread; raise what it raises.

    Args:
        work: called with what says that it should end: an exception, such as KeyboardInterrupt,
            that reaches the caller here does not wait for it.
        poll_seconds: how often to look whether it has ended; signals are handled in between.

    >>> in_background(lambda work: sum(work.through([1, 2])))
    3
    """
    if threading.current_thread() is not threading.main_thread():
        return work(Work())
    results: list[T] = []
    errors: list[BaseException] = []
    flag = Work()

    def run() -> None:
        try:
            results.append(work(flag))
        except BaseException as error:  # Raised again where it is waited for.
            errors.append(error)

    thread = threading.Thread(target=run, name="data", daemon=True)
    try:
        thread.start()
        while thread.is_alive():
            thread.join(poll_seconds)
    finally:
        flag.stop()
    if errors:
        raise errors[0]
    return results[0]
