"""Draw pictures of runs from their records, for `hcp plot` and for run folders.

(`hcp_jax/plot.py` draws which tokens each device of a mesh holds and sees.)
"""

import argparse
import dataclasses
import itertools
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, MaxNLocator

from hcp_jax.base import reading, terminal
from hcp_jax.train.metrics import metrics

_INK, _PALE = "#11568c", "#9ec5e8"
_HELD_OUT = "#c2410c"
# Okabe and Ito's colours, which colour-blind people tell apart; without the yellow, on white.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_LOSS = "loss (nats per token)"
_MOST_CURVES = 6
_UNLABELLED = ("name", "run_dir", "log", "checkpoint")


@dataclasses.dataclass(frozen=True)
class Run:
    """The record of a run.

    Attributes:
        name: the name of its folder.
        config: values by dotted key, such as "model.num_layers".
        steps: the metrics of each step.
        evaluations: the results of each evaluation.
    """

    name: str
    config: dict[str, Any]
    steps: list[dict[str, float]]
    evaluations: list[dict[str, Any]]

    def column(self, name: str) -> Float[np.ndarray, "S"]:
        """Return a metric of all steps."""
        return np.asarray([line[name] for line in self.steps])


def run(args: argparse.Namespace) -> int:
    """Run `hcp plot`."""
    runs = [read_run(folder) for folder in args.runs]
    draw_runs(runs, args.against).savefig(args.out)
    terminal.say(args.out)
    return 0


def read_run(folder: pathlib.Path) -> Run:
    """Read a run folder.

    Raises:
        ValueError: if it is not a run folder, or has no steps.
    """
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} is no run folder: it has no config.yaml.")
    steps = metrics.read(folder)
    if not steps:
        raise ValueError(f"{folder} has no steps yet: there is nothing to draw.")
    config = reading.read_yaml(folder / "config.yaml")
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'config.yaml'} must hold keys and values.")
    return Run(folder.resolve().name, _flat(config), steps, metrics.read_evaluations(folder))


def draw_run(folder: pathlib.Path, title: str) -> list[pathlib.Path]:
    """Draw loss.png and, if the run has evaluated, eval_by_position.png into a run folder.

    Return their paths; none if the run has no steps yet.
    """
    steps, evaluations = metrics.read(folder), metrics.read_evaluations(folder)
    drawn = {}
    if steps:
        drawn["loss.png"] = draw_loss(steps, evaluations, title)
    if evaluations:
        drawn["eval_by_position.png"] = draw_by_position(evaluations, title)
    for name, figure in drawn.items():
        figure.savefig(folder / name)
    return [folder / name for name in drawn]


def draw_loss(
    steps: list[dict[str, float]], evaluations: list[dict[str, Any]], title: str
) -> Figure:
    """Draw the loss over the steps, its mean over about a fifteenth of them, and held-out loss."""
    step = np.asarray([line["step"] for line in steps])
    loss = np.asarray([line["loss"] for line in steps])
    smooth = running_mean(loss, len(loss) // 30)
    figure, (axes,) = _panels(1, title)
    axes.plot(step, loss, color=_PALE, linewidth=1, label="each step")
    axes.plot(step, smooth, color=_INK, linewidth=2, label="running mean")
    if evaluations:
        _held_out(axes, evaluations, None, fmt="o", color=_HELD_OUT, label="held out", zorder=3)
    _label(axes, "step", _LOSS)
    axes.legend(frameon=False, loc="upper right")
    _tag(axes, step[0], loss[0], offset=(6, 4))
    _tag(axes, step[-1], smooth[-1], offset=(4, 14) if evaluations else (7, -4))
    axes.margins(x=0.07)
    return figure


def draw_by_position(evaluations: list[dict[str, Any]], title: str) -> Figure:
    """Draw held-out loss over the position in the document, one curve per evaluation.

    Where later tokens are predicted no better than earlier ones, context is not used. The band is
    one standard error to each side of the last curve. The other curves have similar errors, mostly
    the same one, since all are of the same tokens: curves differ by far less than the band.
    """
    number = min(len(evaluations), _MOST_CURVES)
    chosen = np.linspace(0, len(evaluations) - 1, number).round().astype(int)
    shown = [evaluations[i] for i in chosen]
    figure, (axes,) = _panels(1, title)
    shades = colormaps["viridis_r"](np.linspace(0.12, 1.0, number))
    for evaluation, shade in zip(shown, shades, strict=True):
        x, loss, error = _by_position(evaluation)
        label = f"{evaluation['step']:,}"
        if evaluation is shown[0] and _dwarfs_the_others(shown):
            label += f" ({loss.mean():.1f}, above)"
            x, loss = x[:0], loss[:0]
        if evaluation is shown[-1]:
            band = loss - error, loss + error
            axes.fill_between(x, *band, color=shade, alpha=0.15, linewidth=0)
        axes.plot(x, loss, "o-", color=shade, linewidth=1.8, markersize=3.5, label=label)
    borders = shown[-1]["positions"]
    every = 1 if len(borders) <= 13 else 2
    axes.set_xticks(range(0, len(borders), every), [_short(b) for b in borders[::every]])
    axes.set_xlim(-0.2, len(borders) - 0.8)
    _label(axes, "tokens of the document before the one predicted", f"held-out {_LOSS}")
    axes.legend(
        title="steps", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), reverse=True
    )
    return figure


def draw_runs(runs: Sequence[Run], against: str = "step") -> Figure:
    """Draw the loss, the tokens per second and, if any, the held-out loss of several runs.

    The legend says how their configs differ.

    Args:
        runs: at least one.
        against: "step" or "tokens".
    """
    evaluated = [one for one in runs if one.evaluations]
    columns = 3 if evaluated else 2
    figure, panels = _panels(columns, "", legend_lines=len(runs))
    for one, colour, label in zip(runs, _colours(len(runs)), labels(runs), strict=True):
        x = one.column("step")
        if against == "tokens":
            x = np.cumsum(one.column("tokens"))
        width = len(x) // 30
        for axes, name in zip(panels, ("loss", "tokens_per_second"), strict=False):
            values = one.column(name)
            axes.plot(x, values, color=colour, linewidth=0.8, alpha=0.25)
            axes.plot(x, running_mean(values, width), color=colour, linewidth=1.8, label=label)
        if one.evaluations:
            x_by_step = None if against == "step" else np.concatenate([[0], x])
            _held_out(panels[2], one.evaluations, x_by_step, color=colour)
    x_label = {"step": "step", "tokens": "tokens"}[against]
    for axes, text in zip(panels, (_LOSS, "tokens per second", f"held-out {_LOSS}"), strict=False):
        _label(axes, x_label, text)
    for axes in panels:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    panels[1].set_ylim(bottom=0)
    panels[1].yaxis.set_major_formatter(EngFormatter(sep=""))
    handles, texts = panels[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower left", frameon=False, fontsize=9)
    return figure


def labels(runs: Sequence[Run]) -> list[str]:
    """Return a label for each run: its name, and the settings that differ between the runs."""
    keys = sorted(set(itertools.chain.from_iterable(one.config for one in runs)))
    values = {key: [str(one.config.get(key)) for one in runs] for key in keys}
    differing = {
        key: by_run
        for key, by_run in values.items()
        if len(set(by_run)) > 1 and key.split(".")[0] not in _UNLABELLED
    }
    told = [
        ", ".join(f"{_brief(key, differing)} {by_run[i]}" for key, by_run in differing.items())
        for i in range(len(runs))
    ]
    return [
        f"{one.name}: {text}" if text else one.name for one, text in zip(runs, told, strict=True)
    ]


def running_mean(values: Float[np.ndarray, "n"], width: int) -> Float[np.ndarray, "n"]:
    """Return for each value the mean of it and up to `width` values before and after it.

    Values that are not finite are left out.
    """
    finite = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(values.size)
    begin, end = np.maximum(index - width, 0), np.minimum(index + width + 1, values.size)
    with np.errstate(invalid="ignore"):
        return (total[end] - total[begin]) / (count[end] - count[begin])


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _brief(key: str, keys: Iterable[str]) -> str:
    """Return the last part of a key, or the whole key if another one ends in the same part."""
    last = key.rsplit(".", 1)[-1]
    return last if sum(other.rsplit(".", 1)[-1] == last for other in keys) == 1 else key


def _by_position(
    evaluation: dict[str, Any],
) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """Return the centres of the bins that have tokens, their losses and standard errors."""
    loss = np.asarray(evaluation["loss_by_position"], float)  # null becomes NaN
    error = np.nan_to_num(np.asarray(evaluation["stderr_by_position"], float))
    there = np.flatnonzero(np.isfinite(loss))
    return there + 0.5, loss[there], error[there]


def _dwarfs_the_others(evaluations: list[dict[str, Any]]) -> bool:
    """Return whether the first curve is so high (untrained) that the others would look flat."""
    first, *others = (_by_position(evaluation)[1] for evaluation in evaluations)
    if not others:
        return False
    top, bottom = max(map(np.max, others)), min(map(np.min, others))
    return bool(first.min() - top > 0.5 * (top - bottom))


def _held_out(
    axes: Axes,
    evaluations: list[dict[str, Any]],
    x_by_step: Float[np.ndarray, "n"] | None,
    fmt: str = "o-",
    **style: Any,
) -> None:
    """Draw held-out loss over each evaluation's steps, or over `x_by_step[steps]`."""
    steps = np.asarray([line["step"] for line in evaluations])
    x = steps if x_by_step is None else x_by_step[np.minimum(steps, x_by_step.size - 1)]
    loss = np.asarray([line["loss"] for line in evaluations], float)
    error = np.nan_to_num(np.asarray([line["stderr"] for line in evaluations], float))
    axes.errorbar(x, loss, error, fmt=fmt, markersize=4, linewidth=1.4, capsize=2.5, **style)


def _panels(columns: int, title: str, legend_lines: int = 0) -> tuple[Figure, list[Axes]]:
    # Not pyplot: it would keep the figure in process-wide state.
    size = (8, 4.5) if columns == 1 else (4.6 * columns, 3.6 + 0.22 * legend_lines)
    figure = Figure(figsize=size, dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.12))
    panels = list(figure.subplots(1, columns, squeeze=False)[0])
    if title:
        panels[0].set_title(title, loc="left", fontsize=12, fontweight="bold")
    return figure, panels


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set(xlabel=x, ylabel=y)
    if not axes.get_xticklabels() or x == "step":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _tag(axes: Axes, x: float, y: float, offset: tuple[int, int]) -> None:
    axes.annotate(f"{y:.2f}", (x, y), offset, textcoords="offset points", color=_INK)
    axes.plot([x], [y], "o", color=_INK, markersize=4)


def _colours(number: int) -> list[Any]:
    if number <= len(_COLOURS):
        return list(_COLOURS[:number])
    return list(colormaps["turbo"](np.linspace(0.05, 0.95, number)))


def _short(number: int) -> str:
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if number >= size and number % size == 0:
            return f"{number // size}{unit}"
    return str(number)
