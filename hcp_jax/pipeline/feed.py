"""Give each stage its microbatch: numbers of its work, positions and mask; check microbatches."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Int32

from hcp_jax.dynamic.pipeline import Row
from hcp_jax.models.config import ModelConfig
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.sequence.placed_mask import PlacedMask

LIVE, CHUNK, SLOT = range(3)
"""Columns of the numbers of a row of work."""


class Given(NamedTuple):
    """What layers take of microbatches, those of all stages stacked or that of one stage.

    Attributes:
        positions: position of each token in its document.
        mask: placed.
        weights: weight of each position; None without experts, whose losses need them.
    """

    positions: Any
    mask: Any
    weights: Any


class Feed(NamedTuple):
    """What belongs to the forward passes of the stages, and what to their backward passes."""

    forward: Any
    backward: Any


def work_numbers(row: Row) -> Int32[np.ndarray, "pp 3"]:
    """Return the work of each stage as numbers: whether it has any, its chunk and its slot."""
    work = [(0, 0, 0) if w is None else (1, w.chunk, w.slot) for w in row]
    return np.array(work, np.int32)


def stacked(batches: Sequence[Any], model: ModelConfig) -> Given:
    """Return what the layers of all stages take, stacked."""
    given = [
        Given(batch["positions"], batch["mask"], None if model.moe is None else batch["weights"])
        for batch in batches
    ]
    found: Given = jax.tree.map(lambda *x: jnp.stack(x), *given)
    return found


def given_specs(given: Given, cp: ContextParallel, rows: int) -> Given:
    """Return the specs of `stacked`; each stage has what all stages take, and uses its own.

    They are small, and so nothing is sent between stages.

    Args:
        given: from `stacked`.
        cp: the context parallelism of a stage.
        rows: rows of a microbatch.
    """

    def cut(x: Any) -> Any:
        return cp.dp if x.shape[1] == rows else None

    # The devices of a row see all intervals of its mask.
    mask = given.mask
    intervals = jax.tree.map(lambda x: PartitionSpec(None, cut(x)), mask.intervals)
    runs = jax.tree.map(lambda _: PartitionSpec(), mask.runs)
    return Given(
        PartitionSpec(None, cut(given.positions), cp.cp_axes or None),
        dataclasses.replace(mask, intervals=intervals, runs=runs),
        None if given.weights is None else PartitionSpec(None, *cp.spec(2)),
    )


def end_arrays(f_batches: Sequence[Any], b_batches: Sequence[Any]) -> dict[str, Any]:
    """Return the arrays of the first stage's and of the last stage's microbatches."""
    last = f_batches[-1]
    names = ("targets", "weights", "mtp_targets", "mtp_weights")
    ends = {name: last[name] for name in names if name in last}
    return ends | {"in": f_batches[0]["tokens"], "out": b_batches[0]["tokens"]}


def check_alike(batches: Sequence[Any], model: ModelConfig) -> None:
    """Check that one program serves all microbatches of a step.

    Raises:
        ValueError: if there is none, or their shapes or groups differ, or a mask is not placed, or
            targets of multi-token prediction are missing.
    """
    if not batches:
        raise ValueError("a pipeline needs at least one microbatch, got none.")

    def kind(batch: Any) -> Any:
        return jax.tree.structure(batch), [(x.shape, x.dtype) for x in jax.tree.leaves(batch)]

    depths = model.mtp_depths
    for number, batch in enumerate(batches):
        if not isinstance(batch["mask"], PlacedMask):
            raise ValueError(
                f"the mask of microbatch {number} is not placed; make microbatches with "
                "cp.shard_batch or hcp.place_microbatch."
            )
        held = [batch[name].shape[2:] for name in ("mtp_targets", "mtp_weights") if name in batch]
        if depths and held != [(depths,)] * 2:
            raise ValueError(
                f"the model has mtp_depths={depths}, so microbatches need mtp_targets and "
                f"mtp_weights [B, T, {depths}]; microbatch {number} does not have them. "
                "hcp_jax.models.mtp.look_ahead makes them."
            )
        if kind(batch) != kind(batches[0]):
            raise ValueError(
                f"microbatch {number} has other arrays, shapes or groups than microbatch 0: all "
                "microbatches of a step need one shape and, with groups, one widest_group."
            )
