"""Define attention masks as one interval of keys per query, and combine them with `&`.

Query i sees the keys whose global index lies in `[start_i, end_i)`. That holds for causal masks,
packed documents, sliding windows, prefix-LM and chunked-local attention. The intersection of two
intervals is an interval, so it also holds for every conjunction of these masks:

    mask = causal() & documents(segment_ids) & sliding_window(4096)

So two int32 vectors are the whole mask of a stream of any length, and no strategy, layout or kernel
needs to know which kind of mask it is. A mask is written in natural order, for streams of any
length; `Mask.intervals` computes its numbers. `ContextParallel.shard_batch` does so once per batch.
"""

import dataclasses
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, Integer

from hcp_jax.base import checks
from hcp_jax.sequence import arrays
from hcp_jax.sequence.arrays import Array
from hcp_jax.sequence.terms import (
    NO_LIMIT,
    Causal,
    ChunkedLocal,
    Documents,
    Given,
    Lengths,
    PrefixLM,
    SlidingWindow,
    Term,
)


class Intervals(NamedTuple):
    """For every query, the half-open interval of global key indices that it sees.

    `B1` is the batch size, or 1 if all rows share the mask. A query with an empty interval
    (`end <= start`) is padding: its output and gradients are zero.
    """

    start: Int32[Array, "B1 T"]
    end: Int32[Array, "B1 T"]


@arrays.pytree
@dataclasses.dataclass(frozen=True)
class Mask:
    """A conjunction of interval masks; a pytree, so that it passes through `jit`.

    Build one with `causal`, `documents`, `sliding_window`, `prefix_lm`, `chunked_local`,
    `bidirectional`, `lengths`, `intervals` or `from_dense`, and combine masks with `&`.

    >>> (causal() & sliding_window(2)).intervals(4).start.tolist()
    [[0, 0, 1, 2]]

    Attributes:
        terms: the conditions that are combined.
    """

    terms: tuple[Term, ...] = ()

    def __and__(self, other: "Mask") -> "Mask":
        """Return the mask under which a query sees the keys that both masks show it.

        Raises:
            ValueError: if the other one has been placed on devices: combine first, then place.
        """
        if not isinstance(other, Mask):
            return NotImplemented
        return Mask(self.terms + other.terms)

    @property
    def length(self) -> int | None:
        """The number of queries that the mask was written for; None if it fits any."""
        sizes = {term.length for term in self.terms if term.length is not None}
        if len(sizes) > 1:
            raise ValueError(
                f"the mask joins parts written for streams of different lengths {sorted(sizes)}; "
                "give all of them the length of the stream."
            )
        return sizes.pop() if sizes else None

    @property
    def looks_ahead(self) -> bool:
        """Whether queries may see keys that are padding at the end of the stream.

        False if some term excludes them, as `causal` and `lengths` do.
        """
        return all(term.looks_ahead for term in self.terms)

    def intervals(
        self, length: int, key_length: int | None = None, *, xp: ModuleType = np
    ) -> Intervals:
        """Return the interval of each of `length` queries, in natural order.

        Args:
            length: T. Queries past the mask's own length (padding) get empty intervals.
            key_length: S, the number of keys; `length` if None. Intervals given as numbers (with
                `hcp.intervals`) are clipped to S, whatever the number of queries.
            xp: `numpy` on the host, or `jax.numpy` if leaves are traced.

        Returns:
            Intervals clipped to `[0, key_length)`; `end == start` where a query sees nothing.

        Raises:
            ValueError: if the mask was written for more than `length` queries.
        """
        length = checks.integer("length", length, least=0)
        if key_length is not None:
            key_length = checks.integer("key_length", key_length, least=0)
        own = self.length
        key_length = length if key_length is None else key_length
        if own is not None and own > length:
            raise ValueError(
                f"the mask was written for {own} queries, but there are only {length}; "
                "give it the same tokens as the queries."
            )
        index = xp.arange(length if own is None else own, dtype=np.int32)[None]
        start, end = xp.zeros_like(index), xp.full_like(index, key_length)
        for term in self.terms:
            term_start, term_end = term.bounds(index, xp)
            start, end = xp.maximum(start, term_start), xp.minimum(end, term_end)
        start, end = xp.broadcast_arrays(start, xp.maximum(start, end))
        if own is not None and own < length:
            tail = ((0, 0), (0, length - own))
            start, end = xp.pad(start, tail), xp.pad(end, tail)
        return Intervals(start.astype(np.int32), end.astype(np.int32))


def causal() -> Mask:
    """Build the causal mask: query i sees keys `[0, i+1)`.

    >>> causal().intervals(3).end.tolist()
    [[1, 2, 3]]
    """
    return Mask((Causal(),))


def bidirectional() -> Mask:
    """Build the mask under which every query sees every key.

    That includes padding: if there is any, combine this mask with `lengths`.

    >>> bidirectional().intervals(3).end.tolist()
    [[3, 3, 3]]
    """
    return Mask()


def sliding_window(window: int, *, right: int = 0) -> Mask:
    """Build a window: query i sees itself, `window - 1` keys before it and `right` keys after it.

    Its interval is `[i - window + 1, i + right + 1)`. `local_window_size=(left, right)` of
    `jax.nn.dot_product_attention` is `sliding_window(left + 1, right=right)` here.

    Raises:
        ValueError: if `window` is less than 1 or `right` less than 0.

    >>> sliding_window(2, right=1).intervals(4).end.tolist()
    [[2, 3, 4, 4]]
    """
    window = checks.integer("window of sliding_window", window, least=1)
    right = checks.integer("right of sliding_window", right, least=0)
    return Mask((SlidingWindow(min(window, NO_LIMIT) - 1, min(right, NO_LIMIT - 1)),))


def chunked_local(chunk: int) -> Mask:
    """Cut the stream into chunks of `chunk` tokens; a query sees the keys of its own chunk.

    Combine it with `causal()` for the chunked attention of Llama 4.

    Raises:
        ValueError: if `chunk` is less than 1.

    >>> chunked_local(2).intervals(4).start.tolist()
    [[0, 0, 2, 2]]
    """
    chunk = checks.integer("chunk of chunked_local", chunk, least=1)
    return Mask((ChunkedLocal(min(chunk, NO_LIMIT)),))


def prefix_lm(prefix_length: int | Integer[Array, "B"]) -> Mask:
    """Build a prefix-LM mask: the first `prefix_length` tokens see each other, the rest is causal.

    Args:
        prefix_length: one number, or one per row.

    Raises:
        ValueError: unless they are integers, 0 or greater (not checked where they are traced).

    >>> prefix_lm(3).intervals(4).end.tolist()
    [[3, 3, 3, 4]]
    """
    return Mask((PrefixLM(_per_row("prefix_length of prefix_lm", prefix_length)),))


def lengths(
    length: int | Integer[Array, "B"],
    key_length: int | Integer[Array, "B"] | None = None,
) -> Mask:
    """Mark tokens at or past `length` as padding: no query sees them, and they see nothing.

    Args:
        length: one number, or one per row.
        key_length: number of real keys, if keys are not the same sequence as queries; `length` if
            None.

    Raises:
        ValueError: unless they are integers, 0 or greater (not checked where they are traced).

    >>> lengths(2, 3).intervals(4, 8).end.tolist()
    [[3, 3, 0, 0]]
    """
    queries = _per_row("length of lengths", length)
    if key_length is None:
        return Mask((Lengths(queries, queries),))
    return Mask((Lengths(queries, _per_row("key_length of lengths", key_length)),))


def documents(
    segment_ids: Integer[Array, "B1 T"] | Integer[Array, "T"],
    *,
    padding_id: int | None = None,
) -> Mask:
    """Separate packed documents: a query sees the keys of its own document only.

    Args:
        segment_ids: integers of any size and sign, equal for all tokens of one document. The
            tokens of a document must be contiguous. Ids need not be sorted, but two documents of
            a row must not have the same id.
        padding_id: the id of tokens that belong to no document (0 in the packing of grain, Flax,
            Megatron and Transformer Engine). They see nothing and no token sees them. They may
            occur anywhere between documents, any number of times.

    Raises:
        ValueError: if `segment_ids` are not integers, if an id occurs again after a different one
            (checked unless `segment_ids` is traced), or if the ids' dtype cannot hold
            `padding_id`.

    >>> documents([1, 1, 0, 2], padding_id=0).intervals(4).end.tolist()
    [[2, 2, 2, 4]]
    """
    ids = _integers("segment_ids", segment_ids)
    if ids.ndim not in (1, 2):
        raise ValueError(
            f"segment_ids must have shape [T] or [B, T], got {ids.dtype} of shape {ids.shape}."
        )
    ids = ids[None] if ids.ndim == 1 else ids
    if padding_id is not None:
        info = np.iinfo(ids.dtype)
        padding_id = checks.integer(
            f"padding_id of documents with ids of {ids.dtype}",
            padding_id,
            least=int(info.min),
            most=int(info.max),
        )
    if not arrays.is_traced(ids):
        # Renumber: 64-bit ids would be cut to 32 bits when they are copied to a device.
        ids = _renumbered(np.asarray(ids), padding_id)
        padding_id = None if padding_id is None else _PADDING_ID
    return Mask((Documents(ids, padding_id),))


def intervals(start: Integer[Array, "B1 T"], end: Integer[Array, "B1 T"]) -> Mask:
    """Build a mask from numbers: query i sees keys `[start_i, end_i)`.

    Args:
        start: an array or nested list of integers; values outside int32 are clipped to it.
        end: likewise; a query with `end <= start` sees nothing.

    Raises:
        ValueError: if the two are not integers of the same shape, `[B, T]` or `[1, T]`.

    >>> intervals([[0, 0]], [[1, 2]]).intervals(2).end.tolist()
    [[1, 2]]
    """
    start, end = _integers("start", start), _integers("end", end)
    if start.shape != end.shape or len(start.shape) != 2:
        raise ValueError(
            "start and end must have one shape [B, T] or [1, T], got "
            f"{start.shape} and {end.shape}."
        )
    return Mask((Given(_to_int32(start), _to_int32(end)),))


_PADDING_ID = -1  # the id of padding after `_renumbered`


def _renumbered(ids: np.ndarray, padding_id: int | None) -> np.ndarray:
    """Replace the ids `[B, T]` by the number of their document in the row, -1 for padding.

    Raises:
        ValueError: if the tokens of a document are not contiguous.
    """
    new = np.ones(ids.shape, bool)
    new[:, 1:] = ids[:, 1:] != ids[:, :-1]
    padding = np.zeros(ids.shape, bool) if padding_id is None else ids == padding_id
    for row, (row_ids, first) in enumerate(zip(ids, new & ~padding, strict=True)):
        values, counts = np.unique(row_ids[first], return_counts=True)
        if np.any(counts > 1):
            hint = (
                f"If {values[counts > 1][0]} is the id of padding, pass it as padding_id."
                if padding_id is None
                else "Padding inside a document is not supported: it would be seen."
            )
            raise ValueError(
                f"segment_ids of row {row} are not sorted into runs: id {values[counts > 1][0]} "
                "comes again after another one. Put the tokens of a document side by side, or give "
                f"the second stretch an id of its own. {hint}"
            )
    return np.where(padding, _PADDING_ID, np.cumsum(new, axis=1)).astype(np.int32)


def _integers(name: str, value: Any) -> Any:
    """Return `value` as an array of integers.

    Raises:
        ValueError: for other dtypes, booleans among them.
    """
    try:
        # A ShapeDtypeStruct takes the place of an array when a program is only compiled.
        x = value if arrays.has_shape(value) else np.asarray(value)
    except (TypeError, ValueError) as error:  # lists of unequal lengths
        raise ValueError(f"{name} must be integers of one shape: {error}") from None
    if isinstance(x, np.ndarray) and x is not value and x.size == 0:
        x = x.astype(np.int32)  # an empty list has no dtype of its own
    if not arrays.is_kind(x.dtype, np.integer):
        raise ValueError(f"{name} must be integers, got {x.dtype} of shape {x.shape}.")
    return x


def _to_int32(x: Any) -> Any:
    """Return integers as int32, clipped to its range."""
    if x.dtype == np.int32:
        return x
    own, wanted = np.iinfo(x.dtype), np.iinfo(np.int32)
    least, most = max(int(own.min), int(wanted.min)), min(int(own.max), int(wanted.max))
    return arrays.module_of(x).clip(x, least, most).astype(np.int32)


def _per_row(name: str, value: Any) -> Any:
    """Return one number, or one per row, as int32 of shape `[B1, 1]`."""
    x = _integers(name, value)
    if x.ndim > 1:
        raise ValueError(f"{name} must be one number, or one per row, got shape {x.shape}.")
    known = not arrays.is_traced(x) and getattr(x, "is_fully_addressable", True)
    if known and np.any(np.asarray(x) < 0):
        raise ValueError(f"{name} must be 0 or greater, got {np.asarray(x).min()}.")
    return _to_int32(x).reshape(-1, 1)
