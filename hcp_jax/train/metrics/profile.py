"""`hcp train --profile N`: a trace of some steps, by jax's own profiler.

The trace is a folder `profile` in the run folder. Perfetto opens its `*.trace.json.gz` as it is
(https://ui.perfetto.dev); `pip install xprof` and `xprof --logdir RUN/profile` show more, among it
which part of the program a kernel belongs to, by the names that the library gives them: `ring_hop`,
`exchange_heads`, `gather_kv`, `attend` and `attend_grads`.
"""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

SKIPPED = 5
"""Steps before the first that is traced, unless told otherwise: caches and clocks are cold."""


class ProfileSteps(NamedTuple):
    """Which steps are traced.

    Attributes:
        number: how many.
        first: the first; None: the one `SKIPPED` steps after the first of this part of the run.
    """

    number: int
    first: int | None = None


class Profiler:
    """Traces steps of a run; on the first of several processes only.

    Args:
        steps: which; None for none.
        start: the first step of this part of the run.
        end: the step behind the last one.
        folder: the run folder.

    Raises:
        ValueError: if these are not all steps that this part of the run makes.
    """

    def __init__(self, steps: ProfileSteps | None, start: int, end: int, folder: pathlib.Path):
        self._path = folder / "profile"
        self._running = False
        self._first, self._last = check_profile(steps, start, end)
        if jax.process_index() != 0:
            self._first = -1

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_) -> None:
        if self._running:
            jax.profiler.stop_trace()

    def make(self, step: int, function: Callable[..., tuple], state: Any, batch: Any) -> tuple:
        """Makes a step: `function(state, batch)`, within the trace if it is one of those traced."""
        if step == self._first:
            # So that nothing of the steps before is in the trace, and all of these steps is.
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
    """The first and the last step to trace; (-1, -1) for none.

    Raises:
        ValueError: if they are not all made between `start` and `end`.
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
