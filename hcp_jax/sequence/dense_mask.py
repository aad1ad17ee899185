"""Convert a dense boolean mask to one interval of keys per query, on the host or under `jit`.

Other libraries build such matrices; this library works with intervals everywhere else.
"""

import math
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Shaped

from hcp_jax.sequence import arrays
from hcp_jax.sequence.arrays import Array
from hcp_jax.sequence.mask import Mask
from hcp_jax.sequence.terms import NO_LIMIT, Alike, Given


def from_dense(
    mask: Shaped[Array, "T S"] | Shaped[Array, "B1 T S"] | Shaped[Array, "*B N1 T S"],
) -> Mask:
    """Return the mask of a boolean matrix in which each query sees one interval of keys.

    Causal, padding and windowed masks of Flax and other libraries have this form. The matrix takes
    T·S bytes: build long masks with `causal`, `documents` and the others instead. The output of a
    query that sees no key is zero, as everywhere in this library; in
    `jax.nn.dot_product_attention` and Flax it is the mean of all values.

    Args:
        mask: True (or 1) where query t sees key s, both in natural order. Heads (N1) must be
            equal; further batch dims become rows. T or S of size 1 stands for all queries or all
            keys, as in broadcasting.

    Raises:
        ValueError: for values other than True, False, 1 and 0 (a bias, for instance), for heads
            that differ, and for a query whose keys are not one interval (the error names the
            first). If `mask` is traced, the host checks this each time the program runs, and
            stops the program with a runtime error that contains the same message.

    >>> from_dense([[True, False], [True, True]]).intervals(2).end.tolist()
    [[1, 2]]
    """
    dense = mask if arrays.is_jax(mask) else np.asarray(mask)
    known = dense.dtype == bool or arrays.is_kind(dense.dtype, np.number)
    heads = dense.shape[-3] if dense.ndim > 3 else 1
    if dense.ndim < 2 or not known or not heads:
        raise ValueError(
            "from_dense needs a boolean mask [T, S], [B, T, S] or [B, N, T, S], got "
            f"{dense.dtype} of shape {dense.shape}."
        )
    traced = arrays.is_traced(dense)
    dense, xp = (dense, arrays.here) if traced else (np.asarray(dense), np)
    rows = math.prod(dense.shape[:-3] if dense.ndim > 3 else dense.shape[:-2])
    dense = dense.reshape(rows, heads, *dense.shape[-2:])
    shown = dense[:, 0] == 1
    start, end, whole = _runs_of_keys(shown, xp)
    sound = xp.all((dense == 0) | (dense == 1), axis=(1, 3)) & whole
    alike = xp.all(dense == dense[:, :1], axis=(1, 3))
    if traced:
        from jax import debug  # here alone: the host needs no jax

        debug.callback(_require_intervals, sound, alike)
    else:
        _require_intervals(sound, alike)
    if shown.shape[2] == 1:
        end = xp.where(end > 0, NO_LIMIT, 0).astype(np.int32)
    term = Alike if shown.shape[1] == 1 else Given
    return Mask((term(start, end),))


def _runs_of_keys(shown: Any, xp: ModuleType) -> tuple[Any, Any, Any]:
    """Return each query's first key, its end, and whether it sees all between; `[R, T]`."""
    index = xp.arange(shown.shape[2], dtype=np.int32)[None, None]
    end = xp.max(xp.where(shown, index + 1, 0), axis=2, initial=0)
    start = xp.min(xp.where(shown, index, end[..., None]), axis=2, initial=NO_LIMIT)
    start = xp.minimum(start, end)
    return start, end, xp.sum(shown, axis=2, dtype=np.int32) == end - start


def _require_intervals(sound: Any, alike: Any) -> None:
    """Raise for the first query of `[R, T]` that is not `sound` or whose heads are not `alike`."""
    sound, alike = np.asarray(sound), np.asarray(alike)
    wrong = np.argwhere(~(sound & alike))
    if not wrong.size:
        return
    row, query = (int(x) for x in wrong[0][-2:])
    what = (
        "its keys are no single interval of True"
        if alike[tuple(wrong[0])]
        else "its keys differ between heads"
    )
    raise ValueError(
        f"from_dense: query {query} of row {row} cannot be an interval mask: {what}. A mask is one "
        "interval of keys per query, the same for all heads, in natural order; biases and masks "
        "with gaps are not supported."
    )
