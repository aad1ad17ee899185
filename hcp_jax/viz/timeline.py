"""Draw a schedule: the work of the compute stream and of each link over time.

The upper panel shows the whole program; the lower one shows a part of its middle at a scale where
single transfers and the kernels that hide them are visible. Waiting time is hatched.
"""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from hcp_jax.compiled.clock import Schedule, Span
from hcp_jax.viz import style

_COLORS = {
    "attention": style.BLUE,
    "product": style.GREEN,
    "other": "#bbbbbb",
    "collective-permute": style.YELLOW_ORANGE,
    "all-to-all": style.PINK,
    "all-gather": style.SKY,
    "reduce-scatter": style.YELLOW,
    "all-reduce": "#666666",
}
_WORDS = {
    "attention": "attention kernels",
    "product": "matrix products",
    "other": "other kernels",
    "collective-permute": "ring (permute)",
}
_LANES = ("compute", "inside a host", "between hosts")
_ZOOM_TRANSFERS = 12


def draw_timeline(schedule: Schedule, title: str = "") -> Figure:
    """Draw the kernels and transfers of a program over time.

    Args:
        schedule: modelled times of a compiled program (`hcp audit`; `compiled.clock.simulate`).
        title: title of the picture.

    >>> from hcp_jax.compiled.clock import Schedule, Span
    >>> spans = (Span("compute", "attention", "attend", 0.0, 2e-3),)
    >>> draw_timeline(Schedule(spans, {}, {"attention": 2e-3}, 0.0, 2e-3)).axes[0].get_xlabel()
    'modelled ms, on one GPU'
    """
    figure = style.figure(13, 5.4)
    above, below = figure.subplots(2, 1)
    lanes = [name for name in _LANES if any(span.lane == name for span in schedule.spans)]
    last = max((span.end for span in schedule.spans), default=0.0)
    waits = waiting(schedule.spans)
    _lanes(above, schedule.spans, waits, lanes, (0.0, last))
    _lanes(below, schedule.spans, waits, lanes, zoom(schedule.spans))
    above.set_title(title, loc="left", size=11)
    below.set_title("part of it", loc="left", size=10)
    kinds = [kind for kind in _COLORS if any(span.kind == kind for span in schedule.spans)]
    entries = [Patch(color=_COLORS[kind], label=_WORDS.get(kind, kind)) for kind in kinds]
    entries.append(Patch(facecolor="none", edgecolor=style.WAITING, hatch="///", label="waiting"))
    figure.legend(handles=entries, loc="outside lower center", ncols=6, frameon=False)
    return figure


def waiting(spans: Sequence[Span]) -> list[tuple[float, float]]:
    """Return the gaps between consecutive kernels, in which the device waits."""
    computing = sorted((s for s in spans if s.lane == "compute"), key=lambda s: s.begin)
    gaps, now = [], 0.0
    for span in computing:
        if span.begin > now + 1e-9:
            gaps.append((now, span.begin))
        now = max(now, span.end)
    end = max((span.end for span in spans), default=0.0)
    return [*gaps, (now, end)] if end > now + 1e-9 else gaps


def zoom(spans: Sequence[Span]) -> tuple[float, float]:
    """Return begin and end of a part in the middle that contains a dozen transfers."""
    end = max((span.end for span in spans), default=0.0)
    moves = [s for s in spans if s.kind == "collective-permute"] or [
        s for s in spans if s.lane != "compute"
    ]
    if len(moves) <= _ZOOM_TRANSFERS:
        return 0.0, end
    first = (len(moves) - _ZOOM_TRANSFERS) // 2
    chosen = moves[first : first + _ZOOM_TRANSFERS]
    return chosen[0].begin, max(move.end for move in chosen)


def _lanes(
    axes: Axes,
    spans: Sequence[Span],
    waits: Sequence[tuple[float, float]],
    lanes: list[str],
    window: tuple[float, float],
) -> None:
    begin, end = window
    pixel = (end - begin) / 1200
    zoomed = begin > 0
    scale = 1e3 if end - begin < 10 else 1.0
    shown = [s for s in spans if s.end >= begin and s.begin <= end]
    for row, lane in enumerate(lanes):
        # Spans narrower than a pixel would appear at random: transfers get one pixel, kernels none.
        least = 0.0 if lane == "compute" else pixel
        for kind, color in _COLORS.items():
            bars = [
                (s.begin * scale, max(s.end - s.begin, least) * scale)
                for s in shown
                if s.lane == lane and s.kind == kind
            ]
            edge: dict[str, Any] = {"linewidth": 0.6 if zoomed else 0.0, "edgecolor": "white"}
            axes.broken_barh(bars, (row - 0.4, 0.8), facecolors=color, snap=False, **edge)
    if zoomed:
        _names(axes, shown, lanes, window, scale)
    gaps = [(a * scale, (b - a) * scale) for a, b in waits if b - a > pixel and a < end]
    axes.broken_barh(
        gaps, (-0.4, 0.8), facecolors="none", edgecolor=style.WAITING, hatch="///", lw=0.3
    )
    axes.set_yticks(range(len(lanes)), lanes)
    axes.set_ylim(len(lanes) - 0.5, -0.5)
    axes.set_xlim(begin * scale, end * scale)
    axes.set_xlabel(f"modelled {'ms' if scale == 1e3 else 's'}, on one GPU")
    axes.spines[["top", "right", "left"]].set_visible(False)


def _names(
    axes: Axes,
    spans: Sequence[Span],
    lanes: list[str],
    window: tuple[float, float],
    scale: float,
) -> None:
    begin, end = window
    for span in spans:
        left, right = max(span.begin, begin), min(span.end, end)
        if right - left > 0.05 * (end - begin):
            name = span.name if span.lane == "compute" else span.kind.split("-")[-1]
            at = ((left + right) / 2 * scale, lanes.index(span.lane))
            light = span.kind in ("other", "collective-permute", "all-gather", "reduce-scatter")
            ink = "black" if light else "white"
            axes.text(*at, name, ha="center", va="center", size=7, color=ink)
