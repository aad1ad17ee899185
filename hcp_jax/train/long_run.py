"""Warn about runs that will take long but save no checkpoints, or have no data of their own."""

from collections.abc import Callable

from hcp_jax.train.config import TrainConfig

LONG_SECONDS = 3600.0
"""A run is long if, by the speed of its first steps, it will take more than this."""

_ENOUGH = 30.0  # seconds of steps that are enough for an estimate


class LongRunAdvice:
    """Warns once, as soon as the first steps show that the run is long.

    Args:
        config: the run.
        say: called with each warning, one line.
    """

    def __init__(self, config: TrainConfig, say: Callable[[str], None]):
        self._say = say
        self._warnings: list[str] = []
        checkpoint = config.checkpoint
        if checkpoint.every is None and checkpoint.every_minutes is None:
            self._warnings.append(
                "it saves no checkpoint before its end. A crash loses all of it: stop it (Ctrl-C "
                "saves) and go on with --checkpoint.every_minutes 30, or --checkpoint.every STEPS."
            )
        if config.data.path is None:
            self._warnings.append(
                "it trains on the source files of Python's standard library, since data.path is "
                "not given: name a folder of text or tokens with --data.path."
            )

    def note(self, spent: float, left: float) -> None:
        """Warn if `spent` is enough for an estimate, and the run is long.

        Args:
            spent: seconds that the steps so far have taken.
            left: seconds that the remaining steps will take.
        """
        if not self._warnings or spent < _ENOUGH or spent + left < LONG_SECONDS:
            return
        hours = (spent + left) / 3600
        for warning in self._warnings:
            self._say(f"warning: this run will take about {hours:.1f} hours, and {warning}")
        self._warnings = []
