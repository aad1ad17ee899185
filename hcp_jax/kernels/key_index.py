"""Expand key runs to one global index per key slot."""

import jax
import jax.numpy as jnp
from jaxtyping import Int32

from hcp_jax.sequence.layout import PADDING, KeyRuns


def key_index(runs: KeyRuns, length: int) -> Int32[jax.Array, "S"]:
    """Return the global index of each of `length` key slots; -1 for padding."""
    slot = jnp.arange(length, dtype=jnp.int32)
    starts, offsets = jnp.asarray(runs.starts), jnp.asarray(runs.offsets)
    # Dynamic context parallelism has thousands of runs. An unrolled binary search fuses well.
    run = jnp.searchsorted(offsets, slot, side="right", method="scan_unrolled") - 1
    to_index = jnp.append(starts - offsets[:-1], 2 * PADDING)  # global index minus slot
    return jnp.maximum(slot + to_index[run], -1).astype(jnp.int32)
