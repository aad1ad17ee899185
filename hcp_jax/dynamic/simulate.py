"""Show the gain of dynamic CP on batches of documents, under one cost model.

It schedules the batches with this library's scheduler and with each of `baselines`. It needs no jax
and no devices.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hcp_jax.dynamic import baselines
from hcp_jax.dynamic.baselines import Outcome
from hcp_jax.dynamic.cost import Cost
from hcp_jax.dynamic.menu import schedule_batches
from hcp_jax.dynamic.pipeline import ratio_to_ideal
from hcp_jax.dynamic.plan import LOW_FILL, Schedule, advice
from hcp_jax.dynamic.scheduler import schedule

MOST_DOCUMENTS = 1_000_000
"""Most documents of a batch that can be scheduled in reasonable time."""

OURS = "dynamic (ours)"
TOGETHER = "dynamic, batches filled together"
REFERENCE = "seeded greedy (reference)"
PADDED = "seeded greedy, with its padding"


@dataclasses.dataclass(frozen=True)
class Limits:
    """Arguments of `schedule` that all batches share.

    Attributes:
        num_devices: N.
        max_tokens_per_device: M.
        min_cp_size: smallest width of a program.
        max_cp_size: largest width of a program; N if None.
        cost: cost model.
        seed: order of documents of equal length.
        num_stages: stages of a pipeline; each has `num_devices`.
        virtual_stages: chunks of layers on each stage.
    """

    num_devices: int
    max_tokens_per_device: int
    min_cp_size: int = 1
    max_cp_size: int | None = None
    cost: Cost = dataclasses.field(default_factory=Cost)
    seed: int = 0
    num_stages: int = 1
    virtual_stages: int = 1

    def schedule(
        self, lengths: Sequence[int] | np.ndarray, progress: Callable[[int], None] | None = None
    ) -> Schedule:
        """Schedule one batch."""
        return schedule(lengths, **self._arguments, progress=progress)

    def seconds(self, times: Sequence[float]) -> float:
        """Return the modelled seconds of a step: of all ticks, if there is a pipeline.

        Microbatches run in the order in which the stages wait least for each other.

        Args:
            times: seconds of each microbatch, over all layers; a stage has its share of them.
        """
        if self.num_stages == 1 or not times:
            return sum(times)
        ratio = ratio_to_ideal(times, self.num_stages, self.virtual_stages)
        return ratio * sum(times) / self.num_stages

    def schedule_together(self, batches: Sequence[np.ndarray]) -> list[Schedule]:
        """Schedule all batches together; return a plan for each step."""
        return [step.plan for step in schedule_batches(batches, **self._arguments)]

    @property
    def _arguments(self) -> dict[str, Any]:
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del given["virtual_stages"]
        return given


def simulate(
    batches: Sequence[np.ndarray],
    limits: Limits,
    progress: Callable[[int], None] | None = None,
) -> dict:
    """Compare all strategies on the same batches; return what to print or write as JSON.

    Args:
        batches: lengths of the documents of each batch.
        limits: devices, sizes and cost.
        progress: called with the number of documents that our scheduler has placed.
    """
    cost, num_devices = limits.cost, limits.num_devices
    record: dict = {
        "devices": num_devices,
        "documents": sum(batch.size for batch in batches),
        "tokens": int(sum(batch.sum() for batch in batches)),
        "mean_length": float(np.mean(np.concatenate(batches))),
        "max_tokens_per_device": limits.max_tokens_per_device,
        "strategies": {},
    }
    ours = [limits.schedule(batch, progress) for batch in batches]
    record["programs"] = sorted({mb.widest for plan in ours for mb in plan.microbatches})
    pp = limits.num_stages
    record["lower_bound"] = sum(plan.lower_bound for plan in ours) / len(ours) / pp
    record["stages"] = {"pp": pp, "virtual_stages": limits.virtual_stages}
    ideal = sum(plan.modelled_seconds for plan in ours) / pp
    ticks = sum(limits.seconds(plan.microbatch_seconds) for plan in ours)
    record["stages"]["over_ideal"] = ticks / ideal if ideal else 1.0
    plans_of: dict[str, list[tuple[Schedule, int | None]]] = {OURS: [(plan, 1) for plan in ours]}
    if len(batches) > 1:
        together = limits.schedule_together(batches)
        if all(plan.microbatches for plan in together):
            plans_of[TOGETHER] = [(plan, 1) for plan in together]
    given = [(batch.tolist(), num_devices, limits.max_tokens_per_device, cost) for batch in batches]
    plans_of["fixed CP, packed"] = [(baselines.fixed_packed(*of), None) for of in given]
    plans_of["fixed CP, DP-balanced"] = [(baselines.fixed_balanced(*of), None) for of in given]
    plans_of[REFERENCE] = [(baselines.seeded_greedy(*of), 1) for of in given]
    multiple = 2 * num_devices
    capacity = num_devices * limits.max_tokens_per_device
    if all(-(-batch.max() // multiple) * multiple <= capacity for batch in batches):
        plans_of[PADDED] = [(baselines.seeded_greedy(*of, multiple), 1) for of in given]
    for name, plans in plans_of.items():
        outcomes = [baselines.outcome(plan, pad, limits.seconds) for plan, pad in plans]
        record["strategies"][name] = dataclasses.asdict(_mean(outcomes))
    if PADDED in plans_of:
        padded = sum(sum(plan.lengths) for plan, _ in plans_of[PADDED])
        record["strategies"][PADDED]["padding"] = padded / record["tokens"] - 1
    seconds = record["strategies"][OURS]["seconds"]
    for of_strategy in record["strategies"].values():
        of_strategy["ours_is_faster_by"] = of_strategy["seconds"] / seconds
    record["above_lower_bound"] = seconds / record["lower_bound"] - 1
    own = record["strategies"][OURS]
    low = own["token_fill"] < LOW_FILL
    record["advice"] = advice(own["token_fill"], own["num_microbatches"]) if low else ""
    return record


def _mean(outcomes: Sequence[Outcome]) -> Outcome:
    """Return the mean of each figure over batches."""
    columns = zip(*(dataclasses.astuple(outcome) for outcome in outcomes), strict=True)
    return Outcome(*(float(np.mean(column)) for column in columns))
