"""Compute which pairs of query block and key block the kernels visit, before they start.

A pair is decided by a few numbers: the least and greatest start and end of the intervals of the
query block, and the least and greatest global index of the key block. A pair is

    visible  if the hull of the intervals meets the hull of the keys: it must be visited;
    full     if every query sees every key: it needs no mask.

Because masks are intervals, both sets are short to describe. If key blocks are sorted by global
index, those that a query block must visit are contiguous, for any runs. Under the usual masks,
whose ends do not decrease from one query to the next, the query blocks that see a key block are
contiguous too, if sorted by their ends. So each block has a `span` of an `order` of blocks:
`first … last` is visible, and `full_first … full_last` inside it is full. Other masks (any
intervals are allowed) only widen the spans: pairs that are visited needlessly are masked.

This is separate from the kernels because it is plain `jax.numpy` and is tested as such.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from hcp_jax.kernels.key_index import key_index
from hcp_jax.sequence.layout import KeyRuns
from hcp_jax.sequence.mask import Intervals

_FAR = jnp.iinfo(jnp.int32).max


class BlockMap(NamedTuple):
    """The blocks that each block of the other side visits.

    Attributes:
        order: block numbers in the order of visits; one row per mask (`B1`), or one for all.
        spans: (first, full_first, full_last, last), indices into `order`, for each block of the
            other side; one row per mask.
    """

    order: Int32[Array, "rows blocks"]
    spans: Int32[Array, "B1 others 4"]


class QueryBlocks(NamedTuple):
    """The intervals, padded with empty ones to whole blocks, and their extremes per block.

    Queries that see nothing do not count in the extremes: no block is visited or masked for them,
    because their results are discarded.
    """

    start: Int32[Array, "B1 Tp"]
    end: Int32[Array, "B1 Tp"]
    least_start: Int32[Array, "B1 Q"]
    greatest_start: Int32[Array, "B1 Q"]
    least_end: Int32[Array, "B1 Q"]
    greatest_end: Int32[Array, "B1 Q"]


class KeyBlocks(NamedTuple):
    """The global index of each key slot, -1 for padding, and the extremes per block."""

    global_index: Int32[Array, "Sp"]
    least: Int32[Array, "K"]
    greatest: Int32[Array, "K"]
    whole: Bool[Array, "K"]


def query_blocks(intervals: Intervals, block: int) -> QueryBlocks:
    """Cut the queries into blocks of size `block`."""
    start, end = (jnp.asarray(x) for x in intervals)
    tail = ((0, 0), (0, -start.shape[1] % block))
    start, end = jnp.pad(jnp.maximum(start, 0), tail), jnp.pad(end, tail)
    sees = (end > start).reshape(start.shape[0], -1, block)
    starts, ends = start.reshape(sees.shape), end.reshape(sees.shape)
    return QueryBlocks(
        start,
        end,
        least_start=jnp.min(jnp.where(sees, starts, _FAR), axis=2),
        greatest_start=jnp.max(jnp.where(sees, starts, -1), axis=2),
        least_end=jnp.min(jnp.where(sees, ends, _FAR), axis=2),
        greatest_end=jnp.max(jnp.where(sees, ends, -1), axis=2),
    )


def key_blocks(runs: KeyRuns, length: int, block: int) -> KeyBlocks:
    """Cut `length` key slots into blocks of size `block`."""
    index = jnp.pad(key_index(runs, length), (0, -length % block), constant_values=-1)
    by_block = index.reshape(-1, block)
    return KeyBlocks(
        index,
        least=jnp.min(jnp.where(by_block < 0, _FAR, by_block), axis=1),
        greatest=jnp.max(by_block, axis=1),
        whole=jnp.all(by_block >= 0, axis=1),
    )


def map_over_keys(queries: QueryBlocks, keys: KeyBlocks, one_run: bool) -> BlockMap:
    """Return the key blocks that each query block visits.

    With `one_run`, key blocks are in order of their global index already.
    """
    order = jnp.arange(keys.least.shape[0], dtype=jnp.int32)
    if not one_run:
        _, order = jax.lax.sort((keys.least, order), num_keys=1)
        keys = keys._replace(**{name: getattr(keys, name)[order] for name in _KEY_EXTREMES})
    return BlockMap(order[None], _spans(*_pairs(queries, keys)))


def map_over_queries(queries: QueryBlocks, keys: KeyBlocks) -> BlockMap:
    """Return the query blocks that each key block visits."""
    number = jnp.broadcast_to(
        jnp.arange(queries.least_start.shape[1], dtype=jnp.int32), queries.least_start.shape
    )
    *_, order = jax.lax.sort((queries.greatest_end, queries.least_start, number), num_keys=2)
    queries = queries._replace(
        **{
            name: jnp.take_along_axis(getattr(queries, name), order, axis=1)
            for name in _QUERY_EXTREMES
        }
    )
    visible, full = _pairs(queries, keys)
    return BlockMap(order, _spans(visible.swapaxes(1, 2), full.swapaxes(1, 2)))


_QUERY_EXTREMES = ("least_start", "greatest_start", "least_end", "greatest_end")
_KEY_EXTREMES = ("least", "greatest", "whole")


def _pairs(queries: QueryBlocks, keys: KeyBlocks) -> Any:
    """Return (visible, full), `[B1, Q, K]`; XLA fuses them with the reductions of `_spans`."""
    least_start, greatest_start, least_end, greatest_end = (
        getattr(queries, name)[..., None] for name in _QUERY_EXTREMES
    )
    least, greatest, whole = (getattr(keys, name)[None, None] for name in _KEY_EXTREMES)
    visible = (least_start <= greatest) & (greatest_end > least)
    inside = (greatest_start <= least) & (least_end > greatest)
    return visible, visible & inside & whole


def _spans(visible: Bool[Array, "B1 X Y"], full: Bool[Array, "B1 X Y"]) -> Int32[Array, "B1 X 4"]:
    """Return (first, full_first, full_last, last) for each X; ends are exclusive.

    `first … last` covers the visible Y. `full_first … full_last` is the first contiguous range of
    full Y; without a full Y it is empty, at `last`.
    """
    size = visible.shape[2]
    number = jnp.arange(size, dtype=jnp.int32)[None, None]
    last = jnp.max(jnp.where(visible, number + 1, 0), axis=2)
    first = jnp.minimum(jnp.min(jnp.where(visible, number, size), axis=2), last)
    full_first = jnp.minimum(jnp.min(jnp.where(full, number, size), axis=2), last)
    beyond = ~full & (number >= full_first[..., None])
    full_last = jnp.minimum(jnp.min(jnp.where(beyond, number, size), axis=2), last)
    return jnp.stack([first, full_first, full_last, last], axis=2).astype(jnp.int32)
