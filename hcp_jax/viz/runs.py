"""Draw runs from their records: loss, held-out loss by position, several runs side by side."""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from hcp_jax.base import reading, records
from hcp_jax.viz import style

_PALE = "#9ec5e8"
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

    >>> steps = [{"step": i, "loss": 3.0 - i, "tokens_per_second": 9.0} for i in range(3)]
    >>> run = Run("long-000", {"seq_len": 4096}, steps, evaluations=[])
    >>> run.column("loss").tolist(), run.counts.all()
    ([3.0, 2.0, 1.0], np.True_)
    """

    name: str
    config: dict[str, Any]
    steps: list[dict[str, float]]
    evaluations: list[dict[str, Any]]

    def column(self, name: str) -> Float[np.ndarray, "S"]:
        """Return a metric of all steps."""
        return np.asarray([line[name] for line in self.steps])

    @property
    def counts(self) -> Bool[np.ndarray, "S"]:
        """Whether a step counts in means of the loss: its loss is finite, its update was made."""
        skipped = [bool(line.get("skipped", 0)) for line in self.steps]
        return np.isfinite(self.column("loss")) & ~np.asarray(skipped, bool)


def read_run(folder: str | pathlib.Path) -> Run:
    """Read the record of a run from its folder.

    Raises:
        ValueError: if it is not a run folder, or has no steps.

    >>> read_run("no-such-folder")
    Traceback (most recent call last):
    ValueError: no-such-folder is no run folder: it has no config.yaml.
    """
    folder = pathlib.Path(folder)
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} is no run folder: it has no config.yaml.")
    steps = records.read(folder)
    if not steps:
        raise ValueError(f"{folder} has no steps yet: there is nothing to draw.")
    config = reading.read_yaml(folder / "config.yaml")
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'config.yaml'} must hold keys and values.")
    return Run(folder.resolve().name, _flat(config), steps, records.read_evaluations(folder))


def draw_run(folder: pathlib.Path, title: str) -> list[pathlib.Path]:
    """Draw loss.png and, if the run has evaluated, eval_by_position.png into a run folder.

    Return their paths; none if the run has no steps yet.
    """
    steps, evaluations = records.read(folder), records.read_evaluations(folder)
    drawn = {}
    if steps:
        drawn["loss.png"] = draw_loss(Run("", {}, steps, evaluations), title)
    if evaluations:
        drawn["eval_by_position.png"] = draw_by_position(evaluations, title)
    for name, figure in drawn.items():
        figure.savefig(folder / name, dpi=150)
    return [folder / name for name in drawn]


def draw_loss(one: Run, title: str = "") -> Figure:
    """Draw the loss over the steps, its mean over the last of them, and held-out loss.

    The last mean is the number that the console ends with.

    >>> steps = [{"step": i, "loss": 3.0 - i, "tokens_per_second": 9.0} for i in range(3)]
    >>> run = Run("long-000", {"seq_len": 4096}, steps, evaluations=[])
    >>> draw_loss(run, "a run").axes[0].get_xlabel()
    'step'
    """
    step, loss, counts = one.column("step"), one.column("loss"), one.counts
    width = records.averaged_steps(int(step[-1]) + 1)
    figure, (axes,) = _panels(1, title)
    axes.plot(step, loss, color=_PALE, linewidth=1, label="each step")
    if counts.any():
        label = f"mean of {width} steps, up to each"
        smooth = running_mean(loss[counts], width)
        axes.plot(step[counts], smooth, color=style.BLUE, linewidth=2, label=label)
        _tag(axes, step[counts][0], smooth[0], offset=(6, 4))
        _tag(axes, step[counts][-1], smooth[-1], offset=(4, 14) if one.evaluations else (7, -4))
    if one.evaluations:
        style_of = {"color": style.ORANGE, "label": "held out", "zorder": 3}
        _held_out(axes, one.evaluations, None, "s", **style_of)
    style.whole_ticks(axes)
    style.finish(axes, "step", _LOSS, grid=True)
    axes.legend(frameon=False, loc="upper right")
    axes.margins(x=0.09)
    return figure


def draw_by_position(evaluations: list[dict[str, Any]], title: str = "") -> Figure:
    """Draw held-out loss over the position in the document, one curve per evaluation.

    Where later tokens are predicted no better than earlier ones, context is not used. The band is
    one standard error to each side of the last curve. The other curves have similar errors, mostly
    the same one, since all are of the same tokens: curves differ by far less than the band.

    Args:
        evaluations: those of a run, as `read_run(folder).evaluations` has them.
        title: title of the picture.

    Raises:
        ValueError: if there are none.

    >>> line = {"step": 9, "positions": [0, 2, 4], "loss_by_position": [3.0, 2.0]}
    >>> figure = draw_by_position([line | {"stderr_by_position": [0.1, 0.1]}])
    >>> figure.axes[0].get_ylabel()
    'held-out loss (nats per token)'
    """
    if not evaluations:
        raise ValueError("there are no evaluations to draw; set eval.every in the config.")
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
    x_label = "tokens of the document before the one predicted"
    style.finish(axes, x_label, f"held-out {_LOSS}", grid=True)
    axes.legend(
        title="steps", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), reverse=True
    )
    return figure


def draw_runs(runs: Sequence[Run], against: str = "step") -> Figure:
    """Draw the loss, the tokens per second and, if any, the held-out loss of several runs.

    Thick lines are means over the last steps, which begin at the first value. The legend says how
    the configs differ.

    Args:
        runs: at least one.
        against: "step" or "tokens".

    >>> steps = [{"step": i, "loss": 3.0 - i, "tokens_per_second": 9.0} for i in range(3)]
    >>> run = Run("long-000", {"seq_len": 4096}, steps, evaluations=[])
    >>> [axes.get_ylabel() for axes in draw_runs([run]).axes]
    ['loss (nats per token)', 'tokens per second']
    """
    evaluated = [one for one in runs if one.evaluations]
    columns = 3 if evaluated else 2
    figure, panels = _panels(columns, "", legend_lines=len(runs))
    for one, colour, label in zip(runs, style.line_colours(len(runs)), labels(runs), strict=True):
        x = one.column("step")
        if against == "tokens":
            x = np.cumsum(one.column("tokens"))
        width = records.averaged_steps(len(x))
        for axes, name in zip(panels, ("loss", "tokens_per_second"), strict=False):
            values = one.column(name)
            of = one.counts if name == "loss" else np.full(len(x), True)
            smooth = running_mean(values[of], width)
            axes.plot(x, values, color=colour, linewidth=0.8, alpha=0.25)
            axes.plot(x[of], smooth, color=colour, linewidth=1.8, label=label)
        if one.evaluations:
            x_by_step = None if against == "step" else np.concatenate([[0], x])
            _held_out(panels[2], one.evaluations, x_by_step, color=colour)
    x_label = {"step": "step", "tokens": "tokens"}[against]
    for axes, text in zip(panels, (_LOSS, "tokens per second", f"held-out {_LOSS}"), strict=False):
        style.finish(axes, x_label, text, grid=True)
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
    """Return the mean of each value and the `width - 1` values before it, as far as there are.

    >>> running_mean(np.asarray([4.0, 2.0, 0.0]), 2).tolist()
    [4.0, 3.0, 1.0]
    """
    total = np.concatenate([[0.0], np.cumsum(values)])
    end = np.arange(1, values.size + 1)
    begin = np.maximum(end - width, 0)
    return (total[end] - total[begin]) / (end - begin)


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
    size = (8, 4.5) if columns == 1 else (4.6 * columns, 3.6 + 0.22 * legend_lines)
    figure = style.figure(*size)
    panels = list(figure.subplots(1, columns, squeeze=False)[0])
    if title:
        panels[0].set_title(title, loc="left", fontsize=12, fontweight="bold")
    return figure, panels


def _tag(axes: Axes, x: float, y: float, offset: tuple[int, int]) -> None:
    axes.annotate(f"{y:.3f}", (x, y), offset, textcoords="offset points", color=style.BLUE)
    axes.plot([x], [y], "o", color=style.BLUE, markersize=4)


def _short(number: int) -> str:
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if number >= size and number % size == 0:
            return f"{number // size}{unit}"
    return str(number)
