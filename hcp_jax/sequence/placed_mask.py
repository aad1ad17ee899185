"""Hold a mask as numbers: the intervals of all queries in the order of the devices, and key runs.

`ContextParallel.shard_batch` and `place_microbatch` make one, once per batch. It is apart from
`mask.Mask`, which is a description in natural order for streams of any length.
"""

import dataclasses
from types import ModuleType
from typing import Any, NoReturn

import numpy as np

from hcp_jax.sequence import arrays
from hcp_jax.sequence.layout import KeyRuns
from hcp_jax.sequence.mask import Intervals, Mask
from hcp_jax.sequence.placement import Groups, Placement, Streams


@arrays.pytree
@dataclasses.dataclass(frozen=True)
class PlacedMask:
    """The intervals of all queries, in the order of the devices; a pytree.

    Attributes:
        intervals: one interval of global key indices per query, int32 `[B1, T]`.
        runs: key runs of all devices, as stacked rows, where the batch decides them; else None.
        placement: where the tokens lie.
        key_length: number of keys of a stream, padded; None under groups.
    """

    intervals: Intervals
    runs: KeyRuns | None
    placement: Placement = dataclasses.field(metadata={"static": True})
    key_length: int | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def length(self) -> int:
        """The number of queries of a row."""
        return int(self.intervals.start.shape[1])

    def windowed(self, window: int) -> "PlacedMask":
        """Return the mask under which a query sees at most the last `window` of these keys.

        Queries then see no key after themselves. Under groups, masks are causal already.

        Args:
            window: number of keys, the query's own included.
        """
        start, end = self.intervals
        after = self.placement.index_after(self.intervals)
        xp = arrays.here
        end = xp.minimum(end, after)
        start = xp.minimum(xp.maximum(start, after - window), end)
        return dataclasses.replace(self, intervals=Intervals(start, end))

    def __and__(self, other: Any) -> NoReturn:
        """Raise ValueError: masks are joined before they are placed."""
        raise ValueError(
            "a mask that shard_batch has placed cannot be joined with another; "
            "join them with & in natural order, before shard_batch."
        )

    __rand__ = __and__


def place(
    mask: Mask, placement: Placement, length: int, key_length: int, *, xp: ModuleType = np
) -> PlacedMask:
    """Compute a mask's intervals and put them in the order of the devices.

    Args:
        mask: a mask in natural order.
        placement: where the tokens lie; streams.
        length: T, padded.
        key_length: S; no query sees later keys.
        xp: `numpy` on the host, or `jax.numpy` if leaves are traced.

    Raises:
        ValueError: if the placement is one of groups, whose masks come from `place_microbatch`.
    """
    if isinstance(placement, Groups):
        raise ValueError(
            f"the mask is in natural order, but attention runs in {placement}; place it with the "
            "same cp (for groups, that is what hcp.place_microbatch does)."
        )
    intervals = mask.intervals(length, key_length, xp=xp)
    in_order = Intervals(*(placement.to_layout(xp.asarray(x), 1) for x in intervals))
    return PlacedMask(in_order, None, placement, placement.padded_length(key_length))


def require_fit(mask: PlacedMask, placement: Placement, length: int, key_length: int) -> None:
    """Check that a mask was placed for the placement and the lengths of a call.

    Args:
        mask: a placed mask.
        placement: where the tokens of the call lie.
        length: T of the call, padded.
        key_length: S of the call, padded.

    Raises:
        ValueError: if it was not.
    """
    if mask.placement != placement:
        raise ValueError(
            f"the mask was placed for {mask.placement}, but attention runs in {_words(placement)}; "
            "place it with the same cp (for groups, that is what hcp.place_microbatch does)."
        )
    if mask.key_length is None:
        return
    if mask.length != length:
        raise ValueError(
            f"the mask was placed for {mask.length} queries (padded), but q has {length}; place it "
            "for q's own length. Inside a shard_map over the cp axes a placed mask stays whole: "
            "give it the spec PartitionSpec(dp), or PartitionSpec() if it has one row."
        )
    if mask.key_length != key_length:
        raise ValueError(
            f"the mask was placed for {mask.key_length} keys (padded), but k has {key_length}; "
            "in cross attention, place it with cp.place(mask, T, key_length=S)."
        )


def _words(placement: Placement) -> str:
    return "natural order on one device" if placement == Streams() else str(placement)
