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
from hcp_jax.sequence.packing import Microbatch, max_documents

LOW_FILL = 0.9
"""Share of slots below which `advice` is worth giving."""


def advice(token_fill: float, num_microbatches: float) -> str:
    """Say how full the buffers are, and what to change so that they are fuller.

    Args:
        token_fill: share of slots that hold a token.
        num_microbatches: microbatches of an optimizer step.
    """
    return (
        f"buffers are {token_fill:.0%} full with {num_microbatches:.3g} microbatches a step: "
        "schedule the documents of more steps together (lookahead), take more tokens a step, or "
        "lower max_tokens_per_device."
    )


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Microbatches that together contain every document once.

    Attributes:
        lengths: tokens of each document.
        num_devices: number of devices of every grouping.
        max_tokens_per_device: tokens of every device's buffer.
        menu: widths of the programs that may be used, ascending.
        microbatches: microbatches in the order in which they run.
        cost: cost model of the seconds.
        sizes: widths that programs could have, on the menu or not; the bound is for all of them.

    >>> from hcp_jax import dynamic
    >>> plan = dynamic.schedule([900, 300, 200, 100], num_devices=8, max_tokens_per_device=256)
    >>> plan.check()
    >>> sorted(d for mb in plan.microbatches for group in mb.documents for d in group)
    [0, 1, 2, 3]
    """

    lengths: tuple[int, ...]
    num_devices: int
    max_tokens_per_device: int
    menu: tuple[int, ...]
    microbatches: tuple[Microbatch, ...]
    cost: Cost
    sizes: tuple[int, ...]

    @cached_property
    def group_seconds(self) -> tuple[tuple[float, ...], ...]:
        """Seconds of attention and exposed transfers of every group of every microbatch."""
        return tuple(
            tuple(
                self.cost.group_seconds(
                    mb.grouping, mb.lengths(self.lengths), self.max_tokens_per_device
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
                for size, of_group in zip(mb.grouping, mb.lengths(self.lengths), strict=True)
            ]
            mean += sum(p * size for p, size in zip(pairs, mb.grouping, strict=True))
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
                for size, seconds in zip(mb.grouping, of_group, strict=True)
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
            ValueError: if a document is missing or appears twice, a group holds more tokens or
                documents than it can, a group is no block of the chain, or the menu has no program
                for a microbatch.
        """
        held = [d for mb in self.microbatches for group in mb.documents for d in group]
        if sorted(held) != list(range(len(self.lengths))):
            raise ValueError(f"{len(held)} places for {len(self.lengths)} documents, once each.")
        for i, mb in enumerate(self.microbatches):
            try:
                self._check_microbatch(mb)
            except ValueError as error:
                raise ValueError(f"microbatch {i}: {error}") from None

    def _check_microbatch(self, mb: Microbatch) -> None:
        lanes = self.cost.lanes_of(mb.widest, self.num_devices)
        chain = self.cost.chain(self.num_devices)
        allowed = (lanes, *(size for size in chain if size > lanes))
        groupings.check_grouping(mb.grouping, self.num_devices, allowed)
        if mb.widest not in self.menu:
            raise ValueError(f"no program of the menu {self.menu} has width {mb.widest}.")
        if mb.lanes != lanes:
            raise ValueError(f"the program of width {mb.widest} has {lanes} lanes, not {mb.lanes}.")
        if len(mb.documents) != len(mb.grouping):
            raise ValueError("one tuple of documents per group is needed.")
        most = max_documents(self.max_tokens_per_device)
        for size, of_group in zip(mb.grouping, mb.lengths(self.lengths), strict=True):
            if sum(of_group) > size * self.max_tokens_per_device:
                raise ValueError(f"a group of {size} is over its capacity.")
            if size > lanes and len(of_group) > most:
                raise ValueError(f"a group of {size} has {len(of_group)} documents, over {most}.")

    def __str__(self) -> str:
        seconds = self.modelled_seconds
        above = seconds / self.lower_bound - 1 if self.lower_bound else 0.0
        lines = [
            f"{len(self.lengths)} documents, {sum(self.lengths)} tokens in "
            f"{len(self.microbatches)} microbatches of {self.num_devices} devices × "
            f"{self.max_tokens_per_device} tokens",
            f"modelled {1e3 * seconds:.2f} ms ({above:.1%} above the lower bound), token fill "
            f"{self.token_fill:.1%}, balance {self.balance:.1%}, idle {self.idle_share:.1%}",
            f"programs of {', '.join(map(str, self.menu))} devices; microbatches:",
        ]
        if self.token_fill < LOW_FILL:
            lines.insert(2, advice(self.token_fill, len(self.microbatches)))
        for mb, took in zip(self.microbatches, self.microbatch_seconds, strict=True):
            held = np.array([length for g in mb.lengths(self.lengths) for length in g])
            lines.append(
                f"  {1e3 * took:9.2f} ms  {held.size:5d} documents of {held.min()} to "
                f"{held.max()} tokens on {groupings.describe(mb.grouping)}"
            )
        return "\n".join(lines)
