"""Define how a run is split over a cluster, and what its transfers cost."""

import dataclasses
import functools
import math

import numpy as np

from hcp_jax.cost.traffic import (
    STRATEGIES,
    CommType,
    Remat,
    Strategy,
)
from hcp_jax.hardware import Cluster, Path


@dataclasses.dataclass(frozen=True)
class Split:
    """Split of a run over a cluster; names as in `ParallelConfig` and `ModelConfig`."""

    dp: int = 1
    tp: int = 1
    cp_outer: int = 1
    cp_inner: int = 1
    comm_type: CommType = "a2a+p2p"
    remat: Remat = "attention"
    fsdp: bool = True

    @property
    def cp(self) -> int:
        """Context-parallel degree C."""
        return self.cp_outer * self.cp_inner

    @property
    def strategy(self) -> Strategy:
        """Axes that exchange heads, and axes that K and V move over."""
        return STRATEGIES[self.comm_type]

    @property
    def exchange(self) -> int:
        """Number of devices that exchange heads."""
        return self._size(self.strategy.exchange)

    @property
    def move(self) -> int:
        """Number of devices that K and V move over."""
        return self._size(self.strategy.move)

    def _size(self, axes: tuple[str, ...]) -> int:
        return math.prod(getattr(self, axis) for axis in axes)

    def __str__(self) -> str:
        cp = f"cp {self.cp} [{self.cp_inner} in, {self.cp_outer} out]"
        shard = "fsdp" if self.fsdp else "replicated"
        return f"dp {self.dp}, tp {self.tp}, {cp} {self.comm_type}, remat {self.remat}, {shard}"


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One kind of transfer in a step.

    Attributes:
        what: description in words.
        axes: mesh axes it runs over.
        link: "inside a host" or "between hosts".
        bytes: bytes that one device sends in a step.
        seconds: duration of all of them.
        exposed: seconds in which the device waits for them.
    """

    what: str
    axes: tuple[str, ...]
    link: str
    bytes: float
    seconds: float
    exposed: float

    def times(self, n: int) -> "Transfer":
        """Return this transfer, n times."""
        return Transfer(
            self.what, self.axes, self.link, n * self.bytes, n * self.seconds, n * self.exposed
        )


@functools.lru_cache(maxsize=4096)
def path(cluster: Cluster, split: Split, axes: tuple[str, ...], kind: str) -> Path:
    """Return the path of a collective along some mesh axes: that of its slowest group."""
    order = ("dp", "cp_outer", "cp_inner", "tp")
    mesh = np.arange(cluster.size).reshape([getattr(split, axis) for axis in order])
    along = [order.index(axis) for axis in axes]
    groups = np.moveaxis(mesh, along, range(-len(along), 0))
    groups = groups.reshape(-1, int(np.prod([mesh.shape[i] for i in along])))
    # Groups that spread over hosts in the same way have the same path; even a large mesh has only
    # a few such patterns.
    spread = groups // cluster.domain
    kinds = {row.tobytes(): i for i, row in enumerate(spread - spread[:, :1])}
    chosen = groups[list(kinds.values())].tolist()
    return min((cluster.path(kind, tuple(group)) for group in chosen), key=lambda p: p.rate)
