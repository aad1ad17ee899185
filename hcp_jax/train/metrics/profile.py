"""Trace some steps of a run with jax's profiler (`hcp train --profile N`).

The trace is the folder `profile` in the run folder. Perfetto (https://ui.perfetto.dev) opens its
`*.trace.json.gz`; `pip install xprof` and `xprof --logdir RUN/profile` show more, such as the part
of the program that a kernel belongs to, by the library's scope names: `ring_hop`, `exchange_heads`,
`gather_kv`, `attend` and `attend_grads`.
"""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

SKIPPED = 5
"""Default number of steps before the first traced one: caches and clocks are cold."""


class ProfileSteps(NamedTuple):
    """The steps to trace.

    Attributes:
        number: how many.
        first: the first one; None: `SKIPPED` steps after the first of this part of the run.
    """

    number: int
    first: int | None = None


class Profiler:
    """Traces steps of a run, in process 0 only.

    Args:
        steps: the steps to trace; None for none.
        start: the first step of this part of the run.
        end: the step after the last one.
        folder: the run folder.

    Raises:
        ValueError: if this part of the run does not make all of these steps.
    """

    def __init__(self, steps: ProfileSteps | None, start: int, end: int, folder: pathlib.Path):
        self._path = folder / "profile"
        self._running = False
        self._first, self._last = check_profile(steps, start, end)
        if jax.process_index() != 0:
            self._first = -1

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: object) -> None:
        if self._running:
            jax.profiler.stop_trace()

    def make(
        self,
        step: int,
        function: Callable[[Any, Any], tuple[Any, dict[str, Any]]],
        state: Any,
        batch: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """Return `function(state, batch)`; trace it if `step` is one of the steps to trace."""
        if step == self._first:
            # Keep the steps before out of the trace.
            jax.block_until_ready(state)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every call in Python would hide what matters
            jax.profiler.start_trace(self._path, profiler_options=options)
            self._running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            made = function(state, batch)
        if self._running and step == self._last:
            jax.block_until_ready(made)
            jax.profiler.stop_trace()
            self._running = False
        return made


def check_profile(steps: ProfileSteps | None, start: int, end: int) -> tuple[int, int]:
    """Return the first and the last step to trace; (-1, -1) for none.

    Raises:
        ValueError: if they are not all in the range from `start` to `end - 1`.
    """
    if steps is None:
        return -1, -1
    first = start + SKIPPED if steps.first is None else steps.first
    last = first + steps.number - 1
    if steps.number < 1 or first < start or last >= end:
        raise ValueError(
            f"--profile {steps.number} from step {first} on: this run makes steps {start} to "
            f"{end - 1}. Give fewer steps, or another --profile-from."
        )
    return first, last
