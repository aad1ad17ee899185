"""Draw the ticks of a pipeline: stages × time, passes of microbatches in boxes."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from hcp_jax.dynamic.pipeline import Schedule, Work
from hcp_jax.viz import style


def draw_ticks(
    schedule: Schedule, times: Sequence[float] | Float[np.ndarray, "m"], names: Sequence[str]
) -> Figure:
    """Draw the ticks of a step as a Gantt chart.

    A box is a pass of a microbatch through a stage, with the microbatch's number (and the letter of
    the chunk, if stages have several): light for the forward pass, dark for the backward pass.
    White is waiting; vertical lines are between ticks.

    Args:
        schedule: from `make_schedule`, for m microbatches.
        times: seconds of each microbatch on one stage; a third of it is the forward pass.
        names: what gives each microbatch its colour, such as its grouping.

    >>> from hcp_jax.dynamic.pipeline import make_schedule
    >>> figure = draw_ticks(make_schedule(3, 2), [1.0, 1.0, 2.0], ["4", "2×2", "4"])
    >>> figure.axes[0].get_xlabel()
    'seconds'
    """
    figure = style.figure(14, 1.5 + 0.7 * schedule.num_stages)
    axes = figure.subplots()
    kinds = sorted(set(names))  # the same colours for the same names in another order
    colours = {
        kind: np.array(to_rgb(style.AREAS[i % len(style.AREAS)])) for i, kind in enumerate(kinds)
    }
    now = 0.0
    for tick in schedule.ticks:
        end = now
        for stage, passes in enumerate(zip(tick.forward, tick.backward, strict=True)):
            left = now
            for work, share, light in zip(passes, (1 / 3, 2 / 3), (0.6, 0.0), strict=True):
                if work is not None:
                    width = float(times[work.microbatch]) * share / schedule.virtual_stages
                    colour = colours[names[work.microbatch]]
                    _box(axes, left, width, stage, colour + (1 - colour) * light)
                    _label(axes, left + width / 2, stage, work, schedule.virtual_stages)
                    left += width
            end = max(end, left)
        now = end
        axes.axvline(now, color=style.GREY, linewidth=0.5, zorder=0)
    axes.set(xlim=(0, now), ylim=(schedule.num_stages, 0))
    stages = range(schedule.num_stages)
    axes.set_yticks([stage + 0.5 for stage in stages], [f"stage {stage}" for stage in stages])
    style.finish(axes, "seconds", "")
    boxes = [Patch(facecolor=tuple(colours[kind]), label=kind) for kind in kinds]
    figure.legend(handles=boxes, loc="outside upper center", ncols=len(kinds), frameon=False)
    return figure


def _box(axes: Axes, left: float, width: float, stage: int, colour: np.ndarray) -> None:
    box = Rectangle((left, stage + 0.08), width, 0.84, linewidth=0.5, edgecolor="black")
    box.set_facecolor(tuple(colour))
    axes.add_patch(box)


def _label(axes: Axes, middle: float, stage: int, work: Work, chunks: int) -> None:
    chunk = "" if chunks == 1 else chr(ord("a") + work.chunk % 26)
    text = f"{work.microbatch}{chunk}"
    axes.text(middle, stage + 0.5, text, ha="center", va="center", fontsize=8, clip_on=True)
