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
from hcp_jax.sequence.groupings import Layout
from hcp_jax.sequence.packing import Microbatch


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Microbatches that together contain every document once.

    Attributes:
        lengths: tokens of each document.
        num_devices: number of devices of every grouping.
        max_tokens_per_device: tokens of every device's buffer.
        menu: groupings that may be used.
        microbatches: microbatches in the order in which they run.
        cost: cost model of the seconds.
        sizes: possible group sizes, on the menu or not.
    """

    lengths: tuple[int, ...]
    num_devices: int
    max_tokens_per_device: int
    menu: tuple[Layout, ...]
    microbatches: tuple[Microbatch, ...]
    cost: Cost
    sizes: tuple[int, ...]

    @cached_property
    def group_seconds(self) -> tuple[tuple[float, ...], ...]:
        """Seconds of attention and exposed transfers of every group of every microbatch."""
        return tuple(
            tuple(
                self.cost.group_seconds(
                    mb.layout, mb.lengths(self.lengths), self.max_tokens_per_device
                )
            )
            for mb in self.microbatches
        )

    @property
    def microbatch_seconds(self) -> tuple[float, ...]:
        """Modelled seconds of every microbatch."""
        dense = self.cost.dense_seconds(self.max_tokens_per_device)
        return tuple(dense + max(of_group) for of_group in self.group_seconds)

    @property
    def modelled_seconds(self) -> float:
        """Modelled seconds of all microbatches, forward and backward."""
        return sum(self.microbatch_seconds)

    @property
    def token_fill(self) -> float:
        """Share of all buffer slots that hold a token; 1 if there are no microbatches."""
        places = len(self.microbatches) * self.num_devices * self.max_tokens_per_device
        return sum(self.lengths) / places if places else 1.0

    @property
    def balance(self) -> float:
        """Attention pairs of the mean device over those of the busiest, over all microbatches."""
        mean = busiest = 0.0
        for mb in self.microbatches:
            pairs = [
                sum(length * (length + 1) / 2 for length in of_group) / size
                for size, of_group in zip(mb.layout, mb.lengths(self.lengths), strict=True)
            ]
            mean += sum(p * size for p, size in zip(pairs, mb.layout, strict=True))
            busiest += max(pairs) * self.num_devices
        return mean / busiest if busiest else 1.0

    @property
    def idle_share(self) -> float:
        """Share of all device-seconds in which a device waits for a slower group."""
        waiting = 0.0
        for mb, of_group in zip(self.microbatches, self.group_seconds, strict=True):
            slowest = max(of_group)
            waiting += sum(
                size * (slowest - seconds)
                for size, seconds in zip(mb.layout, of_group, strict=True)
            )
        total = self.modelled_seconds * self.num_devices
        return waiting / total if total else 0.0

    @cached_property
    def lower_bound(self) -> float:
        """Lower bound on the seconds of any schedule with groups of these sizes; see `bound`."""
        return lower_bound(
            self.lengths, self.num_devices, self.max_tokens_per_device, self.sizes, self.cost
        )

    def check(self) -> None:
        """Check that the schedule is complete and fits the devices.

        Raises:
            ValueError: if a document is missing or appears twice, a group holds more tokens than
                its devices can, or a grouping is not on the menu.
        """
        held = [d for mb in self.microbatches for group in mb.documents for d in group]
        if sorted(held) != list(range(len(self.lengths))):
            raise ValueError(f"{len(held)} places for {len(self.lengths)} documents, once each.")
        for i, mb in enumerate(self.microbatches):
            groupings.check_layout(mb.layout, self.num_devices)
            if mb.layout not in self.menu:
                raise ValueError(
                    f"microbatch {i}: {groupings.describe(mb.layout)} is not on the menu."
                )
            if len(mb.documents) != len(mb.layout):
                raise ValueError(f"microbatch {i}: one tuple of documents per group is needed.")
            for size, of_group in zip(mb.layout, mb.lengths(self.lengths), strict=True):
                if sum(of_group) > size * self.max_tokens_per_device:
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
            f"menu of {len(self.menu)} layouts; microbatches:",
        ]
        for mb, took in zip(self.microbatches, self.microbatch_seconds, strict=True):
            held = np.array([length for g in mb.lengths(self.lengths) for length in g])
            lines.append(
                f"  {1e3 * took:9.2f} ms  {held.size:5d} documents of {held.min()} to "
                f"{held.max()} tokens on {groupings.describe(mb.layout)}"
            )
        return "\n".join(lines)
