"""The record of a run: a line for each step in metrics.jsonl, for each evaluation in eval.jsonl.

TensorBoard has the same numbers, and pictures are drawn from these files (`figures.py`). A run that
goes on from a checkpoint first forgets what came after it, so that the record has every step, and
every evaluation, exactly once.
"""

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from hcp_jax import reading

if TYPE_CHECKING:
    from hcp_jax.train.evaluation import Evaluation


class Recorder:
    """Writes the metrics of each step, and evaluations, to a run folder.

    Args:
        folder: the run folder.
        start: the first step that will be written; those from it on that are there are dropped, and
            evaluations after them.
        tensorboard: write TensorBoard events to `folder/tensorboard`.
    """

    def __init__(self, folder: pathlib.Path, start: int, tensorboard: bool):
        steps = [line for line in read(folder) if line["step"] < start]
        # The evaluation at `start` is of the very parameters that the run goes on from.
        evaluations = [line for line in read_evaluations(folder) if line["step"] <= start]
        self._evaluated = {line["step"] for line in evaluations}
        self._evaluations_path = folder / "eval.jsonl"
        if self._evaluations_path.exists():
            _rewrite(self._evaluations_path, evaluations)
        path = folder / "metrics.jsonl"
        _rewrite(path, steps)
        self._lines = path.open("a", buffering=1)
        self._board = _board(folder, start) if tensorboard else None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds one step; a line is on disk when this returns."""
        self._lines.write(json.dumps({"step": step, **metrics}) + "\n")
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)

    def write_evaluation(self, found: "Evaluation") -> None:
        """Adds an evaluation, unless it is there from before the run went on."""
        line = found.to_json()
        if found.step not in self._evaluated:
            self._evaluated.add(found.step)
            with self._evaluations_path.open("a") as lines:
                lines.write(_as_lines([line]))
        if self._board is None:
            return
        self._board.add_scalar("eval/loss", found.loss, found.step)
        for begin, loss in zip(line["positions"][:-1], line["loss_by_position"], strict=True):
            if loss is not None:
                self._board.add_scalar(f"eval_by_position/{begin:08}", loss, found.step)

    def close(self) -> None:
        """Flushes and closes the files."""
        self._lines.close()
        if self._board is not None:
            self._board.close()


def _board(folder: pathlib.Path, start: int) -> Any:
    # Imports torch where there is one: not before somebody wants it.
    import tensorboardX

    return tensorboardX.SummaryWriter(str(folder / "tensorboard"), purge_step=start)


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
    return [reading.parse_json(line, f"{path}:{n}") for n, line in enumerate(lines, 1)]


def _rewrite(path: pathlib.Path, lines: list[dict]) -> None:
    """At no moment may a process that is killed leave less than there was."""
    written = path.with_suffix(".tmp")
    written.write_text(_as_lines(lines))
    written.replace(path)


def _as_lines(records: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)
