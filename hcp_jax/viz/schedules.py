"""Draw a schedule of dynamic context parallelism: devices × time, documents in boxes."""

from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from hcp_jax.dynamic.plan import Schedule
from hcp_jax.sequence import groupings
from hcp_jax.viz import style

_PADDING, _HATCH = "#dddddd", "#777777"
_EDGE: dict[str, Any] = {"edgecolors": "white"}
_TRANSFER: dict[str, Any] = {"edgecolors": _HATCH, "linewidths": 0.3, "hatch": "////"}


def draw_schedule(plan: Schedule, title: str = "") -> Figure:
    """Draw a schedule as a Gantt chart.

    A column is a microbatch, and a box is a document on the devices of its group; its colour is the
    document's length. The boxes of a group follow each other in time, as if its documents were
    computed one after the other; the length of a box is the document's share of the group's tokens
    and attention. Light grey is computing padding, hatched boxes are transfers that attention does
    not hide, and white is waiting for a slower group.

    Args:
        plan: schedule to draw.
        title: title of the picture.

    >>> import hcp_jax as hcp
    >>> plan = hcp.dynamic.schedule([3000, 700, 900], num_devices=4, max_tokens_per_device=1024)
    >>> hcp.viz.draw_schedule(plan).axes[0].get_ylabel()
    'device'
    """
    figure = style.figure(12, 6)
    axes = figure.subplots()
    norm = LogNorm(max(min(plan.lengths, default=1), 1), max(*plan.lengths, 2, 2))
    boxes: dict[str, list[list[tuple[float, float]]]] = {"document": [], "pad": [], "hop": []}
    lengths: list[int] = []
    now = 0.0
    for number, took in enumerate(plan.microbatch_seconds):
        lengths += _place(plan, number, now, boxes)
        now += took
    width = 0.6 if plan.num_devices <= 128 else 0.0
    colours = _colours()(norm(lengths)) if lengths else []
    axes.add_collection(
        PolyCollection(boxes["document"], facecolors=colours, linewidths=width, **_EDGE)
    )
    axes.add_collection(
        PolyCollection(boxes["pad"], facecolors=_PADDING, linewidths=width, **_EDGE)
    )
    axes.add_collection(PolyCollection(boxes["hop"], facecolors="white", **_TRANSFER))
    _finish(plan, axes, now)
    bar = figure.colorbar(ScalarMappable(norm, _colours()), ax=axes, pad=0.01, aspect=30)
    bar.set_label("a document of so many tokens")
    bar.ax.yaxis.set_major_locator(LogLocator(base=2, numticks=8))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if title:
        figure.suptitle(title)
    return figure


def _colours() -> Any:
    # From light to dark: long documents, which decide, stand out, also in grey print.
    return colormaps["viridis_r"]


def _place(
    plan: Schedule, number: int, now: float, boxes: dict[str, list[list[tuple[float, float]]]]
) -> list[int]:
    """Add the boxes of a microbatch that begins at `now`; return the lengths of its documents."""
    mb, first, placed = plan.microbatches[number], 0, []

    def box(kind: str, left: float, width: float, size: int) -> None:
        if width > 0:
            right, last = left + width, first + size
            boxes[kind].append([(left, first), (left, last), (right, last), (right, first)])

    groups = plan.cost.groups(mb.grouping, plan.max_tokens_per_device)
    for group, held in zip(groups, mb.documents, strict=True):
        left, pairs, used = now, 0.0, 0.0
        for length in (plan.lengths[document] for document in held):
            pairs += group.pairs(length)
            used += length / group.size
            width = group.pairs(length) * group.work
            width += length / group.size * plan.cost.seconds_per_token
            box("document", left, width, group.size)
            if width > 0:
                placed.append(length)
            left += width
        padding = plan.max_tokens_per_device - used
        width = plan.cost.seconds_per_microbatch + padding * plan.cost.seconds_per_token
        box("pad", left, width, group.size)
        box("hop", left + width, group.seconds(pairs) - pairs * group.work, group.size)
        first += group.size
    return placed


def _finish(plan: Schedule, axes: Axes, now: float) -> None:
    left = 0.0
    for mb, took in zip(plan.microbatches, plan.microbatch_seconds, strict=True):
        axes.axvline(left + took, color="black", linewidth=0.8)
        if took >= 0.05 * now:  # about the width of the text
            label = groupings.describe(mb.grouping)
            at = left + took / 2, -0.015 * plan.num_devices
            axes.text(*at, label, ha="center", va="bottom", size=8)
        left += took
    axes.set_xlim(0, now or 1)
    axes.set_ylim(plan.num_devices, 0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{1e3 * x:g}"))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=9, steps=[1, 2, 4, 8, 10], integer=True))
    axes.set_xlabel("milliseconds, modelled, forward and backward")
    axes.set_ylabel("device")
    axes.legend(
        handles=[
            Patch(color=_PADDING, label="fixed cost and padding"),
            Patch(facecolor="white", edgecolor=_HATCH, hatch="////", label="exposed transfers"),
            Patch(facecolor="white", edgecolor="black", label="waiting"),
            Patch(facecolor="none", edgecolor="none", label="above: size × number of groups"),
        ],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.09),
        ncols=4,
        frameon=False,
    )
