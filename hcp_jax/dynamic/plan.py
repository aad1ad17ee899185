"""Hold a schedule: its microbatches with their groupings and documents, and measures of quality.

It is separate from the scheduler, so that the training program, the packing and the pictures need
no code that searches.
"""

import dataclasses
from functools import cached_property

import numpy as np

from hcp_jax.dynamic.bound import lower_bound
from hcp_jax.dynamic.cost import Cost
from hcp_jax.sequence import groupings
from hcp_jax.sequence.packing import Microbatch


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Microbatches that together contain every document once.

    Attributes:
        lengths: tokens of each document.
        num_devices: number of devices of every grouping.
        max_tokens_per_device: tokens of every device's buffer.
        menu: devices of the widest group of each program that may be used, ascending.
        microbatches: microbatches in the order in which they run.
        cost: cost model of the seconds.
        sizes: possible group sizes.
        lanes: devices that exchange heads with each other.
    """

    lengths: tuple[int, ...]
    num_devices: int
    max_tokens_per_device: int
    menu: tuple[int, ...]
    microbatches: tuple[Microbatch, ...]
    cost: Cost
    sizes: tuple[int, ...]
    lanes: int = 1

    def program(self, microbatch: Microbatch) -> int:
        """Return the devices of the widest group of the program that runs a microbatch."""
        return next(width for width in self.menu if width >= microbatch.widest)

    @cached_property
    def group_seconds(self) -> tuple[tuple[float, ...], ...]:
        """Seconds of attention and exposed transfers of every group of every microbatch."""
        return tuple(
            tuple(
                self.cost.group_seconds(
                    mb.grouping,
                    mb.lengths(self.lengths),
                    self.max_tokens_per_device,
                    mb.lanes,
                    self.program(mb),
                )
            )
            for mb in self.microbatches
        )

    @property
    def microbatch_seconds(self) -> tuple[float, ...]:
        """Modelled seconds of every microbatch."""
        return tuple(
            self.cost.dense_seconds(self.max_tokens_per_device, mb.lanes) + max(by_group)
            for mb, by_group in zip(self.microbatches, self.group_seconds, strict=True)
        )

    @property
    def modelled_seconds(self) -> float:
        """Modelled seconds of all microbatches, forward and backward."""
        return sum(self.microbatch_seconds)

    @property
    def token_fill(self) -> float:
        """Share of all buffer slots that hold a token; 1 if there are no microbatches."""
        slots = len(self.microbatches) * self.num_devices * self.max_tokens_per_device
        return sum(self.lengths) / slots if slots else 1.0

    @property
    def balance(self) -> float:
        """Attention pairs of the mean device over those of the busiest, over all microbatches."""
        mean = busiest = 0.0
        for mb in self.microbatches:
            pairs = [
                sum(length * (length + 1) / 2 for length in by_group) / size
                for size, by_group in zip(mb.grouping, mb.lengths(self.lengths), strict=True)
            ]
            mean += sum(p * size for p, size in zip(pairs, mb.grouping, strict=True))
            busiest += max(pairs) * self.num_devices
        return mean / busiest if busiest else 1.0

    @property
    def idle_share(self) -> float:
        """Share of all device-seconds in which a device waits for a slower group."""
        waiting = 0.0
        for mb, by_group in zip(self.microbatches, self.group_seconds, strict=True):
            slowest = max(by_group)
            waiting += sum(
                size * (slowest - seconds)
                for size, seconds in zip(mb.grouping, by_group, strict=True)
            )
        total = self.modelled_seconds * self.num_devices
        return waiting / total if total else 0.0

    @cached_property
    def lower_bound(self) -> float:
        """Lower bound on the seconds of any schedule with groups of these sizes; see `bound`."""
        return lower_bound(
            self.lengths,
            self.num_devices,
            self.max_tokens_per_device,
            self.sizes,
            self.cost,
            self.lanes,
        )

    def check(self) -> None:
        """Check that the schedule is complete and fits the devices.

        Raises:
            ValueError: if a document is missing or appears twice, a group holds more tokens than
                its devices can, or a grouping is not on the menu.
        """
        held = [d for mb in self.microbatches for group in mb.documents for d in group]
        if sorted(held) != list(range(len(self.lengths))):
            raise ValueError(f"{len(held)} slots for {len(self.lengths)} documents, once each.")
        for i, mb in enumerate(self.microbatches):
            groupings.check_grouping(mb.grouping, self.num_devices, self.sizes)
            if mb.widest > self.menu[-1]:
                raise ValueError(
                    f"microbatch {i}: {groupings.describe(mb.grouping)} is wider than the programs."
                )
            if len(mb.documents) != len(mb.grouping):
                raise ValueError(f"microbatch {i}: one tuple of documents per group is needed.")
            for size, by_group in zip(mb.grouping, mb.lengths(self.lengths), strict=True):
                if sum(by_group) > size * self.max_tokens_per_device:
                    raise ValueError(f"microbatch {i}: a group of {size} is over its capacity.")

    def __str__(self) -> str:
        seconds = self.modelled_seconds
        above = seconds / self.lower_bound - 1 if self.lower_bound else 0.0
        lines = [
            f"{len(self.lengths)} documents, {sum(self.lengths)} tokens in "
            f"{len(self.microbatches)} microbatches of {self.num_devices} devices × "
            f"{self.max_tokens_per_device} tokens",
            f"modelled {1e3 * seconds:.2f} ms ({above:.1%} above the lower bound), token fill "
            f"{self.token_fill:.1%}, balance {self.balance:.1%}, idle {self.idle_share:.1%}",
            f"programs for groups of up to {', '.join(map(str, self.menu))} devices; microbatches:",
        ]
        for mb, took in zip(self.microbatches, self.microbatch_seconds, strict=True):
            held = np.array([length for g in mb.lengths(self.lengths) for length in g])
            lines.append(
                f"  {1e3 * took:9.2f} ms  {held.size:5d} documents of {held.min()} to "
                f"{held.max()} tokens on {groupings.describe(mb.grouping)}"
            )
        return "\n".join(lines)
