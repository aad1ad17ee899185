"""Draw context parallelism: which device holds and sees which tokens, and how even the work is.

The pictures use the same intervals, layouts and counts of pairs as the library's computations.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hcp_jax.cost.pairs import chunk_pairs, pairs_by_hop
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.sequence.layout import global_index, runs_per_device
from hcp_jax.sequence.mask import Mask


def ring_pairs(cp: ContextParallel, mask: Mask, length: int) -> Int64[np.ndarray, "ring hops"]:
    """Count the visible (query, key) pairs of every ring rank at every hop.

    Args:
        cp: context with one comm type; without a ring, all devices count as one ring rank.
        mask: one row, in natural order.
        length: T, which must need no padding (`cp.padded_length(T) == T`).

    Raises:
        ValueError: if the length needs padding, or the mask has several rows.

    >>> from hcp_jax.sequence.mask import causal
    >>> from hcp_jax.parallel.mesh import make_mesh
    >>> cp = ContextParallel(make_mesh(cp_outer=4, cp_inner=2), comm_type="a2a+p2p")
    >>> ring_pairs(cp, causal(), 64)
    array([[136, 128, 128, 128],
           [136, 128, 128, 128],
           [136, 128, 128, 128],
           [136, 128, 128, 128]])
    """
    _require_whole(cp, length)
    strategy = cp.strategy
    ring = cp.axis_size(strategy.move) if strategy.by == "ring" else 1
    table = chunk_pairs(mask.intervals(length), runs_per_device(cp.layout) * cp.size)
    return pairs_by_hop(table, cp.size, cp.layout, ring)


def draw_mask(cps: Sequence[ContextParallel], mask: Mask, length: int) -> Figure:
    """Draw a mask in natural order, each query in the colour of the device that holds it.

    Args:
        cps: contexts, one panel for each; they may differ in their layout.
        mask: one row, in natural order.
        length: T, which must need no padding; small enough to draw (a few hundred tokens).
    """
    figure, panels = _panels(len(cps), 1, height=5.2)
    for cp, axes in zip(cps, panels[0], strict=True):
        _require_whole(cp, length)
        device = np.empty(length, int)
        device[global_index(length, cp.size, cp.layout)] = np.repeat(
            np.arange(cp.size), length // cp.size
        )
        start, end = (x[0][:, None] for x in mask.intervals(length))
        key = np.arange(length)
        colours = _colours(cp.size)[device]
        image = np.where(((key >= start) & (key < end))[..., None], colours[:, None], 1.0)
        axes.imshow(image, extent=(0, length, length, 0), interpolation="nearest")
        # Draw the stream along the top: which device holds each key.
        strip = axes.inset_axes((0, 1.02, 1, 0.045))
        strip.imshow(colours[None], extent=(0, length, 0, 1), aspect="auto")
        strip.set_axis_off()
        strip.set_title(f"{cp.layout}: device that holds each token", fontsize=11)
        axes.set(xlabel="key (global index)", ylabel="query (global index)")
    handles = [
        Patch(color=colour, label=f"{number}")
        for number, colour in enumerate(_colours(cps[0].size))
    ]
    figure.legend(
        handles=handles, title="device", loc="outside right center", frameon=False, fontsize=9
    )
    return figure


def draw_work(cps: Sequence[ContextParallel], mask: Mask, length: int) -> Figure:
    """Draw the visible pairs of every ring rank, stacked by hop, above those of the busiest rank.

    At every hop all ranks wait for the busiest one, so the sum of the lower bars is the compute
    time of the ring.

    Args:
        cps: contexts, one column for each.
        mask: one row, in natural order.
        length: T, which must need no padding.
    """
    figure, panels = _panels(len(cps), 2, height=5.6, sharey="row")
    for cp, above, below in zip(cps, *panels, strict=True):
        pairs = ring_pairs(cp, mask, length)
        ranks, hops = pairs.shape
        shades = colormaps["viridis"](np.linspace(0.1, 0.9, hops))
        bottom = np.cumsum(pairs, axis=1) - pairs
        for hop in range(hops):
            above.bar(
                range(ranks), pairs[:, hop], bottom=bottom[:, hop], color=shades[hop], label=hop
            )
        waits = pairs.max(axis=0)
        below.bar(range(hops), waits, color=shades)
        below.plot(range(hops), pairs.mean(axis=0), "k_", markersize=16, label="mean of all ranks")
        most, even = waits.sum(), pairs.sum() / ranks
        above.set_title(
            f"{cp.layout}: the ring takes {most / even:.2f} × the even share", fontsize=11
        )
        _label(above, "ring rank", "visible pairs")
        _label(below, "hop", "pairs of the busiest rank")
    panels[0][-1].legend(
        title="hop", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9
    )
    panels[1][-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9)
    return figure


def _require_whole(cp: ContextParallel, length: int) -> None:
    if length != cp.padded_length(length):
        raise ValueError(
            f"{length} tokens do not divide into a {cp.layout} layout over {cp.size} devices; draw "
            f"{cp.padded_length(length)}."
        )


def _panels(columns: int, rows: int, height: float, **options: Any) -> tuple[Figure, np.ndarray]:
    # The figure is created without pyplot, so no global state changes; notebooks still show it.
    figure = Figure(figsize=(5.0 * columns + 1.2, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _colours(devices: int) -> np.ndarray:
    """Return one RGB colour per device, as different as possible."""
    name = "Set2" if devices <= 8 else "hsv"
    chosen = np.arange(devices) if devices <= 8 else np.linspace(0, 0.95, devices)
    return colormaps[name](chosen)[:, :3]


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set(xlabel=x, ylabel=y)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.spines[["top", "right"]].set_visible(False)
