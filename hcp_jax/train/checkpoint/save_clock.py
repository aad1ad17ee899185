"""Decide in all processes alike when a checkpoint is due by time (`checkpoint.every_minutes`).

Clocks differ between processes, but all must save after the same step. So process 0 sends the
others how much time has passed, after steps that all of them know beforehand. At each of these
checks, the next one is set to the step at which half of the remaining time will be over. A check is
a message and no collective; an interval of 1000 steps has about ten.
"""

import time
from collections.abc import Callable

from hcp_jax.train.hosts.kv_store import Messages


class SaveClock:
    """Tells after which steps a checkpoint is due by time.

    Args:
        minutes: between two checkpoints; None: never due.
        start: steps done when the clock starts.
        now: the clock, in seconds.
    """

    def __init__(
        self, minutes: float | None, start: int, now: Callable[[], float] = time.monotonic
    ):
        self._seconds = None if minutes is None else 60.0 * minutes
        self._now = now
        self._messages = None if minutes is None else Messages("save_clock")
        self.saved(start)

    def saved(self, done: int) -> None:
        """Start the interval again: a checkpoint was written after `done` steps."""
        self._begin, self._since = self._now(), done
        self._next_check = done + 1

    def is_due(self, done: int) -> bool:
        """Return whether to save after `done` steps; call it after every step."""
        if self._seconds is None or self._messages is None or done < self._next_check:
            return False
        passed = self._messages.gather(self._now() - self._begin)[0]
        step_seconds = max(passed / max(done - self._since, 1), 1e-9)
        left = int((self._seconds - passed) / step_seconds)
        self._next_check = done + max(left // 2, 1)
        return left < 1
