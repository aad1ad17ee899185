"""Draw which device holds and sees which tokens, and how even the work is.

The pictures use the same intervals, layouts and counts of pairs as the library's computations.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from hcp_jax.cost.pairs import chunk_pairs, pairs_by_hop
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.sequence.layout import global_index, runs_per_device
from hcp_jax.sequence.mask import Mask
from hcp_jax.viz import style


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


def draw_layout(cps: ContextParallel | Sequence[ContextParallel], length: int) -> Figure:
    """Draw which device holds which tokens: a row per device, one panel per context.

    Args:
        cps: one context, or several; they may differ in their layout and number of devices.
        length: T, which must need no padding.

    Raises:
        ValueError: if the length needs padding.

    >>> import hcp_jax as hcp
    >>> cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=4, cp_inner=2))
    >>> hcp.viz.draw_layout([cp], 64).axes[0].get_title()
    'zigzag'
    """
    cps = _several(cps)
    figure, panels = style.panels(len(cps), 1, width=5.0, height=2.8)
    for cp, axes in zip(cps, panels[0], strict=True):
        held = _holders(cp, length)
        starts = np.flatnonzero(np.diff(held, prepend=-1))
        widths = np.diff(starts, append=length)
        colours = style.device_colours(cp.size)
        axes.barh(held[starts], widths, 0.85, left=starts, color=colours[held[starts]])
        for start, width in zip(starts, widths, strict=True):
            if len(starts) <= 32:
                ink = style.ink_on(colours[held[start]])
                at = start + width / 2, held[start]
                axes.text(*at, f"{held[start]}", ha="center", va="center", size=8, color=ink)
        axes.set_title(cp.layout, fontsize=11)
        axes.set_xlim(0, length)
        axes.set_ylim(cp.size - 0.5, -0.5)
        style.finish(axes, "token (global index)", "device")
    return figure


def draw_mask(cps: ContextParallel | Sequence[ContextParallel], mask: Mask, length: int) -> Figure:
    """Draw a mask in natural order, each query in the colour of the device that holds it.

    Args:
        cps: one context, or several of one size, which may differ in their layout.
        mask: one row, in natural order.
        length: T, which must need no padding; small enough to draw (a few hundred tokens).

    Raises:
        ValueError: if the length needs padding.

    >>> import hcp_jax as hcp
    >>> cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=4, cp_inner=2))
    >>> hcp.viz.draw_mask(cp, hcp.causal(), 64).axes[0].get_xlabel()
    'key (global index)'
    """
    cps = _several(cps)
    figure, panels = style.panels(len(cps), 1, width=5.0, height=5.2)
    for cp, axes in zip(cps, panels[0], strict=True):
        held = _holders(cp, length)
        start, end = (x[0][:, None] for x in mask.intervals(length))
        key = np.arange(length)
        colours = style.device_colours(cp.size)[held]
        image = np.where(((key >= start) & (key < end))[..., None], colours[:, None], 1.0)
        axes.imshow(image, extent=(0, length, length, 0), interpolation="nearest")
        _strip(axes, held, colours, cp.layout)
        axes.set(xlabel="key (global index)", ylabel="query (global index)")
    handles = [
        Patch(color=colour, label=f"{number}")
        for number, colour in enumerate(style.device_colours(cps[0].size))
    ]
    figure.legend(
        handles=handles, title="device", loc="outside right center", frameon=False, fontsize=9
    )
    return figure


def _holders(cp: ContextParallel, length: int) -> Int64[np.ndarray, "T"]:
    """Return the device that holds each token."""
    _require_whole(cp, length)
    device = np.empty(length, int)
    device[global_index(length, cp.size, cp.layout)] = np.repeat(
        np.arange(cp.size), length // cp.size
    )
    return device


def _strip(axes: Axes, held: np.ndarray, colours: np.ndarray, layout: str) -> None:
    """Draw the stream along the top: which device holds each key."""
    strip = axes.inset_axes((0, 1.02, 1, 0.045))
    strip.imshow(colours[None], extent=(0, held.size, 0, 1), aspect="auto")
    starts = np.flatnonzero(np.diff(held, prepend=-1))
    if len(starts) <= 32:
        for start, width in zip(starts, np.diff(starts, append=held.size), strict=True):
            at, ink = (start + width / 2, 0.45), style.ink_on(colours[start])
            strip.text(*at, f"{held[start]}", ha="center", va="center", size=7, color=ink)
    strip.set_axis_off()
    strip.set_title(f"{layout}: device that holds each token", fontsize=11)


def draw_work(cps: ContextParallel | Sequence[ContextParallel], mask: Mask, length: int) -> Figure:
    """Draw the visible pairs of every ring rank, stacked by hop, above those of the busiest rank.

    At every hop all ranks wait for the busiest one, so the sum of the lower bars is the compute
    time of the ring.

    Args:
        cps: one context, or several, with one comm type each.
        mask: one row, in natural order.
        length: T, which must need no padding.

    Raises:
        ValueError: if the length needs padding, or the mask has several rows.

    >>> import hcp_jax as hcp
    >>> cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=8))
    >>> hcp.viz.draw_work(cp, hcp.causal(), 64).axes[0].get_title()
    'zigzag: the ring takes 1.00 × the even share'
    """
    cps = _several(cps)
    figure, panels = style.panels(len(cps), 2, width=5.0, height=5.6, sharey="row")
    for cp, above, below in zip(cps, *panels, strict=True):
        pairs = ring_pairs(cp, mask, length)
        ranks, hops = pairs.shape
        shades = style.shades(hops)
        bottom = np.cumsum(pairs, axis=1) - pairs
        for hop in range(hops):
            above.bar(
                range(ranks), pairs[:, hop], bottom=bottom[:, hop], color=shades[hop], label=hop
            )
        waits = pairs.max(axis=0)
        below.bar(range(hops), waits, color=shades)
        below.plot(
            range(hops),
            pairs.mean(axis=0),
            "_",
            color=style.WAITING,
            markersize=16,
            mew=2,
            label="mean of all ranks",
        )
        most, even = waits.sum(), pairs.sum() / ranks
        above.set_title(
            f"{cp.layout}: the ring takes {most / even:.2f} × the even share", fontsize=11
        )
        for axes, x, y in (
            (above, "ring rank", "visible pairs"),
            (below, "hop", "pairs of the busiest rank"),
        ):
            style.finish(axes, x, y)
            style.whole_ticks(axes)
            style.thousands(axes)
    panels[0][-1].legend(
        title="hop", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9
    )
    panels[1][-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9)
    return figure


def _several(cps: ContextParallel | Sequence[ContextParallel]) -> list[ContextParallel]:
    found = [cps] if isinstance(cps, ContextParallel) else list(cps)
    if not found or not all(isinstance(cp, ContextParallel) for cp in found):
        raise ValueError(f"give a hcp_jax.ContextParallel, or a list of them, got {cps!r}.")
    return found


def _require_whole(cp: ContextParallel, length: int) -> None:
    if length != cp.padded_length(length):
        raise ValueError(
            f"{length} tokens do not divide into a {cp.layout} layout over {cp.size} devices; draw "
            f"{cp.padded_length(length)}."
        )
