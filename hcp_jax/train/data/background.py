"""Do work in a thread, so that Ctrl-C and SIGTERM can interrupt the main thread at any time.

Python runs signal handlers in the main thread, between any two instructions. While data are read,
that is often inside a callback of the garbage collector (jax has one), and an exception that is
raised there is printed and lost. A main thread that only waits can always be interrupted.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class StoppedError(Exception):
    """The work was stopped because its caller does not wait for it any more."""


class Work:
    """A flag that tells work in a thread to end."""

    def __init__(self) -> None:
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Ask the work to end soon."""
        self._stopped.set()

    def through(self, items: Iterable[T]) -> Iterator[T]:
        """Yield items until `stop` is called.

        Raises:
            StoppedError: if `stop` was called.
        """
        for item in items:
            if self._stopped.is_set():
                raise StoppedError
            yield item


def in_background(work: Callable[[Work], T], poll_seconds: float = 0.1) -> T:
    """Return what `work` returns, called in a thread; raise what it raises.

    Args:
        work: called with a flag that tells it to end. An exception in the calling thread, such as
            KeyboardInterrupt, sets the flag and does not wait for the work.
        poll_seconds: how often to check whether it has ended; signals are handled in between.

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
        except BaseException as error:  # Raised again in the thread that waits.
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
