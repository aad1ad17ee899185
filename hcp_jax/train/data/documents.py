"""Plan which documents each optimizer step trains on, and on which devices, from their lengths.

The segments of a corpus come in an order that is shuffled anew each epoch, the same as in a run
without dynamic context parallelism. A batch is as many of the next segments as fit into the tokens
of a step; `lookahead` batches are a window, whose documents are scheduled together:

    order     7 2 9 | 4 1 | 8 3 6 | 0 5 …          batches, by tokens
    window    7 2 9   4 1                           lookahead = 2: scheduled together
    steps     [9 4] [1] | [7 2]                     microbatches, dealt to as many steps as batches

Only lengths are needed for that, so every process makes the same schedule of all data, and reads
only what its own devices hold.

The state is the position in the order after the window, and the remaining steps of the window,
document by document. So a resumed run makes the same steps on the same number of devices; on
another number, the documents of each of those steps are scheduled anew. In both cases, each
document is trained on once an epoch.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Int64

from hcp_jax.dynamic.config import DynamicConfig
from hcp_jax.dynamic.cost import Cost
from hcp_jax.dynamic.menu import choose_menu, schedule_batches
from hcp_jax.dynamic.scheduler import program_widths
from hcp_jax.sequence import groupings
from hcp_jax.sequence.packing import Microbatch
from hcp_jax.train.data.streams import Segments, require_same_data, shuffled

_SAMPLES = 8  # windows that the menu is chosen for

PlannedStep = tuple[Microbatch, ...]
"""The microbatches of one optimizer step; their documents are numbers of segments."""


class Limits(NamedTuple):
    """The limits of a schedule, and what it minimises.

    Attributes:
        num_devices: dp · cp.
        tokens_per_step: the most tokens of a step, unless a single document has more.
        seed: seed of the order of the documents, and of the scheduler's random choices.
        config: the run's `parallel.dynamic`.
        cost: the model of seconds that the scheduler minimises.
        num_stages: stages of a pipeline, each of `num_devices`.
    """

    num_devices: int
    tokens_per_step: int
    seed: int
    config: DynamicConfig
    cost: Cost
    num_stages: int = 1

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths that programs may have, ascending."""
        config = self.config
        return program_widths(self.cost, self.num_devices, config.min_cp_size, config.max_cp_size)


class PlannedSteps(grain.IterDataset[PlannedStep]):
    """The steps of a run, without end, each as its microbatches.

    Args:
        sizes: tokens of every segment.
        limits: the limits of schedules.

    Attributes:
        menu: the widest groups of the programs, chosen for these documents unless the config has
            them.
    """

    def __init__(self, sizes: Int64[np.ndarray, "S"], limits: Limits):
        super().__init__()
        self.sizes, self.limits = sizes, limits
        self.menu = self._choose_menu()

    def __iter__(self) -> "_Iterator":
        return _Iterator(self)

    def number(self, position: int) -> int:
        """Return the segment at a position in the order, which continues over all epochs."""
        epoch, index = divmod(position, len(self.sizes))
        return int(_order(len(self.sizes), self.limits.seed, epoch)[index])

    def window(self, position: int) -> tuple[list[list[int]], int]:
        """Return the batches of the window that begins at a position, and the position after it."""
        batches = []
        for _ in range(self.limits.config.lookahead):
            numbers = [self.number(position)]
            tokens = int(self.sizes[numbers[0]])
            while True:
                position += 1
                number = self.number(position)
                tokens += int(self.sizes[number])
                if tokens > self.limits.tokens_per_step:
                    break
                numbers.append(number)
            batches.append(numbers)
        return batches, position

    def plan(self, batches: Sequence[Sequence[int]], seed: int) -> list[PlannedStep]:
        """Return as many steps as batches, which together train on all their documents."""
        steps = self._schedule(batches, seed)
        if all(steps):
            return steps
        # Too few documents to share: schedule each batch alone.
        return [step for batch in batches for step in self._schedule([batch], seed)]

    def replan(self, numbers: Sequence[int]) -> PlannedStep:
        """Return one step with exactly these documents."""
        return self.plan([numbers], self.limits.seed)[0]

    def _schedule(self, batches: Sequence[Sequence[int]], seed: int) -> list[PlannedStep]:
        """Return steps as `plan` does, but a step may be empty."""
        lengths = [self.sizes[np.asarray(batch)] for batch in batches]
        cost, pp = self.limits.cost, self.limits.num_stages
        steps = []
        for step in schedule_batches(lengths, *self._bounds, self.menu, cost, seed, pp):
            numbers = [batches[b][i] for b, i in step.sources]
            steps.append(tuple(_renamed(mb, numbers) for mb in step.plan.microbatches))
        return steps

    def serves(self, microbatch: Microbatch) -> bool:
        """Return whether a program can run a microbatch as it is."""
        limits = self.limits
        try:
            groupings.check_grouping(microbatch.grouping, limits.num_devices, limits.widths)
        except ValueError:
            return False
        lanes = limits.cost.lanes_of(microbatch.widest, limits.num_devices)
        return microbatch.widest <= self.menu[-1] and microbatch.lanes == lanes

    @property
    def _bounds(self) -> tuple[int, int, int, int | None]:
        config = self.limits.config
        return self.limits.num_devices, config.tokens, config.min_cp_size, config.max_cp_size

    def _choose_menu(self) -> tuple[int, ...]:
        config = self.limits.config
        if config.widths is not None:
            return groupings.check_menu(config.widths, self.limits.widths, "dynamic.menu")
        samples: list[Int64[np.ndarray, n]] = []
        position = 0
        while len(samples) < _SAMPLES and (position < len(self.sizes) or not samples):
            batches, position = self.window(position)
            samples.append(self.sizes[np.concatenate(batches)])
        return choose_menu(
            samples,
            *self._bounds,
            cost=self.limits.cost,
            max_programs=config.menu if isinstance(config.menu, int) else None,
        )


class _Iterator(grain.DatasetIterator[PlannedStep]):
    def __init__(self, steps: PlannedSteps):
        super().__init__()
        self._steps = steps
        self._position = 0
        self._window: list[PlannedStep] = []

    def __next__(self) -> PlannedStep:
        if not self._window:
            batches, end = self._steps.window(self._position)
            self._window = self._steps.plan(batches, self._steps.limits.seed + self._position)
            self._position = end
        return self._window.pop(0)

    def get_state(self) -> dict[str, Any]:
        return {
            **_identity(self._steps),
            "max_tokens_per_device": self._steps.limits.config.tokens,
            "place": self._position,
            "window": [
                [[mb.grouping, mb.documents, mb.lanes] for mb in step] for step in self._window
            ],
        }

    def set_state(self, state: dict[str, Any]) -> None:
        require_same_data(state, _identity(self._steps))
        self._position = state["place"]
        window = [
            tuple(
                # Checkpoints of before programs served many groupings name no lanes.
                Microbatch(tuple(grouping), tuple(map(tuple, documents)), *lanes)
                for grouping, documents, *lanes in step
            )
            for step in state["window"]
        ]
        same = state["max_tokens_per_device"] == self._steps.limits.config.tokens
        if not same or not all(self._steps.serves(mb) for step in window for mb in step):
            window = [self._steps.replan(_numbers(step)) for step in window]
        self._window = window


@functools.lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> Int64[np.ndarray, "S"]:
    return shuffled(np.arange(count), seed, epoch)


def _identity(steps: PlannedSteps) -> dict[str, int]:
    """Return the settings that the order of documents depends on; see `require_same_data`."""
    return {
        "segments": len(steps.sizes),
        "tokens": int(steps.sizes.sum()),
        "longest": int(steps.sizes.max()),
        "seed": steps.limits.seed,
    }


def _numbers(step: PlannedStep) -> list[int]:
    return sorted(d for mb in step for group in mb.documents for d in group)


def _renamed(microbatch: Microbatch, numbers: Sequence[int]) -> Microbatch:
    documents = tuple(tuple(int(numbers[d]) for d in group) for group in microbatch.documents)
    return dataclasses.replace(microbatch, documents=documents)


def check_longest(segments: Segments, limits: Limits, name: str = "document") -> None:
    """Check that every document fits the widest group.

    Args:
        segments: the segments of the text.
        limits: the limits of schedules.
        name: what a document is called in the error.

    Raises:
        ValueError: if one is longer; names it.
    """
    config = limits.config
    widths = limits.widths
    if config.widths is not None:
        widths = groupings.check_menu(config.widths, widths, "dynamic.menu")
    widest = widths[-1]
    longest = int(segments.sizes.argmax())
    length = int(segments.sizes[longest])
    if length > widest * config.tokens:
        raise ValueError(
            f"{name} {segments.document(longest)} has {length} tokens (no more than seq_len "
            f"count), but the widest group, of {widest} devices, holds {widest} * {config.tokens} "
            f"= {widest * config.tokens}. Set parallel.dynamic.max_tokens_per_device to "
            f"{-(-length // widest)} or more, allow wider groups, or lower seq_len."
        )
