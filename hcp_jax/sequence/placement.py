"""Answer where tokens lie: which device and slot holds which token of which stream.

There are two kinds of placement. `Streams` cuts every row of a batch over the context-parallel
devices by a layout; all answers are known beforehand. `Groups` gives every group of devices
documents of its own (dynamic context parallelism); which device holds which tokens is data of the
batch, and only the size of the widest group is fixed.

Attention, `cp.shard`, the roll and the recurrent scans ask a placement; none of them needs to know
which kind it is.
"""

import dataclasses
from types import ModuleType
from typing import Any, NoReturn

import numpy as np
from jaxtyping import Int32

from hcp_jax.sequence import layout as layouts
from hcp_jax.sequence.layout import PADDING, KeyRuns


@dataclasses.dataclass(frozen=True)
class Streams:
    """Every row is one stream, cut over `cp_size` devices by `layout`; hashable.

    >>> Streams("zigzag", 2).global_index(8).tolist()
    [0, 1, 6, 7, 2, 3, 4, 5]
    """

    layout: str = "contiguous"
    cp_size: int = 1

    @property
    def reach(self) -> int:
        """The number of neighbouring devices that a query's keys may lie on."""
        return self.cp_size

    def padded_length(self, length: int) -> int:
        """Return the length of a stream of `length` tokens after padding."""
        return layouts.padded_length(length, self.cp_size, self.layout)

    def global_index(self, length: int) -> Int32[np.ndarray, "T"]:
        """Return the global index of each token of a padded stream, device by device."""
        return layouts.global_index(length, self.cp_size, self.layout)

    def to_layout(self, x: Any, dim: int) -> Any:
        """Reorder `dim` from natural order to the order of the devices."""
        return layouts.to_layout(x, self.cp_size, self.layout, dim)

    def from_layout(self, x: Any, dim: int) -> Any:
        """Reorder `dim` back to natural order."""
        return layouts.from_layout(x, self.cp_size, self.layout, dim)

    def index_after(self, intervals: Any) -> Int32[np.ndarray, "1 T"]:
        """Return the global index after each query's own."""
        return self.global_index(intervals[0].shape[1])[None] + 1

    def source_runs(
        self, runs: KeyRuns | None, slots: int, sources: int, block: Any, xp: ModuleType
    ) -> KeyRuns:
        """Return the key runs of each source of keys, as stacked rows; see `Groups.source_runs`.

        They are known beforehand; one row of offsets serves all sources.
        """
        return layouts.ring_runs(self.cp_size * slots, self.cp_size, self.layout, sources)

    def require_streams(self, what: str) -> None:
        """Do nothing: there are streams."""

    def require_tokens(
        self, name: str, shape: tuple[int, ...], times: int, dp: int, size: int
    ) -> None:
        """Check that an array's tokens are a whole layout.

        Args:
            name: name of the array.
            shape: `[B, T, …]`; T may be one device's part.
            times: number of devices whose parts make up the stream.
            dp: devices that the batch is cut over.
            size: devices that the array's tokens are cut over.

        Raises:
            ValueError: if they are not.
        """
        padded = self.padded_length(times * shape[1])
        if times * shape[1] != padded:
            raise ValueError(
                f"{name} has {shape[1]} tokens, which do not fit a {self.layout} layout over "
                f"{self.cp_size} devices; put it there with cp.shard({name}, dim=1), which pads it "
                f"to {padded}."
            )

    def __str__(self) -> str:
        return f"a {self.layout} layout over {self.cp_size} devices"


@dataclasses.dataclass(frozen=True)
class Groups:
    """Devices form groups of at most `widest`, each with documents of its own; hashable.

    Every group lies inside one aligned block of `widest` devices. Global indices are unique over
    all groups, so intervals alone keep groups apart, and one program serves every grouping.
    """

    widest: int
    num_devices: int

    @property
    def reach(self) -> int:
        """The number of neighbouring devices that a query's keys may lie on."""
        return self.widest

    def padded_length(self, length: int) -> int:
        """Return `length`: buffers are full by definition, their empty slots are data."""
        return length

    def global_index(self, length: int) -> NoReturn:
        """Raise: indices are data of the batch."""
        self.require_streams("a global index")

    def to_layout(self, x: Any, dim: int) -> NoReturn:
        """Raise: there is no natural order of all tokens."""
        self.require_streams("reordering")

    def from_layout(self, x: Any, dim: int) -> NoReturn:
        """Raise: there is no natural order of all tokens."""
        self.require_streams("reordering")

    def index_after(self, intervals: Any) -> Any:
        """Return the global index after each query's own: documents are causal, so its end."""
        return intervals[1]

    def source_runs(
        self, runs: KeyRuns | None, slots: int, sources: int, block: Any, xp: ModuleType
    ) -> KeyRuns:
        """Return the key runs of each source of keys of this device's block, as stacked rows.

        The keys of a source are the buffers of its `widest / sources` devices, one after the
        other. The padding at the end of each buffer becomes a separate run.

        Args:
            runs: key runs of all devices, as stacked rows.
            slots: number of slots of a device's buffer.
            sources: how many sources of keys a query attends to, one after the other.
            block: which block of `widest` devices to return.
            xp: `numpy` or `jax.numpy`.
        """
        assert runs is not None
        devices = self.widest // sources
        shape = self.num_devices // self.widest, sources, devices
        starts, offsets = (xp.asarray(x).reshape(*shape, -1)[block] for x in runs)
        if devices == 1:
            return KeyRuns(starts[:, 0], offsets[:, 0])
        first = slots * xp.arange(devices, dtype=np.int32)[None, :, None]
        starts = xp.pad(starts, ((0, 0), (0, 0), (0, 1)), constant_values=PADDING)
        end = xp.full((sources, 1), devices * slots, np.int32)
        offsets = xp.concatenate([(offsets + first).reshape(sources, -1), end], axis=1)
        return KeyRuns(starts.reshape(sources, -1), offsets)

    def require_streams(self, what: str) -> NoReturn:
        """Raise: streams are not cut over the cp axes here."""
        raise NotImplementedError(
            f"{what} works on streams that are cut over the cp axes, but with widest_group="
            f"{self.widest} each group has documents of its own: hcp.place_microbatch puts them "
            "and everything that belongs to their tokens (such as shifted targets) on the devices."
        )

    def require_tokens(
        self, name: str, shape: tuple[int, ...], times: int, dp: int, size: int
    ) -> None:
        """Check that each device has one buffer; see `Streams.require_tokens`."""
        if shape[0] != dp or shape[1] % size:
            raise ValueError(
                f"with groups, {name} must be [dp={dp}, a multiple of {size}, ...] as "
                f"hcp.place_microbatch leaves it, got {tuple(shape)}."
            )

    def __str__(self) -> str:
        return f"groups of up to {self.widest} of {self.num_devices} devices"


Placement = Streams | Groups
