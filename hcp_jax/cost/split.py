"""Define how a run is split over a cluster, and what its transfers cost."""

import dataclasses
import functools
import math

import numpy as np

from hcp_jax.cost.expert_axes import innermost_axes
from hcp_jax.cost.traffic import (
    STRATEGIES,
    CommType,
    Remat,
    Strategy,
)
from hcp_jax.hardware import Cluster, Path

FLAT_AXES = ("dp", "cp_outer", "cp_inner")
"""Axes that tokens are cut over, the slowest first."""


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
    ep: int = 1
    pp: int = 1
    virtual_stages: int = 1

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

    @property
    def expert_axes(self) -> tuple[str, ...]:
        """Mesh axes that experts are cut over, the slowest first."""
        sizes = {axis: getattr(self, axis) for axis in FLAT_AXES}
        return innermost_axes(sizes, self.ep)

    @property
    def forwards(self) -> int:
        """How often a layer's forward pass runs, in whole or in part."""
        return 1 + (self.remat != "none") + (self.pp > 1)

    def _size(self, axes: tuple[str, ...]) -> int:
        return math.prod(getattr(self, axis) for axis in axes)

    def __str__(self) -> str:
        cp = f"cp {self.cp} [{self.cp_inner} in, {self.cp_outer} out]"
        shard = "fsdp" if self.fsdp else "replicated"
        ep = f", ep {self.ep}" if self.ep > 1 else ""
        virtual = f" x {self.virtual_stages} chunks" if self.virtual_stages > 1 else ""
        pp = f"pp {self.pp}{virtual}, " if self.pp > 1 else ""
        rest = f"{cp} {self.comm_type}{ep}, remat {self.remat}, {shard}"
        return f"{pp}dp {self.dp}, tp {self.tp}, {rest}"


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


_ORDER = ("pp", "dp", "cp_outer", "cp_inner", "tp")


def path(cluster: Cluster, split: Split, axes: tuple[str, ...], kind: str) -> Path:
    """Return the path of a collective along some mesh axes: that of its slowest group."""
    sizes = tuple(getattr(split, axis) for axis in _ORDER)
    return _slowest(cluster, sizes, tuple(_ORDER.index(axis) for axis in axes), kind)


@functools.lru_cache(maxsize=4096)
def _slowest(cluster: Cluster, sizes: tuple[int, ...], along: tuple[int, ...], kind: str) -> Path:
    """Return the slowest path of the groups along some dims of a mesh of these sizes."""
    mesh = np.arange(cluster.size).reshape(sizes)
    groups = np.moveaxis(mesh, along, range(-len(along), 0))
    groups = groups.reshape(-1, math.prod(sizes[i] for i in along))
    # Groups that spread over hosts in the same way have the same path; even a large mesh has only
    # a few such patterns.
    spread = groups // cluster.domain
    kinds = {row.tobytes(): i for i, row in enumerate(spread - spread[:, :1])}
    chosen = groups[list(kinds.values())].tolist()
    return min((cluster.path(kind, tuple(group)) for group in chosen), key=lambda p: p.rate)
