"""Give each stage its microbatch: numbers of its work, positions and mask; check microbatches."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from hcp_jax.dynamic.pipeline import Row
from hcp_jax.sequence.placed_mask import PlacedMask

LIVE, CHUNK, SLOT = range(3)
"""Columns of the numbers of a row of work."""


class Feed(NamedTuple):
    """Positions and mask of each stage's microbatch, for its forward and its backward pass."""

    forward: Any
    backward: Any


def work_numbers(row: Row) -> Int32[np.ndarray, "pp 3"]:
    """Return the work of each stage as numbers: whether it has any, its chunk and its slot."""
    work = [(0, 0, 0) if w is None else (1, w.chunk, w.slot) for w in row]
    return np.array(work, np.int32)


def stacked(batches: Sequence[Any]) -> Any:
    """Return the positions and masks of all stages, stacked."""
    arrays = [(batch["positions"], batch["mask"]) for batch in batches]
    return jax.tree.map(lambda *x: jnp.stack(x), *arrays)


def check_alike(batches: Sequence[Any]) -> None:
    """Check that one program serves all microbatches of a step.

    Raises:
        ValueError: if there is none, or their shapes or groups differ, or a mask is not placed.
    """
    if not batches:
        raise ValueError("a pipeline needs at least one microbatch, got none.")

    def kind(batch: Any) -> Any:
        return jax.tree.structure(batch), [(x.shape, x.dtype) for x in jax.tree.leaves(batch)]

    for number, batch in enumerate(batches):
        if not isinstance(batch["mask"], PlacedMask):
            raise ValueError(
                f"the mask of microbatch {number} is not placed; make microbatches with "
                "cp.shard_batch or hcp.place_microbatch."
            )
        if kind(batch) != kind(batches[0]):
            raise ValueError(
                f"microbatch {number} has other arrays, shapes or groups than microbatch 0: all "
                "microbatches of a step need one shape and, with groups, one widest_group."
            )
