"""What a run leaves behind for people: metrics.jsonl, TensorBoard events and a plot of the loss.

metrics.jsonl is the record, one line a step; the other two are drawn from it. A run that goes on
from a checkpoint first forgets the steps after it, so that the record has every step exactly once.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping

import numpy as np
import tensorboardX
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """How a run reports.

    Attributes:
        every: steps between two lines of output where that is no terminal (a terminal has a
            progress bar). metrics.jsonl and TensorBoard have every step.
        tensorboard: write TensorBoard events too.
    """

    every: int = 10
    tensorboard: bool = True

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"log.every must be at least 1, got {self.every}.")


class Recorder:
    """Writes the metrics of each step to a run folder.

    Args:
        folder: the run folder.
        start: the first step that will be written; those from it on that are there are dropped.
        tensorboard: write TensorBoard events to `folder/tensorboard`.
    """

    def __init__(self, folder: pathlib.Path, start: int, tensorboard: bool):
        self._path = folder / "metrics.jsonl"
        kept = [line for line in read(folder) if line["step"] < start]
        # At no moment may a process that is killed leave less than there was.
        rewritten = self._path.with_suffix(".tmp")
        rewritten.write_text("".join(json.dumps(line) + "\n" for line in kept))
        rewritten.replace(self._path)
        self._lines = self._path.open("a", buffering=1)
        self._board = (
            tensorboardX.SummaryWriter(str(folder / "tensorboard"), purge_step=start)
            if tensorboard
            else None
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds one step; a line is on disk when this returns."""
        self._lines.write(json.dumps({"step": step, **metrics}) + "\n")
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes the files."""
        self._lines.close()
        if self._board is not None:
            self._board.close()


def read(folder: pathlib.Path) -> list[dict[str, float]]:
    """The metrics of all steps of a run, in order; none if it has none.

    A last line that was cut off as a process died is left out.
    """
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def plot(folder: pathlib.Path, title: str) -> pathlib.Path | None:
    """Draws the loss of a run over its steps to `loss.png`; None where there is no step yet.

    The line is a mean over about a fifteenth of the run, drawn over the loss of each step.
    """
    records = read(folder)
    if not records:
        return None
    steps = np.asarray([r["step"] for r in records])
    loss = np.asarray([r["loss"] for r in records])
    smooth = _running_mean(loss, len(loss) // 30)

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, loss, color="#9ec5e8", linewidth=1, label="each step")
    axes.plot(steps, smooth, color="#11568c", linewidth=2, label="running mean")
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.05)
    axes.legend(frameon=False, loc="upper right")
    _tag(axes, steps[0], loss[0], offset=(6, 4))
    _tag(axes, steps[-1], smooth[-1], offset=(7, -4))
    path = folder / "loss.png"
    figure.savefig(path)
    return path


def _tag(axes, x: float, y: float, offset: tuple[int, int]) -> None:
    axes.annotate(f"{y:.2f}", (x, y), offset, textcoords="offset points", color="#11568c")
    axes.plot([x], [y], "o", color="#11568c", markersize=4)


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of the values up to `width` places before and after each (of fewer at the ends)."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(values.size)
    begin, end = np.maximum(place - width, 0), np.minimum(place + width + 1, values.size)
    return (total[end] - total[begin]) / (end - begin)
