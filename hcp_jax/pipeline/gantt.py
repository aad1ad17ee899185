"""Draw the ticks of a pipeline: stages × time, one colour per grouping.

Only this module of the room imports matplotlib.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from hcp_jax.pipeline.schedule import Schedule, Work

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(
    schedule: Schedule,
    times: Sequence[float] | Float[np.ndarray, "m"],
    names: Sequence[str],
    axes: "Axes | None" = None,
) -> "Axes":
    """Draw the ticks of a step; return the axes.

    A box is a pass of a microbatch through a stage, with the microbatch's number: light for the
    forward pass and dark for the backward pass. White is waiting; vertical lines are between ticks.

    Args:
        schedule: from `make_schedule`, for m microbatches.
        times: seconds of each microbatch on one stage; a third of it is the forward pass.
        names: what gives each microbatch its colour, such as its grouping.
        axes: axes to draw on; a new figure if None.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    if axes is None:
        axes = Figure(
            figsize=(14, 0.9 + 0.6 * schedule.num_stages), layout="constrained"
        ).subplots()
    kinds = sorted(set(names), key=names.index)
    colours = {kind: colormaps["tab10"](i % 10) for i, kind in enumerate(kinds)}
    v = schedule.virtual_stages

    def box(work: Work | None, share: float, left: float, stage: int, alpha: float) -> float:
        if work is None:
            return 0.0
        width = float(times[work.microbatch]) * share / v
        style: dict[str, Any] = {
            "facecolor": colours[names[work.microbatch]],
            "alpha": alpha,
            "edgecolor": "black",
        }
        axes.add_patch(Rectangle((left, stage + 0.08), width, 0.84, linewidth=0.5, **style))
        text = str(work.microbatch) + (f"\n{'abcdefgh'[work.chunk % 8]}" if v > 1 else "")
        axes.text(left + width / 2, stage + 0.5, text, ha="center", va="center", fontsize=7)
        return width

    now = 0.0
    for tick in schedule.ticks:
        longest = 0.0
        for stage, (f, b) in enumerate(zip(tick.forward, tick.backward, strict=True)):
            width = box(f, 1 / 3, now, stage, 0.35)
            width += box(b, 2 / 3, now + width, stage, 0.85)
            longest = max(longest, width)
        now += longest
        axes.axvline(now, color="#999999", linewidth=0.5, zorder=0)
    axes.set_xlim(0, now)
    axes.set_ylim(schedule.num_stages, 0)
    axes.set_yticks(np.arange(schedule.num_stages) + 0.5)
    axes.set_yticklabels([f"stage {stage}" for stage in range(schedule.num_stages)])
    axes.set_xlabel("time")
    axes.legend(
        handles=[Patch(facecolor=colours[kind], label=kind) for kind in kinds],
        loc="upper center",
        bbox_to_anchor=(0.5, 1.18),
        ncols=len(kinds),
        frameon=False,
        fontsize=8,
    )
    return axes
