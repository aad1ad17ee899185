"""Count the (query, key) pairs visible under a mask: in total, and per device and hop.

Attention's work is the number of visible pairs, not T². It is counted exactly, for any mask, from
its intervals. With `m(x) = Σ_i min(e_i, x) - Σ_i min(s_i, x)` over some queries i, the keys in
`[a, b)` that they see are `m(b) - m(a)`, because `[s, e)` is `[0, e)` less `[0, s)`. Both sums come
from one sort per chunk of queries, so that a million tokens take a fraction of a second.
"""

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float64, Int64

if TYPE_CHECKING:
    from hcp_jax.sequence.mask import Intervals


def chunk_pairs(intervals: "Intervals", chunks: int) -> Int64[np.ndarray, "chunks chunks"]:
    """Count the visible pairs between every chunk of queries and every chunk of keys of a stream.

    Args:
        intervals: key intervals of the queries in natural order, one row; T is a multiple of
            `chunks`.
        chunks: number of equal chunks that the stream is cut into.

    Raises:
        ValueError: if T is not a multiple of `chunks`, or there are several rows.

    >>> from hcp_jax.sequence.mask import causal
    >>> chunk_pairs(causal().intervals(8), 2)
    array([[10,  0],
           [16, 10]])
    """
    start, end = (np.asarray(x) for x in intervals)
    if start.shape[0] != 1 or start.shape[1] % chunks:
        raise ValueError(
            f"pairs are counted for one row whose length {chunks} chunks divide, got intervals of "
            f"shape {start.shape}."
        )
    size = start.shape[1] // chunks
    borders = np.arange(chunks + 1, dtype=np.int64) * size
    seen = [
        _sum_of_minimum(e, borders) - _sum_of_minimum(s, borders)
        for s, e in zip(start.reshape(chunks, size), end.reshape(chunks, size), strict=True)
    ]
    pairs: np.ndarray = np.diff(np.array(seen), axis=1)
    return pairs


def causal_chunk_pairs(
    seq_len: int, chunks: int, window: int | None = None
) -> Float64[np.ndarray, "chunks chunks"]:
    """Return `chunk_pairs` of a causal mask by formula, in constant time for any length.

    With `g(x) = max(x, 0)`, query i sees `g(i + 1 - a) - g(i + 1 - b)` of the keys in `[a, b)`,
    minus those that lie before its window. Sums of `g` over i are triangular numbers.

    Args:
        seq_len: T, a multiple of `chunks`.
        chunks: number of equal chunks that the stream is cut into.
        window: number of keys that a query sees, itself included; None for all earlier keys.

    Returns:
        Rows are chunks of queries, columns chunks of keys; exact up to 2**53 pairs per chunk.

    >>> causal_chunk_pairs(8, 2)
    array([[10.,  0.],
           [16., 10.]])
    """
    borders = np.arange(chunks + 1, dtype=np.float64) * (seq_len // chunks)

    def keys_below(shift: float) -> np.ndarray:
        distance = np.maximum(borders[:, None] - borders - shift, 0.0)
        sums = distance * (distance + 1.0) / 2.0
        return sums[:, :-1] - sums[:, 1:]

    seen = keys_below(0.0)
    if window is not None:
        seen = seen - keys_below(float(window))
    return np.diff(seen, axis=0)


def merge_chunks(
    table: Int64[np.ndarray, "fine fine"], chunks: int
) -> Int64[np.ndarray, "coarse coarse"]:
    """Return the `chunk_pairs` table of fewer chunks, by summing blocks of a finer table."""
    times = table.shape[0] // chunks
    merged: np.ndarray = table.reshape(chunks, times, chunks, times).sum(axis=(1, 3))
    return merged


def pairs_by_hop(
    table: Int64[np.ndarray, "chunks chunks"], cp_size: int, layout: str, ring_size: int
) -> Int64[np.ndarray, "ring hops"]:
    """Return the visible pairs of each ring rank's queries with the keys that it has at each hop.

    Args:
        table: `chunk_pairs` for the layout's chunks: 2C of them for zigzag, else C.
        cp_size: C, the number of devices that the stream is cut over.
        layout: "zigzag" or "contiguous".
        ring_size: P; each rank holds the chunks of C / P neighbouring devices.
    """
    # Imported here, because it imports jax, and `hcp plan --help` must not.
    from hcp_jax.sequence.layout import chunk_order

    order = chunk_order(cp_size, layout)
    ordered = table[np.ix_(order, order)]
    by_rank = merge_chunks(ordered, ring_size)
    rank = np.arange(ring_size)
    by_hop: np.ndarray = by_rank[rank[:, None], (rank[:, None] - rank) % ring_size]
    return by_hop


def _sum_of_minimum(values: np.ndarray, borders: np.ndarray) -> np.ndarray:
    """Return Σ_i min(values_i, x) for every x in borders."""
    ordered = np.sort(values).astype(np.int64)
    below = np.searchsorted(ordered, borders, side="right")
    total = np.concatenate([[0], np.cumsum(ordered)])
    sums: np.ndarray = total[below] + (ordered.size - below) * borders
    return sums
