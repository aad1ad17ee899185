"""The record of a run: a line for each step in metrics.jsonl, for each evaluation in eval.jsonl.

TensorBoard has the same numbers, and pictures are drawn from these files (`figures.py`). A run that
goes on from a checkpoint first forgets what came after it, so that the record has every step, and
every evaluation, exactly once.
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

from hcp_jax.base import reading
from hcp_jax.base.terminal import printable

if TYPE_CHECKING:
    from hcp_jax.train.evaluation import Evaluation

_log = logging.getLogger("hcp_jax")


class Recorder:
    """Writes the metrics of each step, and evaluations, to a run folder.

    Args:
        folder: the run folder.
        start: the first step that will be written; those from it on that are there are dropped, and
            evaluations after them.
        tensorboard: write TensorBoard events to `folder/tensorboard`.
        goes_on: whether a number that cannot be written (the disk is full) is told and left out;
            else it is an error.

    Raises:
        OSError: here and in `write` and `write_evaluation`; names the file.
    """

    def __init__(self, folder: pathlib.Path, start: int, tensorboard: bool, goes_on: bool = False):
        self._folder, self._goes_on = folder, goes_on
        self._missed: collections.Counter[pathlib.Path] = collections.Counter()
        steps = [line for line in read(folder) if line["step"] < start]
        # The evaluation at `start` is of the very parameters that the run goes on from.
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
        """Add one step; a line is on disk when this returns."""
        with self._may_fail(self._steps_path):
            _append(self._steps_path, {"step": step, **metrics})
        self._to_board(step, metrics)

    def write_evaluation(self, found: "Evaluation") -> None:
        """Add an evaluation, unless it is there from before the run went on."""
        line = found.to_json()
        if found.step not in self._evaluated:
            self._evaluated.add(found.step)
            with self._may_fail(self._evaluations_path):
                _append(self._evaluations_path, line)
        of_bins = zip(line["positions"][:-1], line["loss_by_position"], strict=True)
        bins = {f"eval_by_position/{begin:08}": x for begin, x in of_bins if x is not None}
        self._to_board(found.step, {"eval/loss": found.loss, **bins})

    def close(self) -> None:
        """Close the files, and tell what could not be written to them; nothing is raised."""
        if self._board is not None:
            with contextlib.suppress(OSError):
                self._board.close()
        for path, number in self._missed.items():
            if number > 1:
                _log.warning(f"{path} lacks what could not be written, {number} times.")

    def _to_board(self, step: int, values: Mapping[str, float]) -> None:
        if self._board is not None:
            with self._may_fail(self._folder / "tensorboard"):
                self._board.write(step, values)

    @contextlib.contextmanager
    def _may_fail(self, path: pathlib.Path) -> Iterator[None]:
        """Name the file in an error of the disk; raise it, or tell it the first time and go on."""
        try:
            yield
        except OSError as error:
            if not self._folder.is_dir():
                raise FileNotFoundError(
                    f"the run folder {self._folder} is gone: it was deleted or renamed, or its "
                    "disk went away. Training stops, since nothing of it could be kept."
                ) from error
            why = f"{path} cannot be written ({error.strerror or error})"
            if not self._goes_on:
                raise OSError(f"{why} (checkpoint.on_error: stop).") from error
            self._missed[path] += 1
            if self._missed[path] == 1:
                _log.warning(f"{why}. Training goes on (checkpoint.on_error: continue).")


def _board(folder: pathlib.Path, start: int) -> Any:
    # Imports torch where there is one: not before somebody wants it.
    from hcp_jax.train.metrics.board import Board

    return Board(folder / "tensorboard", start)


def _append(path: pathlib.Path, record: Mapping[str, Any]) -> None:
    """Add a line to a file, whole or not at all: a part of one would spoil the file."""
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


def read(folder: pathlib.Path) -> list[dict[str, float]]:
    """The metrics of all steps of a run, in order; none if it has none.

    A last line that was cut off as a process died is left out.
    """
    return _read_lines(folder / "metrics.jsonl")


def read_evaluations(folder: pathlib.Path) -> list[dict[str, Any]]:
    """All evaluations of a run, in order, as `Evaluation.to_json` makes them; likewise."""
    return _read_lines(folder / "eval.jsonl")


def _read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [_record(line, f"{path}:{n}") for n, line in enumerate(lines, 1)]


def _record(line: str, place: str) -> dict[str, Any]:
    values = reading.parse_json(line, place)
    if not isinstance(values, dict):
        raise ValueError(f"{place} must hold keys and values, got {type(values).__name__}.")
    for key in ("step", "loss"):
        if type(values.get(key)) not in (int, float):
            got = printable(repr(values.get(key)), 80)
            raise ValueError(f"{place}: {key} must be a number, got {got}.")
    return values


def _rewrite(path: pathlib.Path, lines: list[dict]) -> None:
    """At no moment may a process that is killed leave less than there was."""
    written = path.with_suffix(".tmp")
    written.write_text(_as_lines(lines))
    written.replace(path)


def _as_lines(records: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)
