"""Ctrl-C and SIGTERM as a wish to stop after the step in hand, in one process or in many."""

import os
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils


class Signals:
    """Turns Ctrl-C and SIGTERM into a wish to stop; a second Ctrl-C stops at once.

    Of several processes all must stop after the same step: they hand the signal to jax's preemption
    service, which agrees on one.
    """

    def __init__(self):
        self._caught: int | None = None
        self._old: dict[int, Any] = {}
        self._alone = jax.process_count() == 1

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            # jax listens for SIGTERM itself where there are several processes.
            for number in (signal.SIGINT, signal.SIGTERM)[: 2 if self._alone else 1]:
                self._old[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def agreed(self, step: int) -> int | None:
        """The signal after which all processes stop now, at `step`; None if they go on."""
        if self._alone:
            return self._caught
        if multihost_utils.reached_preemption_sync_point(step):
            return self._caught or signal.SIGTERM
        return None

    def _catch(self, number: int, frame: Any) -> None:
        if self._caught is not None:
            raise KeyboardInterrupt
        self._caught = number
        if not self._alone:
            os.kill(os.getpid(), signal.SIGTERM)
