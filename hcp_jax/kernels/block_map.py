"""Which pairs of query block and key block the kernels visit, found by XLA beforehand.

Two small facts decide a pair: the least and greatest start and end of the intervals of the query
block, and the least and greatest global index of the key block. A pair is

    visible  if the hull of the intervals meets the hull of the keys: it must be visited;
    full     if every query sees every key: it needs no mask.

Intervals make both sets short to tell. In order of their global index, the key blocks that a query
block must visit stand side by side, whatever the runs are; and under the usual masks, whose ends
never fall from one query to the next, so do the query blocks that see a key block, in order of
their ends. So a kernel walks along an `order` over a `span`: `first … last` is visible, and
`full_first … full_last` within it full. A mask of another kind (any intervals are allowed) only
widens spans: what is then visited in vain is masked away.

It stands apart from the kernels because it is plain `jax.numpy`, tested as such.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from hcp_jax.sequence.layout import KeyRuns, key_index
from hcp_jax.sequence.mask import Intervals

_FAR = jnp.iinfo(jnp.int32).max


class Walk(NamedTuple):
    """The blocks that each block of the other side visits.

    Attributes:
        order: block numbers in the order of the walk; one row per mask (`B1`), or one for all.
        spans: first, full_first, full_last, last: places in `order`. `B1` rows, one entry per
            block of the other side.
    """

    order: Int32[Array, "rows blocks"]
    spans: Int32[Array, "B1 others 4"]


class QueryBlocks(NamedTuple):
    """The intervals, padded with empty ones to whole blocks, and their extremes per block.

    Queries that see nothing have no say in the extremes: no block is visited for them, and none
    is masked for them, because what they compute is thrown away.
    """

    start: Int32[Array, "B1 Tp"]
    end: Int32[Array, "B1 Tp"]
    least_start: Int32[Array, "B1 Q"]
    greatest_start: Int32[Array, "B1 Q"]
    least_end: Int32[Array, "B1 Q"]
    greatest_end: Int32[Array, "B1 Q"]


class KeyBlocks(NamedTuple):
    """The global index of each key place, -1 for padding, and the extremes per block."""

    global_index: Int32[Array, "Sp"]
    least: Int32[Array, "K"]
    greatest: Int32[Array, "K"]
    whole: Bool[Array, "K"]


def query_blocks(intervals: Intervals, block: int) -> QueryBlocks:
    """Cut the queries into blocks of `block`."""
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
    """Cut `length` key places into blocks of `block`."""
    index = jnp.pad(key_index(runs, length), (0, -length % block), constant_values=-1)
    by_block = index.reshape(-1, block)
    return KeyBlocks(
        index,
        least=jnp.min(jnp.where(by_block < 0, _FAR, by_block), axis=1),
        greatest=jnp.max(by_block, axis=1),
        whole=jnp.all(by_block >= 0, axis=1),
    )


def walk_over_keys(queries: QueryBlocks, keys: KeyBlocks, one_run: bool) -> Walk:
    """For each query block, the key blocks it visits. `one_run`: they are in order as they lie."""
    order = jnp.arange(keys.least.shape[0], dtype=jnp.int32)
    if not one_run:
        _, order = jax.lax.sort((keys.least, order), num_keys=1)
        keys = keys._replace(**{name: getattr(keys, name)[order] for name in _KEY_FACTS})
    return Walk(order[None], _spans(*_pairs(queries, keys)))


def walk_over_queries(queries: QueryBlocks, keys: KeyBlocks) -> Walk:
    """For each key block, the query blocks that visit it."""
    place = jnp.broadcast_to(
        jnp.arange(queries.least_start.shape[1], dtype=jnp.int32), queries.least_start.shape
    )
    *_, order = jax.lax.sort((queries.greatest_end, queries.least_start, place), num_keys=2)
    queries = queries._replace(
        **{
            name: jnp.take_along_axis(getattr(queries, name), order, axis=1)
            for name in _QUERY_FACTS
        }
    )
    visible, full = _pairs(queries, keys)
    return Walk(order, _spans(visible.swapaxes(1, 2), full.swapaxes(1, 2)))


_QUERY_FACTS = ("least_start", "greatest_start", "least_end", "greatest_end")
_KEY_FACTS = ("least", "greatest", "whole")


def _pairs(queries: QueryBlocks, keys: KeyBlocks):
    """(visible, full), `[B1, Q, K]`; never in memory, since `_spans` reduces them at once."""
    least_start, greatest_start, least_end, greatest_end = (
        getattr(queries, name)[..., None] for name in _QUERY_FACTS
    )
    least, greatest, whole = (getattr(keys, name)[None, None] for name in _KEY_FACTS)
    visible = (least_start <= greatest) & (greatest_end > least)
    inside = (greatest_start <= least) & (least_end > greatest)
    return visible, visible & inside & whole


def _spans(visible: Bool[Array, "B1 X Y"], full: Bool[Array, "B1 X Y"]) -> Int32[Array, "B1 X 4"]:
    """First and last (excluded) visible Y, and around the first full one the stretch of full ones.

    Without a full one that stretch is empty, at `last`.
    """
    size = visible.shape[2]
    place = jnp.arange(size, dtype=jnp.int32)[None, None]
    last = jnp.max(jnp.where(visible, place + 1, 0), axis=2)
    first = jnp.minimum(jnp.min(jnp.where(visible, place, size), axis=2), last)
    full_first = jnp.minimum(jnp.min(jnp.where(full, place, size), axis=2), last)
    beyond = ~full & (place >= full_first[..., None])
    full_last = jnp.minimum(jnp.min(jnp.where(beyond, place, size), axis=2), last)
    return jnp.stack([first, full_first, full_last, last], axis=2).astype(jnp.int32)
