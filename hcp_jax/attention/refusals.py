"""Detect mistakes in a call of attention that would silently give wrong numbers.

The errors have their own types, so that `hcp.check` can tell these mistakes apart.
"""

from typing import Any

import jax

from hcp_jax.parallel.context import ContextParallel
from hcp_jax.parallel.placing import require_ids_of_all_tokens
from hcp_jax.sequence.mask import Mask
from hcp_jax.sequence.placed_mask import PlacedMask


class CutSequenceError(ValueError):
    """Attention was called without `cp` on arrays that are cut along the sequence."""


def require_whole_call(
    cp: ContextParallel | None, mask: Mask | PlacedMask | None, q: Any, k: Any, v: Any
) -> None:
    """Raise if the shardings or lengths of a call show a mistake.

    Args:
        cp: as in `dot_product_attention`.
        mask: as in `dot_product_attention`.
        q: queries `[*B, T, N, H]`. The sharding is known for arrays, and for tracers over Explicit
            axes.
        k: keys, likewise.
        v: values, likewise.

    Raises:
        CutSequenceError: if `cp` is None and the sequence is cut over several devices.
        MaskLengthError: if an unplaced mask is for another length than the queries had before
            `cp.shard` padded them.
    """
    if cp is None:
        for name, x in (("q", q), ("k", k), ("v", v)):
            if _is_cut(x, x.ndim - 3):
                raise CutSequenceError(
                    f"{name} is cut along its sequence over several devices, but attention was "
                    "called without cp, which takes tokens to be in natural order on one device. "
                    "Pass cp=cp; or bring the arrays back first with cp.unshard."
                )
    if not isinstance(mask, Mask):
        return
    if cp is not None and _inside_shard_map(cp):
        return  # lengths there are a device's own
    require_ids_of_all_tokens(cp, mask, q.shape[-3])


def _is_cut(x: Any, dim: int) -> bool:
    """Return whether `x` is known to be cut over several devices along `dim`."""
    if not isinstance(x, jax.Array):
        return False
    if isinstance(x, jax.core.Tracer):  # only axes of type Explicit show in a tracer's type
        return jax.typeof(x).sharding.spec[dim] is not None
    return x.sharding.shard_shape(x.shape)[dim] < x.shape[dim]


def _inside_shard_map(cp: ContextParallel) -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and bool(set(cp.cp_axes) & set(mesh.manual_axes))
