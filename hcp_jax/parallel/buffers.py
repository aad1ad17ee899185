"""Apply a function to every array of a tree along its own sequence dim; knows no mesh.

`ContextParallel.shard_buffers` and `unshard_buffers` use it.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from hcp_jax.base import checks
from hcp_jax.sequence.mask import Mask
from hcp_jax.sequence.placed_mask import PlacedMask


def map_buffers(
    function: Callable[[Any, int], Any], tree: Any, seq_dims: Any, padded: Callable[[int], int]
) -> Any:
    """Return the tree with `function(array, dim)` in place of every array that has a sequence dim.

    Args:
        function: called with an array and its sequence dim, counted from 0.
        tree: arrays of one length along their sequence dims.
        seq_dims: see `ContextParallel.shard_buffers`.
        padded: function from a length to the next one that is a whole layout.

    Raises:
        ValueError: see `ContextParallel.shard_buffers`.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_leaf)
    dims = _dims_of_leaves(tree, seq_dims)
    found: list[int | None] = []
    lengths: dict[str, int] = {}
    for (path, leaf), dim in zip(leaves, dims, strict=True):
        name = f"buffers{jax.tree_util.keystr(path)}"
        found.append(_dim_of_leaf(name, leaf, dim))
        if found[-1] is not None:
            lengths[name] = leaf.shape[found[-1]]
    _require_one_whole_length(lengths, padded)
    return jax.tree.unflatten(
        structure,
        [x if d is None else function(x, d) for (_, x), d in zip(leaves, found, strict=True)],
    )


def _is_leaf(x: Any) -> bool:
    return x is None or isinstance(x, Mask | PlacedMask)


def _dims_of_leaves(tree: Any, seq_dims: Any) -> list[Any]:
    """Return a sequence dim for every leaf; one dim can stand for a whole subtree."""
    try:
        # Leaves are replaced by 0: `broadcast` then sees the structure of the tree alone.
        shape = jax.tree.map(lambda _: 0, tree, is_leaf=_is_leaf)
        spread = jax.tree.broadcast(seq_dims, shape, is_leaf=_is_leaf)
    except ValueError as error:
        want = jax.tree.structure(tree, is_leaf=_is_leaf)
        got = jax.tree.structure(seq_dims, is_leaf=_is_leaf)
        raise ValueError(
            f"seq_dims does not fit buffers: buffers are {want}, seq_dims {got}. Give one dim for "
            "all of them, or the same containers with one dim in place of each array (or of a "
            "container whose arrays share it)."
        ) from error
    return jax.tree.leaves(spread, is_leaf=_is_leaf)


def _dim_of_leaf(name: str, leaf: Any, dim: Any) -> int | None:
    if leaf is None or dim is None:
        return None
    if isinstance(leaf, Mask | PlacedMask):
        raise ValueError(
            f"{name} is a mask, which has no sequence dim. Pass it to attention as it is, put it "
            "on the devices with cp.place(mask, T), or give it the seq_dim None."
        )
    if not isinstance(leaf, jax.Array | np.ndarray):
        raise ValueError(
            f"{name} must be an array, got {type(leaf).__name__}. Give leaves without a sequence "
            "dim the seq_dim None."
        )
    if leaf.ndim == 0:
        raise ValueError(f"{name} is a scalar, without a sequence dim; give it the seq_dim None.")
    return checks.dimension(f"the seq_dim of {name}, of shape {leaf.shape},", dim, leaf.ndim)


def _require_one_whole_length(lengths: dict[str, int], padded: Callable[[int], int]) -> None:
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"buffers must have one length along their seq_dims, got {lengths}: tokens of the same "
            "position must lie on the same device. Check the seq_dims, cut tables of positions to "
            "the length of the stream, and shard streams of other lengths (the keys of cross "
            "attention) in a call of their own."
        )
    for name, length in lengths.items():
        if padded(length) != length:
            raise ValueError(
                f"{name} has {length} tokens, which do not divide into a whole layout. Pad all "
                f"buffers to {padded(length)} and join the mask with hcp.lengths({length}), or use "
                "cp.shard_batch, which pads arrays and masks together."
            )
