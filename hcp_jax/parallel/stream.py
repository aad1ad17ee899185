"""Say where the runs of a stream lie on devices, and move arrays between neighbours in the stream.

    stream       0 | 1 | 2 | 3 | 4 | 5 | 6 | 7      eight runs
    zigzag       0   7 | 1   6 | 2   5 | 3   4      run 4 comes after run 3, on the same device;
                 dev 0   dev 1   dev 2   dev 3      run 7 comes after run 6, on the one to the left

What crosses a border of devices besides attention (halos of convolutions, states of recurrences)
asks here for the order, and does not know layouts.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hcp_jax.parallel import spmd
from hcp_jax.sequence.layout import chunk_order, runs_per_device

if TYPE_CHECKING:
    from hcp_jax.parallel.context import ContextParallel


class StreamOrder(NamedTuple):
    """The order of a stream's runs over devices; static.

    Attributes:
        axes: mesh axes that the stream is cut over, the slowest first.
        devices: number of devices along `axes`.
        layout: "contiguous" (one run on each device) or "zigzag" (two).
    """

    axes: tuple[str, ...] = ()
    devices: int = 1
    layout: str = "contiguous"

    @property
    def runs(self) -> int:
        """The number of runs on each device."""
        return runs_per_device(self.layout)

    @property
    def order(self) -> np.ndarray:
        """The place in the stream of every run, device by device."""
        return chunk_order(self.devices, self.layout)

    def from_earlier(self, tree: Any, distance: int) -> Any:
        """Return, for every run, the arrays of the run `distance` before it in the stream.

        Call it inside `shard_map`. It sends one `ppermute` for each pair of slots (the run's place
        on the sending and on the receiving device) that needs one. Backward is the same in the
        other direction.

        Args:
            tree: arrays `[runs, …]` of this device.
            distance: number of runs, 1 or more.

        Returns:
            Arrays of the same shapes; zeros for the first runs of the stream.
        """
        place = np.argsort(self.order)
        device = jax.lax.axis_index(self.axes) if self.devices > 1 else 0
        received = []
        for slot in range(self.runs):
            wanted = self.order.reshape(-1, self.runs)[:, slot] - distance
            source, source_slot = np.divmod(place[wanted], self.runs)
            parts = [jax.tree.map(lambda x: jnp.zeros_like(x[0]), tree)]
            for other in range(self.runs):
                known = (wanted >= 0) & (source_slot == other)
                here = known & (source == np.arange(self.devices))
                pairs = [(int(source[d]), int(d)) for d in np.flatnonzero(known & ~here)]
                own = jax.tree.map(lambda x, other=other: x[other], tree)
                if np.any(here):
                    parts.append(_where(jnp.asarray(here)[device], own))
                if pairs:  # devices that no pair names receive zeros
                    parts.append(spmd.ppermute(own, self.axes, pairs))
            received.append(jax.tree.map(lambda *x: sum(x[1:], x[0]), *parts))
        return jax.tree.map(lambda *x: jnp.stack(x), *received)


def stream_order(cp: "ContextParallel | None") -> StreamOrder:
    """Return the order of the streams of `cp` over its devices; one run on one device if None.

    Raises:
        NotImplementedError: if `cp` has groups, whose documents lie in another order
            (`grouped.py`).
    """
    if cp is None:
        return StreamOrder()
    cp.placement.require_streams("a recurrent layer, a short convolution or a halo")
    return StreamOrder(cp.cp_axes, cp.size, cp.layout)


def _where(here: jax.Array, tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.where(here, x, jnp.zeros_like(x)), tree)
