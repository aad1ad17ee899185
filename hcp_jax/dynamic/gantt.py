"""Draw a schedule: devices × time, one colour per document.

Only this module of the room imports matplotlib.
"""

import colorsys
from typing import TYPE_CHECKING, Any

from hcp_jax.sequence import groupings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from hcp_jax.dynamic.plan import Schedule

_GOLDEN = 0.618033988749895  # steps of it spread hues evenly, however many there are


def draw(plan: "Schedule", axes: "Axes | None" = None) -> "Axes":
    """Draw a schedule as a Gantt chart.

    A column is a microbatch, and a box is a document on the devices of its group. The boxes of a
    group follow each other in time, as if its documents were computed one after the other; the
    length of a box is the document's share of the group's tokens and attention. Light grey is
    computing padding, hatched boxes are transfers that attention does not hide, and white is
    waiting for a slower group.

    Args:
        plan: schedule to draw.
        axes: axes to draw on; a new figure of suitable size if None.
    """
    from matplotlib.collections import PolyCollection
    from matplotlib.figure import Figure

    if axes is None:
        axes = Figure(figsize=(14, 7), layout="constrained").subplots()
    boxes: dict[str, tuple[list, list]] = {kind: ([], []) for kind in ("document", "pad", "hop")}

    def box(kind: str, left: float, width: float, first: int, size: int, colour: object) -> None:
        if width > 0:
            corners = [(left, first), (left, first + size)]
            corners += [(left + width, first + size), (left + width, first)]
            boxes[kind][0].append(corners)
            boxes[kind][1].append(colour)

    now = 0.0
    seconds = plan.microbatch_seconds
    for mb, took in zip(plan.microbatches, seconds, strict=True):
        groups = plan.cost.groups(mb.grouping, plan.max_tokens_per_device)
        first = 0
        for group, held in zip(groups, mb.documents, strict=True):
            left = now
            pairs = used = 0.0
            for document in held:
                length = plan.lengths[document]
                pairs += group.pairs(length)
                used += length / group.size
                width = group.pairs(length) * group.work
                width += length / group.size * plan.cost.seconds_per_token
                box("document", left, width, first, group.size, _colour(document, length, plan))
                left += width
            padding = plan.max_tokens_per_device - used
            width = plan.cost.seconds_per_microbatch + padding * plan.cost.seconds_per_token
            box("pad", left, width, first, group.size, "#dddddd")
            width_hops = group.seconds(pairs) - pairs * group.work
            box("hop", left + width, width_hops, first, group.size, "#ffffff")
            first += group.size
        now += took

    edge: dict[str, Any] = {
        "edgecolors": "white",
        "linewidths": 0.3 if plan.num_devices <= 128 else 0.0,
    }
    for kind, style in (
        ("document", edge),
        ("pad", edge),
        ("hop", {"edgecolors": "#888888", "linewidths": 0.3, "hatch": "////"}),
    ):
        corners, colours = boxes[kind]
        axes.add_collection(PolyCollection(corners, facecolors=colours, **style))
    _finish(plan, axes, now, seconds)
    return axes


def save(plan: "Schedule", path: str, title: str = "") -> None:
    """Draw a schedule into a file (.png, .svg or .pdf)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 7), layout="constrained")
    draw(plan, figure.subplots())
    if title:
        figure.suptitle(title)
    figure.savefig(path, dpi=130)


def _colour(document: int, length: int, plan: "Schedule") -> tuple[float, float, float]:
    """Return the document's own hue; the longer the document, the stronger the colour."""
    longest, shortest = max(plan.lengths), min(plan.lengths)
    share = (length - shortest) / max(longest - shortest, 1)
    hue = document * _GOLDEN % 1.0
    return colorsys.hsv_to_rgb(hue, 0.35 + 0.5 * share**0.5, 0.95 - 0.25 * share**0.5)


def _finish(plan: "Schedule", axes: "Axes", now: float, seconds: tuple[float, ...]) -> None:
    from matplotlib.patches import Patch
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    left = 0.0
    for mb, took in zip(plan.microbatches, seconds, strict=True):
        axes.axvline(left + took, color="black", linewidth=0.8)
        if took >= 0.05 * now:  # about the width of the text
            label = groupings.describe(mb.grouping)
            axes.text(
                left + took / 2, -0.015 * plan.num_devices, label, ha="center", va="bottom", size=8
            )
        left += took
    axes.set_xlim(0, now or 1)
    axes.set_ylim(plan.num_devices, 0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{1e3 * x:g}"))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=9, steps=[1, 2, 4, 8, 10], integer=True))
    axes.set_xlabel("milliseconds, modelled, forward and backward")
    axes.set_ylabel("device")
    axes.legend(
        handles=[
            Patch(color=colorsys.hsv_to_rgb(0.55, 0.7, 0.75), label="a document"),
            Patch(color="#dddddd", label="fixed cost and padding"),
            Patch(facecolor="white", edgecolor="#888888", hatch="////", label="exposed transfers"),
            Patch(facecolor="white", edgecolor="black", label="waiting"),
        ],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.08),
        ncols=4,
        frameon=False,
    )
