"""Draw what a device sends in a layer of attention, for each comm type."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from hcp_jax.cost.traffic import (
    EXCHANGE_HEADS,
    GATHER_KV,
    ITEM_BYTES,
    RING_HOP,
    Direction,
    layer_traffic,
    total,
)
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.viz import style

_KINDS = {
    EXCHANGE_HEADS: ("heads exchanged", style.SKY, ""),
    RING_HOP: ("K and V round the ring", style.ORANGE, "///"),
    GATHER_KV: ("K and V gathered", style.GREEN, "..."),
}

_PASSES: tuple[tuple[Direction, float, float], ...] = (
    ("forward", -0.2, 1.0),
    ("backward", 0.2, 0.6),
)


def draw_traffic(
    cps: Sequence[ContextParallel],
    tokens: int,
    *,
    heads: int,
    kv_heads: int,
    head_size: int,
    dtype: str = "bfloat16",
) -> Figure:
    """Draw the bytes that one device sends for one layer of attention, by comm type.

    They are counted by the list that the start-up log and `hcp plan` read (`cost.traffic`).

    Args:
        cps: contexts, each with one comm type and a mesh over the same number of devices.
        tokens: tokens of one stream, over all cp devices.
        heads: N, query heads of a device before the exchange.
        kv_heads: K, kv heads of a device before the exchange.
        head_size: H.
        dtype: of q, k and v, "bfloat16" or "float32".

    Raises:
        ValueError: if there are no contexts, or the dtype is another.

    >>> import hcp_jax as hcp
    >>> mesh = hcp.make_mesh(cp_outer=4, cp_inner=2)
    >>> cps = [hcp.ContextParallel(mesh, comm_type=kind) for kind in ("p2p", "a2a+p2p")]
    >>> figure = draw_traffic(cps, tokens=8192, heads=8, kv_heads=2, head_size=64)
    >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
    ['p2p', 'a2a+p2p']
    """
    if not cps:
        raise ValueError("draw_traffic needs at least one context.")
    if dtype not in ITEM_BYTES:
        raise ValueError(f"dtype must be one of {', '.join(ITEM_BYTES)}, got {dtype!r}.")
    figure = style.figure(7.5, 0.75 * len(cps) + 1.6)
    axes = figure.subplots()
    shown = set()
    for row, cp in enumerate(cps):
        moved = layer_traffic(
            cp.strategy,
            cp.mesh.shape,
            tokens=cp.padded_length(tokens) // cp.size,
            heads=heads,
            kv_heads=kv_heads,
            head_size=head_size,
            item_bytes=ITEM_BYTES[dtype],
        )
        for direction, offset, alpha in _PASSES:
            left = 0.0
            for scope, (_, colour, hatch) in _KINDS.items():
                mib = total(moved, (scope,), direction) / 2**20
                if not mib:
                    continue
                look: dict[str, Any] = {"color": colour, "hatch": hatch, "alpha": alpha}
                axes.barh(row + offset, mib, 0.36, left=left, edgecolor="white", **look)
                left += mib
                shown.add(scope)
            text = f" {left:,.{0 if left >= 100 else 2}f} MiB {direction}"
            axes.text(left, row + offset, text, va="center", size=8)
    axes.set_yticks(range(len(cps)), [str(cp.comm_type) for cp in cps])
    axes.invert_yaxis()
    axes.margins(x=0.22)
    axes.set_xlim(left=0)
    style.finish(axes, "MiB that a device sends for one layer", "")
    kinds = [
        Patch(facecolor=colour, hatch=hatch, edgecolor="white", label=label)
        for scope, (label, colour, hatch) in _KINDS.items()
        if scope in shown
    ]
    figure.legend(handles=kinds, loc="outside lower center", ncols=3, frameon=False)
    return figure
