"""Handle Ctrl-C and SIGTERM as a request to stop after the current step, in all processes."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from hcp_jax.base import watch


class Signals:
    """Turns Ctrl-C and SIGTERM into a request to stop, once there are steps to save.

    Before `begin_steps`, the first signal ends the process at once: nothing is lost, and reading or
    compiling cannot be asked to stop. After it, the first signal is a request, and a second Ctrl-C
    ends the process at once.

    With several processes, all must stop after the same step: they pass the signal to jax's
    preemption service, which agrees on one.

    Args:
        end: ends the process, from any thread, whatever the main thread does; called with the
            signal, and whether steps have begun. If None, the first signal is always a request, and
            a second one raises KeyboardInterrupt: for programs that call `train` as a library.
    """

    def __init__(self, end: Callable[[int, bool], None] | None = None):
        self._end = end
        self._caught: int | None = None
        self._seen = 0
        self._asked = 0
        self._agreed: int | None = None
        self._stepping = end is None
        self._old: dict[int, Any] = {}
        self._watch = contextlib.ExitStack()

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            # Where there are several processes, jax listens for SIGTERM itself.
            for number in (signal.SIGINT, signal.SIGTERM)[: 1 if _are_several() else 2]:
                self._old[number] = signal.signal(number, self._catch)
            if self._end is not None:
                self._watch.enter_context(watch.signals_to(self._see))
        return self

    def __exit__(self, *_: object) -> None:
        self._watch.close()
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def begin_steps(self) -> None:
        """Treat signals as requests from now on: there are steps to save."""
        self._stepping = True

    def agreed(self) -> int | None:
        """Return the signal because of which all processes stop now; None if they go on.

        With several processes, all must call this equally often.
        """
        if not _are_several():
            return self._caught
        from jax.experimental import multihost_utils

        self._asked += 1
        if multihost_utils.reached_preemption_sync_point(self._asked):  # true once only
            self._agreed = self._caught or signal.SIGTERM
        return self._agreed

    def _see(self, number: int) -> None:
        """Note a signal, in the thread that watches."""
        if number not in self._old or self._end is None:
            return
        self._seen += number == signal.SIGINT or not self._stepping
        if not self._stepping or (self._seen > 1 and number == signal.SIGINT):
            self._end(number, self._stepping)

    def _catch(self, number: int, frame: Any) -> None:
        """Note a signal, in the main thread; do not raise if the watch sees signals, too."""
        if self._caught is not None:
            if self._end is None:
                raise KeyboardInterrupt
            return
        self._caught = number
        if _are_several() and number == signal.SIGINT:
            os.kill(os.getpid(), signal.SIGTERM)


def _are_several() -> bool:
    """Return whether this is one of several processes, without importing or starting jax."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()
