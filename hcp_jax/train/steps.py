"""Make the steps of a run one after the other: measure, report, save and evaluate them.

The host is not on the critical path: a step is dispatched before the metrics of the one before are
fetched, while a thread prepares the next batch and a checkpoint is written.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import rich.console

from hcp_jax.base.records import averaged_steps
from hcp_jax.train.checkpoint.save_clock import SaveClock
from hcp_jax.train.config import TrainConfig
from hcp_jax.train.evaluation import Evaluator
from hcp_jax.train.folder import RunFolder
from hcp_jax.train.hosts.signals import Signals
from hcp_jax.train.long_run import LongRunAdvice
from hcp_jax.train.metrics.meter import Meter
from hcp_jax.train.metrics.profile import Profiler
from hcp_jax.train.metrics.progress import Progress
from hcp_jax.train.nonfinite import SkippedSteps
from hcp_jax.train.program import Program
from hcp_jax.train.step import TrainState


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        folder: its run folder.
        steps: number of optimizer steps done, over all parts of the run.
        stopped_by: the signal that ended it early; None if it made all its steps.
    """

    folder: pathlib.Path
    steps: int
    stopped_by: int | None = None


class _Made(NamedTuple):
    """A step that the devices may still be computing."""

    number: int
    metrics: dict[str, Any]
    documents: Sequence[int]


class Steps:
    """Makes the steps of one part of a run.

    Args:
        config: the run.
        program: makes steps and their batches.
        evaluator: evaluates; None if the run does not.
        run: writes metrics and checkpoints.
        console: where to print.
        profiler: traces some of the steps.
        meter: times all steps.
    """

    def __init__(
        self,
        config: TrainConfig,
        program: Program,
        evaluator: Evaluator | None,
        run: RunFolder,
        console: rich.console.Console,
        profiler: Profiler,
        meter: Meter,
    ):
        self._config, self._program, self._evaluator = config, program, evaluator
        self._run, self._console, self._profiler, self._meter = run, console, profiler, meter
        self._losses: list[float] = []
        self._advice = LongRunAdvice(config, self._print)
        self._skipped = SkippedSteps(config.optimizer.max_skipped, self._print)

    def make(self, state: TrainState, given: Signals | None = None) -> Outcome:
        """Make all remaining steps after `state`, or those until a signal comes.

        Args:
            state: the state of the model and the optimizer.
            given: the handler of signals; None: handle them here while steps are made.
        """
        config, program = self._config, self._program
        start = done = int(state.step)
        clock = SaveClock(config.checkpoint.every_minutes, start)
        with (
            Signals() if given is None else contextlib.nullcontext(given) as signals,
            Progress(self._console, config.steps, start, config.log.every) as progress,
        ):
            before: _Made | None = None
            due = False
            if config.eval.is_due(start, config.steps):
                self._evaluate(start, state, signals)
            signals.begin_steps()
            self._meter.start()
            while True:
                with self._meter.waiting():
                    batch = program.next_batch()
                state, metrics = self._profiler.make(done, program.step, state, batch)
                # The devices compute this step while the host reports the one before.
                if before is not None:
                    self._report(before, progress)
                before, done = _Made(done, metrics, batch.documents), done + 1
                stopped = signals.agreed()
                ends = stopped is not None or done == config.steps
                by_time = clock.is_due(done)  # called every time: all processes check together
                # A checkpoint that was due while steps were skipped stays due until it is saved.
                due = ends or due or by_time or config.checkpoint.is_due(done)
                evaluates = config.eval.is_due(done, config.steps) and stopped is None
                if due or evaluates:
                    # Lines about the steps before must be in the log before the checkpoint's.
                    self._report(before, progress)
                    before = None
                if due and self._skipped.allow_saving(done, ends, self._run.latest_checkpoint()):
                    self._run.save(done, state, program)
                    due = False
                    clock.saved(done)
                if evaluates and not self._evaluate(done, state, signals):
                    stopped, ends = signals.agreed(), True
                    # Save the steps since the last checkpoint.
                    if self._skipped.allow_saving(done, ends, self._run.latest_checkpoint()):
                        self._run.save(done, state, program)
                if ends:
                    break
            # Report the end of the run, and how to resume it, only after it is saved.
            self._run.finish_saving()
        self._conclude(start, done, progress.seconds)
        return Outcome(self._run.path, done, None if done == config.steps else stopped)

    def _report(self, made: _Made, progress: Progress) -> None:
        values = {name: float(value) for name, value in jax.device_get(made.metrics).items()}
        values |= self._meter.lap(values)
        progress.show(made.number, values)
        self._advice.note(progress.seconds, progress.left)
        self._run.record(made.number, values)
        self._skipped.note(made.number, values, made.documents, self._run.latest_checkpoint())
        if not values["skipped"]:
            self._losses.append(values["loss"])

    def _evaluate(self, done: int, state: TrainState, signals: Signals) -> bool:
        """Evaluate; return False if a signal stopped it between batches."""
        assert self._evaluator is not None
        with self._meter.paused():
            found = self._evaluator.evaluate(
                done, state.params, stops=lambda: signals.agreed() is not None
            )
            if found is None:
                self._print(f"evaluation after {done} steps: stopped by a signal")
                return False
            self._run.record_evaluation(found)
            self._print(str(found))
            return True

    def _conclude(self, start: int, done: int, seconds: float) -> None:
        path, losses = self._run.path, self._losses
        last = losses[-averaged_steps(done) :]  # what loss.png ends with
        learnt = (
            f"loss {losses[0]:.3f} at step {start}, {sum(last) / len(last):.3f} over the last "
            f"{len(last)} steps"
            if losses
            else "all of them skipped"
        )
        for line in self._program.summary():
            self._print(line)
        self._print(f"{done - start} steps in {seconds:.0f} s: {learnt}")
        if done < self._config.steps:
            go_on = f"Go on with:\n  hcp train --resume {path}"
            if self._run.latest_checkpoint() is None:
                go_on = "There is no checkpoint to go on from."
            self._print(f"Stopped after step {done} of {self._config.steps}. {go_on}")

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)
