"""Describe sets of devices that exchange data with each other along mesh axes.

    Peers(axes, devices=8, size=2, stride=4)      sets {0, 4} {1, 5} {2, 6} {3, 7}
    Peers(axes, devices=8, size=4, stride=1)      sets {0, 1, 2, 3} {4, 5, 6, 7}

Devices are numbered along `axes`, the last one fastest. Every mover of attention works on one
`Peers`: an exchange of heads on neighbouring devices, a ring over whole axes, a walk over members
of several devices each (stride > 1).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from hcp_jax.parallel import spmd


class Peers(NamedTuple):
    """Sets of `size` devices, `stride` apart; static and hashable.

    Attributes:
        axes: mesh axes.
        devices: number of devices along `axes`; a multiple of `size * stride`.
        size: devices of a set.
        stride: distance between neighbours of a set.
    """

    axes: tuple[str, ...] = ()
    devices: int = 1
    size: int = 1
    stride: int = 1

    @property
    def index_groups(self) -> list[list[int]] | None:
        """The sets, as `axis_index_groups` takes them; None if all devices are one set."""
        if self.size == self.devices:
            return None
        return [self._set(n).tolist() for n in range(self.devices // self.size)]

    def rank(self) -> Any:
        """Return the rank of this device in its set; inside `shard_map`."""
        return 0 if self.size == 1 else self._device() // self.stride % self.size

    def block(self) -> Any:
        """Return which block of `size * stride` devices this device is in; inside `shard_map`."""
        blocks = self.devices // (self.size * self.stride)
        return 0 if blocks == 1 else self._device() // (self.size * self.stride)

    def permute(self, tree: Any, source: Sequence[int] | np.ndarray, scope: str) -> Any:
        """Return the arrays of rank `source[r]` of this device's set, where r is its own rank.

        Args:
            tree: arrays of this device.
            source: a permutation of the ranks.
            scope: name of the collective in the compiled program.
        """
        pairs = [
            (int(members[source[r]]), int(members[r]))
            for members in map(self._set, range(self.devices // self.size))
            for r in range(self.size)
        ]
        with jax.named_scope(scope):
            return spmd.ppermute(tree, self.axes, pairs)

    def _device(self) -> Any:
        return jax.lax.axis_index(self.axes)

    def _set(self, number: int) -> np.ndarray:
        """Return the devices of the set with this number, by rank."""
        block, lane = divmod(number, self.stride)
        return block * self.size * self.stride + lane + np.arange(self.size) * self.stride
