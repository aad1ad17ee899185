"""Keep and find what a run writes: its config, metrics, pictures and checkpoints.

The loop decides when something is written; this module decides what is written, and where.
"""

import contextlib
import dataclasses
import itertools
import logging
import pathlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from hcp_jax.base import settings
from hcp_jax.train import config as configuration
from hcp_jax.train.checkpoint import sealed
from hcp_jax.train.checkpoint.manager import Checkpoints
from hcp_jax.train.config import TrainConfig
from hcp_jax.train.evaluation import Evaluation
from hcp_jax.train.hosts.kv_store import Messages
from hcp_jax.train.metrics import metrics
from hcp_jax.train.metrics.wandb import Wandb
from hcp_jax.train.program import Program
from hcp_jax.train.step import TrainState

_log = logging.getLogger("hcp_jax")


class RunFolder:
    """Writes the metrics, pictures and checkpoints of a run into its folder.

    Args:
        config: the run; it is written too, so that the run can be resumed from the folder alone.
        path: the folder; it exists.
        start: the first step of this part of the run.
        title: the title of the pictures.
        files: the fingerprint of the run's text (`data/fingerprint.py`), for its checkpoints.
    """

    def __init__(
        self,
        config: TrainConfig,
        path: pathlib.Path,
        start: int,
        title: str,
        files: dict[str, Any] | None = None,
    ):
        self.path, self._title = path, title
        self._checkpoints = open_checkpoints(config, path, files)
        self._recorder = None
        if jax.process_index() == 0:
            written = path / "config.yaml.tmp"
            written.write_text(configuration.dump(config))
            written.replace(path / "config.yaml")
            go_on = config.checkpoint.on_error == "continue"
            project = config.log.wandb
            tracker = (
                None if project is None else Wandb(project, path, configuration.flatten(config))
            )
            self._recorder = metrics.Recorder(path, start, config.log.tensorboard, go_on, tracker)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            self._checkpoints.close()
        elif jax.process_count() == 1:
            # With several processes, the others do not know of this error yet: closing, which
            # needs all of them, would hang.
            try:
                self._checkpoints.close()
            except OSError as also:
                _log.warning(str(also))
        if self._recorder is not None:
            self._recorder.close()
            from hcp_jax.viz import runs  # matplotlib takes a second to import

            try:
                runs.draw_run(self.path, self._title)
            except OSError as also:  # the disk is full; lost numbers have been reported
                _log.warning(f"the pictures of {self.path} cannot be drawn: {also}")

    def record(self, step: int, values: dict[str, float]) -> None:
        """Write the metrics of a step."""
        if self._recorder is not None:
            self._recorder.write(step, values)

    def record_evaluation(self, found: Evaluation) -> None:
        """Write the result of an evaluation."""
        if self._recorder is not None:
            self._recorder.write_evaluation(found)

    def latest_checkpoint(self) -> int | None:
        """Return the step of the newest whole checkpoint; None if there is none."""
        return self._checkpoints.latest()

    def save(self, done: int, state: TrainState, program: Program) -> None:
        """Begin to write a checkpoint after `done` steps."""
        self._checkpoints.save(done, program.form.give(state), program.data_state())

    def finish_saving(self) -> None:
        """Wait for the last checkpoint; raise the error if it could not be written."""
        self._checkpoints.finish()


def open_checkpoints(
    config: TrainConfig, folder: pathlib.Path, files: dict[str, Any] | None = None
) -> Checkpoints:
    """Open the checkpoints of a run of this config; its folder must be locked (`lock.py`)."""
    model, run = settings.fixed_values(config.model), dataclasses.asdict(config)
    return Checkpoints(folder, model, config.checkpoint, run, files)


def has_checkpoint(folder: pathlib.Path) -> bool:
    """Return whether process 0 sees a checkpoint in a run folder; all processes must call this."""
    return bool(Messages("has checkpoint").gather(sealed.steps(folder))[0])


def has_evaluation(folder: pathlib.Path, step: int) -> bool:
    """Return whether process 0 sees an evaluation after `step` steps; all must call this."""
    steps = [line["step"] for line in metrics.read_evaluations(folder)]
    return bool(Messages("has evaluation").gather(step in steps)[0])


def make_new(config: TrainConfig) -> pathlib.Path:
    """Make a new run folder in process 0; return it in all processes."""
    number = 0
    if jax.process_index() == 0:
        number = int(make_numbered(config).name.rpartition("-")[2])
    if jax.process_count() > 1:
        number = int(multihost_utils.broadcast_one_to_all(np.int32(number)))
    return _numbered(config, number)


def make_numbered(config: TrainConfig) -> pathlib.Path:
    """Make `run_dir/name-001`, or the one with the next free number, and return it."""
    for number in itertools.count(1):
        with contextlib.suppress(FileExistsError):
            _numbered(config, number).mkdir(parents=True)
            break
    return _numbered(config, number)


def latest(run_dir: str) -> pathlib.Path:
    """Return the folder of the run with a checkpoint that was started or resumed last.

    Raises:
        ValueError: if there are no runs, or none with a checkpoint.
    """
    runs = [path.parent for path in pathlib.Path(run_dir).glob("*/config.yaml")]
    if not runs:
        raise ValueError(f"--resume latest: there are no runs in {run_dir}.")
    saved = [run for run in runs if sealed.steps(run)]
    if not saved:
        raise ValueError(
            f"--resume latest: none of the {len(runs)} runs in {run_dir} has a checkpoint; begin "
            "a new one."
        )
    return max(saved, key=lambda run: (run / "config.yaml").stat().st_mtime)


def _numbered(config: TrainConfig, number: int) -> pathlib.Path:
    return pathlib.Path(config.run_dir, f"{config.name}-{number:03}")
