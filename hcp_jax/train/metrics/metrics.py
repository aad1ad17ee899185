"""Write and read the record of a run: steps in metrics.jsonl, evaluations in eval.jsonl.

TensorBoard gets the same numbers, and pictures are drawn from these files (`viz/runs.py`). A
resumed run first removes the lines of steps after its checkpoint, so that the record has every
step, and every evaluation, exactly once.
"""

import collections
import contextlib
import errno
import json
import logging
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hcp_jax.base.records import read, read_evaluations
from hcp_jax.train.metrics.wandb import Wandb

if TYPE_CHECKING:
    from hcp_jax.train.evaluation import Evaluation

_log = logging.getLogger("hcp_jax")


class Recorder:
    """Writes the metrics of each step, and evaluations, to a run folder.

    Args:
        folder: the run folder.
        start: the first step that will be written; steps of the record from it on are removed, and
            evaluations after it.
        tensorboard: whether to write TensorBoard events to `folder/tensorboard`.
        go_on: if a number cannot be written (the disk is full), log a warning and leave it out; if
            False, raise the error.
        tracker: also gets every number (`wandb.Wandb`); None: nobody does.

    Raises:
        OSError: here, in `write` and in `write_evaluation`; names the file.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        start: int,
        tensorboard: bool,
        go_on: bool = False,
        tracker: Wandb | None = None,
    ):
        self._folder, self._go_on, self._tracker = folder, go_on, tracker
        self._missed: collections.Counter[pathlib.Path] = collections.Counter()
        steps = [line for line in read(folder) if line["step"] < start]
        # The evaluation at `start` has the parameters that the run resumes with.
        evaluations = [line for line in read_evaluations(folder) if line["step"] <= start]
        self._evaluated = {line["step"] for line in evaluations}
        self._evaluations_path = folder / "eval.jsonl"
        if self._evaluations_path.exists():
            _rewrite(self._evaluations_path, evaluations)
        self._steps_path = folder / "metrics.jsonl"
        _rewrite(self._steps_path, steps)
        self._board = None
        if tensorboard:
            with self._may_fail(folder / "tensorboard"):
                self._board = _board(folder, start)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the metrics of a step; they are on disk when this returns."""
        with self._may_fail(self._steps_path):
            _append(self._steps_path, {"step": step, **metrics})
        self._to_boards(step, metrics)

    def write_evaluation(self, found: "Evaluation") -> None:
        """Add an evaluation, unless the record has it from before the run was resumed."""
        line = found.to_json()
        if found.step not in self._evaluated:
            self._evaluated.add(found.step)
            with self._may_fail(self._evaluations_path):
                _append(self._evaluations_path, line)
        losses = zip(line["positions"][:-1], line["loss_by_position"], strict=True)
        bins = {f"eval_by_position/{begin:08}": x for begin, x in losses if x is not None}
        self._to_boards(found.step, {"eval/loss": found.loss, **bins})

    def close(self) -> None:
        """Close the files, and log what could not be written to them; raise nothing."""
        if self._board is not None:
            with contextlib.suppress(OSError):
                self._board.close()
        if self._tracker is not None:
            self._tracker.close()
        for path, number in self._missed.items():
            if number > 1:
                _log.warning(f"{path}: {number} writes failed; what they held is missing.")

    def _to_boards(self, step: int, values: Mapping[str, float]) -> None:
        if self._board is not None:
            with self._may_fail(self._folder / "tensorboard"):
                self._board.write(step, values)
        if self._tracker is not None:
            self._tracker.write(step, values)

    @contextlib.contextmanager
    def _may_fail(self, path: pathlib.Path) -> Iterator[None]:
        """Name the file in an error of the disk; raise it, or log it the first time and go on."""
        try:
            yield
        except OSError as error:
            if not self._folder.is_dir():
                raise FileNotFoundError(
                    f"the run folder {self._folder} is gone: it was deleted or renamed, or its "
                    "disk is gone. Training stops, since none of its results could be kept."
                ) from error
            why = f"{path} cannot be written ({error.strerror or error})"
            if not self._go_on:
                raise OSError(f"{why} (checkpoint.on_error: stop).") from error
            self._missed[path] += 1
            if self._missed[path] == 1:
                _log.warning(f"{why}. Training goes on (checkpoint.on_error: continue).")


def _board(folder: pathlib.Path, start: int) -> Any:
    # tensorboardX imports torch if it is installed: import it only when it is needed.
    from hcp_jax.train.metrics.board import Board

    return Board(folder / "tensorboard", start)


def _append(path: pathlib.Path, record: Mapping[str, Any]) -> None:
    """Add a line to a file; if it cannot be written whole, remove its part and raise OSError."""
    line = json.dumps(record).encode() + b"\n"
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(before)
            raise


def _rewrite(path: pathlib.Path, lines: list[dict[str, Any]]) -> None:
    """Replace a file at once, so that a process that is killed meanwhile loses nothing."""
    written = path.with_suffix(".tmp")
    written.write_text(_as_lines(lines))
    written.replace(path)


def _as_lines(records: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)
