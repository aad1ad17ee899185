"""Colours, figures and axes that all pictures share."""

from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

# Okabe and Ito's colours, which colour-blind people tell apart. Lines on white leave out the
# yellow; areas have grey in place of black, which would hide text.
BLUE, ORANGE, GREEN, PINK, YELLOW_ORANGE, SKY, YELLOW, BLACK, GREY = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442", "#000000"),
    "#999999",
)
LINES = (BLUE, ORANGE, GREEN, PINK, YELLOW_ORANGE, SKY, BLACK)
AREAS = (SKY, YELLOW_ORANGE, GREEN, YELLOW, BLUE, ORANGE, PINK, GREY)
WAITING = "#d55e00"


def figure(width: float, height: float) -> Figure:
    """Return an empty figure of so many inches.

    It is made without pyplot, which would keep it in process-wide state; notebooks still show it.
    """
    return Figure(figsize=(width, height), dpi=90, layout=ConstrainedLayoutEngine(w_pad=0.12))


def panels(
    columns: int, rows: int, width: float, height: float, **options: Any
) -> tuple[Figure, np.ndarray]:
    """Return a figure and its axes `[rows, columns]`; `width` is that of a column, in inches."""
    drawn = figure(width * columns + 1.2, height)
    return drawn, drawn.subplots(rows, columns, squeeze=False, **options)


def line_colours(number: int) -> list[Any]:
    """Return a colour for each of several curves."""
    if number <= len(LINES):
        return list(LINES[:number])
    return list(shades(number))


def device_colours(devices: int) -> np.ndarray:
    """Return an RGB colour per device; beyond eight devices they go from dark to light."""
    if devices <= len(AREAS):
        names = AREAS[:devices]
        return np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in names])
    return shades(devices)[:, :3]


def shades(number: int) -> np.ndarray:
    """Return colours from dark to light, for things that have an order."""
    return colormaps["viridis"](np.linspace(0.05, 0.95, number))


def ink_on(colour: Any) -> str:
    """Return "black" or "white", whichever can be read on a colour."""
    red, green, blue = colour[:3]
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


def finish(axes: Axes, x: str, y: str, *, grid: bool = False) -> None:
    """Label the axes, with whole numbers along x, and leave out the frame's upper right half."""
    axes.set(xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    if grid:
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)


def whole_ticks(axes: Axes) -> None:
    """Put ticks at whole numbers along x only."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def thousands(axes: Axes) -> None:
    """Write the numbers along y with separators."""
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
