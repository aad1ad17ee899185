"""The run folder: where a run's config, metrics, plot and checkpoints are, and how it is found.

It stands alone so that the loop says when something is kept, and this says what and where.
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
from hcp_jax.train.hosts.kv_store import Words
from hcp_jax.train.metrics import metrics
from hcp_jax.train.program import Program
from hcp_jax.train.step import TrainState

_log = logging.getLogger("hcp_jax")


class RunFolder:
    """Keeps what a run leaves in its folder: metrics, pictures and checkpoints.

    Args:
        config: the run; written down, so that the folder can be resumed without the file.
        path: the folder; it exists.
        start: the first step of this part of the run.
        title: of the pictures.
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
            goes_on = config.checkpoint.on_error == "continue"
            self._recorder = metrics.Recorder(path, start, config.log.tensorboard, goes_on)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, error: type[BaseException] | None, *_) -> None:
        if error is None:
            self._checkpoints.close()
        elif jax.process_count() == 1:
            # Of several, the others know nothing yet of an error here, and would not come.
            try:
                self._checkpoints.close()
            except OSError as also:
                _log.warning(str(also))
        if self._recorder is not None:
            self._recorder.close()
            from hcp_jax.train.metrics import figures  # matplotlib takes a second to import

            try:
                figures.draw_run(self.path, self._title)
            except OSError as also:  # the disk is full: the numbers are there, or are told of
                _log.warning(f"the pictures of {self.path} cannot be drawn: {also}")

    def record(self, step: int, values: dict[str, float]) -> None:
        """Writes the metrics of a step."""
        if self._recorder is not None:
            self._recorder.write(step, values)

    def record_evaluation(self, found: Evaluation) -> None:
        """Writes what an evaluation found."""
        if self._recorder is not None:
            self._recorder.write_evaluation(found)

    def latest_checkpoint(self) -> int | None:
        """The step of the newest whole checkpoint; None if there is none."""
        return self._checkpoints.latest()

    def save(self, done: int, state: TrainState, program: Program) -> None:
        """Begins to write a checkpoint."""
        self._checkpoints.save(done, state, program.data_state())

    def finish_saving(self) -> None:
        """Waits for the last checkpoint; raises what became of it."""
        self._checkpoints.finish()


def open_checkpoints(
    config: TrainConfig, folder: pathlib.Path, files: dict[str, Any] | None = None
) -> Checkpoints:
    """Open the checkpoints of a run of this config; its folder must be held (`lock.py`)."""
    model, run = settings.fixed_values(config.model), dataclasses.asdict(config)
    return Checkpoints(folder, model, config.checkpoint, run, files)


def has_checkpoint(folder: pathlib.Path) -> bool:
    """Say whether a run can go on from something, as the first process sees it."""
    return bool(Words("has checkpoint").of_all(sealed.steps(folder))[0])


def has_evaluation(folder: pathlib.Path, step: int) -> bool:
    """Say whether a run has evaluated after so many steps, as the first process sees it."""
    steps = [line["step"] for line in metrics.read_evaluations(folder)]
    return Words("has evaluation").of_all(step in steps)[0]


def make_new(config: TrainConfig) -> pathlib.Path:
    """`make_numbered` by the first process; all of them know it."""
    number = 0
    if jax.process_index() == 0:
        number = int(make_numbered(config).name.rpartition("-")[2])
    if jax.process_count() > 1:
        number = int(multihost_utils.broadcast_one_to_all(np.int32(number)))
    return _numbered(config, number)


def make_numbered(config: TrainConfig) -> pathlib.Path:
    """Makes `run_dir/name-001`, or with the first number after it that is free."""
    for number in itertools.count(1):
        with contextlib.suppress(FileExistsError):
            _numbered(config, number).mkdir(parents=True)
            break
    return _numbered(config, number)


def latest(run_dir: str) -> pathlib.Path:
    """Return the run with a checkpoint that was begun or resumed last.

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
