"""Define the layouts: the order in which a stream is cut over the context-parallel devices.

    a stream of 8 chunks over C = 4 devices

    contiguous   | 0 1 | 2 3 | 4 5 | 6 7 |     device 3 sees nearly everything, device 0 next to
                  dev 0 dev 1 dev 2 dev 3      nothing: a causal ring waits for device 3

    zigzag       | 0 7 | 1 6 | 2 5 | 3 4 |     chunks c and 2C-1-c: every device has the same
                  dev 0 dev 1 dev 2 dev 3      number of visible (query, key) pairs

A layout is a permutation of equal chunks, nothing more. It is flat over all C devices. A
hierarchical mesh needs no layout of its own, because the flat index c = p·A + a keeps the devices
of ring rank p side by side: after its all-to-all, ring rank p holds the chunks of devices
p·A … (p+1)·A - 1 in the same order.

Kernels do not know layouts. They get `KeyRuns`, the runs of consecutive keys on a device.

This module handles arrays and integers only; `parallel/context.py` adds the mesh.
"""

from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Int32

Layout = Literal["contiguous", "zigzag"]
LAYOUTS: tuple[str, ...] = get_args(Layout)

# The start of a run of padding: so far below 0 that every key in it has a negative index.
PADDING = -(2**30)


class KeyRuns(NamedTuple):
    """The runs of consecutive keys, among the keys that one call of the core gets.

    Run r fills the slots `offsets[r] … offsets[r+1]` of the key dim. The key in slot j of that run
    has global index `starts[r] + j - offsets[r]`. Runs may be empty. Slots at or past the last
    offset, and runs that start at `PADDING`, are padding that no query sees. In run r, query i
    therefore sees one interval of *slots*:
    `[max(0, start_i - starts[r]), min(length_r, end_i - starts[r])) + offsets[r]`.

    Attributes:
        starts: global index of the first key of each run.
        offsets: first slot of each run, followed by the end of the last run. Both may have a row
            for each device.
    """

    starts: Int32[Any, "*rows R"]
    offsets: Int32[Any, "*rows R+1"]


def runs_per_device(layout: str) -> int:
    """Return how many chunks of a stream a device holds: 1 for contiguous, 2 for zigzag."""
    return 2 if layout == "zigzag" else 1


def padded_length(length: int, cp_size: int, layout: str) -> int:
    """Return `length` rounded up to a multiple of the number of chunks."""
    chunks = runs_per_device(layout) * cp_size
    return -(-length // chunks) * chunks


def chunk_order(cp_size: int, layout: str) -> np.ndarray:
    """Return the natural chunk number of each chunk in layout order, device by device.

    >>> chunk_order(4, "zigzag")
    array([0, 7, 1, 6, 2, 5, 3, 4])
    """
    if layout == "contiguous":
        return np.arange(cp_size)
    c = np.arange(cp_size)
    return np.stack([c, 2 * cp_size - 1 - c], axis=1).reshape(-1)


def to_layout(x: Any, cp_size: int, layout: str, dim: int) -> Any:
    """Reorder `dim` from natural order to `layout`; its size must be a `padded_length`."""
    return _permute_chunks(x, chunk_order(cp_size, layout), dim)


def from_layout(x: Any, cp_size: int, layout: str, dim: int) -> Any:
    """Reorder `dim` from `layout` back to natural order: the inverse of `to_layout`."""
    return _permute_chunks(x, np.argsort(chunk_order(cp_size, layout)), dim)


def global_index(length: int, cp_size: int, layout: str) -> Int32[np.ndarray, "T"]:
    """Return the global index of each token in layout order."""
    return to_layout(np.arange(length, dtype=np.int32), cp_size, layout, 0)


def ring_runs(length: int, cp_size: int, layout: str, ring_size: int) -> KeyRuns:
    """Return the key runs of every ring rank as stacked rows: `starts` is `[ring_size, R]`.

    A ring rank holds the chunks of cp_size / ring_size neighbouring devices, one after the other.
    All ranks have runs of the same lengths, so one row of offsets serves them all. Chunks that are
    adjacent in the stream and in memory on every rank are merged into one run.

    Args:
        length: number of tokens in the whole stream, padded.
        cp_size: C, the number of devices that the stream is cut over.
        layout: "contiguous" or "zigzag".
        ring_size: how many parts the keys are in; 1 if every device has gathered all keys.
    """
    order = chunk_order(cp_size, layout).reshape(ring_size, -1)
    chunk = length // order.size
    joins = np.all(np.diff(order, axis=1) == 1, axis=0)
    begins = np.flatnonzero(np.concatenate([[True], ~joins]))
    offsets = np.append(begins, order.shape[1]) * chunk
    return KeyRuns((order[:, begins] * chunk).astype(np.int32), offsets.astype(np.int32))


def _permute_chunks(x: Any, order: np.ndarray, dim: int) -> Any:
    dim %= x.ndim
    size, chunks = x.shape[dim], order.size
    if size % chunks:
        raise ValueError(
            f"dim {dim} has {size} tokens, which {chunks} chunks do not divide; pad it to "
            f"{-(-size // chunks) * chunks} first (ContextParallel.shard does)."
        )
    if np.array_equal(order, np.arange(chunks)):
        return x
    split = x.reshape(*x.shape[:dim], chunks, size // chunks, *x.shape[dim + 1 :])
    return split.take(order, axis=dim).reshape(x.shape)
