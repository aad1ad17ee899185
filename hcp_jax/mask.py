"""Attention masks as one interval of keys per query, and their algebra.

Query i sees the keys whose global index lies in `[start_i, end_i)`. That holds for causal masks,
packed documents, sliding windows, prefix-LM, chunked-local attention, and, because two intervals
meet in an interval, for every conjunction of them:

    mask = causal() & documents(segment_ids) & sliding_window(4096)

So two int32 vectors are the whole mask of a stream, however long, and no strategy, layout or kernel
needs to know what the mask *means*. A mask is written in natural order, for streams of any length;
`Mask.intervals` turns it into numbers. `ContextParallel.shard_batch` does that once per batch.
"""

import dataclasses
from types import ModuleType
from typing import Any, NamedTuple, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from hcp_jax.layout import KeyRuns

_NO_LIMIT = np.iinfo(np.int32).max


class Intervals(NamedTuple):
    """For every query, the half-open interval of global key indices that it sees.

    `B1` is the batch size, or 1 where all rows share the mask. A query whose interval is empty
    (`end <= start`) is padding: it gives zeros and zero gradients.
    """

    start: Int32[jax.Array | np.ndarray, "B1 T"]
    end: Int32[jax.Array | np.ndarray, "B1 T"]


class Placement(NamedTuple):
    """Where a placed mask's queries lie, and for which keys it was placed.

    Attributes:
        layout: the order of the queries.
        cp_size: the number of devices that they are cut over.
        groups: the sizes of the groups of devices, under dynamic context parallelism.
        key_length: padded number of keys that the mask was placed for; None under groups.
    """

    layout: str
    cp_size: int
    groups: tuple[int, ...] | None = None
    key_length: int | None = None


class _Term:
    """One condition on (query, key) pairs."""

    @property
    def length(self) -> int | None:
        """The number of queries that it was written for; None if it fits any."""
        return None

    @property
    def looks_ahead(self) -> bool:
        """Whether a query may see keys behind it of which the term does not say that they exist."""
        return False

    def bounds(self, index: Any, xp: ModuleType) -> tuple[Any, Any]:
        """(start, end) of the queries `index`; each broadcasts against `[B1, T]`."""
        raise NotImplementedError


@dataclass_transform(frozen_default=True)
def _term(cls):
    """A frozen dataclass whose fields marked `static` are not leaves of the pytree."""
    cls = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(cls)
    static = [f.name for f in fields if f.metadata.get("static")]
    data = [f.name for f in fields if f.name not in static]
    return jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=static)


def _static() -> Any:
    return dataclasses.field(metadata={"static": True})


@_term
class _Causal(_Term):
    def bounds(self, index, xp):
        return 0, index + 1


@_term
class _SlidingWindow(_Term):
    window: int = _static()

    def bounds(self, index, xp):
        return index - (self.window - 1), index + 1


@_term
class _ChunkedLocal(_Term):
    chunk: int = _static()

    @property
    def looks_ahead(self):
        return True

    def bounds(self, index, xp):
        start = index - index % self.chunk
        return start, start + self.chunk


@_term
class _PrefixLM(_Term):
    prefix_length: Any  # [B1, 1]

    @property
    def looks_ahead(self):
        return True

    def bounds(self, index, xp):
        return 0, xp.maximum(index + 1, self.prefix_length)


@_term
class _Lengths(_Term):
    lengths: Any  # [B1, 1]

    def bounds(self, index, xp):
        # A query past the end is padding too: its interval is empty.
        return 0, xp.where(index < self.lengths, self.lengths, 0)


@_term
class _Documents(_Term):
    segment_ids: Any  # [B1, T]
    padding_id: int | None = _static()

    @property
    def length(self):
        return self.segment_ids.shape[1]

    def bounds(self, index, xp):
        ids = xp.asarray(self.segment_ids)
        place = xp.arange(ids.shape[1], dtype=np.int32)
        differs = ids[:, 1:] != ids[:, :-1]
        edge = xp.ones((ids.shape[0], 1), bool)
        first = xp.where(xp.concatenate([edge, differs], axis=1), place, 0)
        last = xp.where(xp.concatenate([differs, edge], axis=1), place + 1, _NO_LIMIT)
        start = _accumulate_max(first, xp)
        end = -_accumulate_max(-last[:, ::-1], xp)[:, ::-1]
        if self.padding_id is not None:
            end = xp.where(ids == self.padding_id, start, end)
        return start, end


@_term
class _Given(_Term):
    start: Any  # [B1, T]
    end: Any

    @property
    def length(self):
        return self.start.shape[1]

    def bounds(self, index, xp):
        return xp.asarray(self.start), xp.asarray(self.end)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """A conjunction of interval masks; a pytree, so that it passes through `jit`.

    Build one with `causal`, `documents`, `sliding_window`, `prefix_lm`, `chunked_local`,
    `bidirectional`, `lengths` or `intervals`, and join them with `&`.

    >>> (causal() & sliding_window(2)).intervals(4).start.tolist()
    [[0, 0, 1, 2]]

    Attributes:
        terms: the masks that are joined.
        placement: the layout that it has been placed in; None if it is in natural order.
        runs: where its keys lie, if it was placed under a group layout: a row for every device.
    """

    terms: tuple[_Term, ...] = ()
    placement: Placement | None = dataclasses.field(default=None, metadata={"static": True})
    runs: KeyRuns | None = None

    def __and__(self, other: "Mask") -> "Mask":
        """The keys that both masks show.

        Raises:
            ValueError: if one of them has been placed in a layout: compose first, place after.
        """
        if not isinstance(other, Mask):
            return NotImplemented
        if self.placement is not None or other.placement is not None:
            raise ValueError(
                "a mask that shard_batch has placed cannot be joined with another; "
                "join them with & in natural order, before shard_batch."
            )
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
        """Whether queries may see keys that only pad the stream.

        That is so unless some part of the mask ends before them: `causal`, say, or `lengths`.
        """
        return all(term.looks_ahead for term in self.terms)

    def intervals(
        self, length: int, key_length: int | None = None, *, xp: ModuleType = np
    ) -> Intervals:
        """The interval of each of `length` queries, in natural order.

        Args:
            length: T. Queries past the mask's own length (padding) get empty intervals.
            key_length: S, the number of keys; `length` if None. A mask from `intervals` sees the
                keys that it was given, up to S, whatever the number of its own queries.
            xp: `numpy` (on the host), or `jax.numpy` (where leaves are traced).

        Returns:
            Clipped to `[0, key_length)`; `end == start` where a query sees nothing.

        Raises:
            ValueError: if the mask was written for more than `length` queries.
        """
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
    """Query i sees keys `[0, i+1)`."""
    return Mask((_Causal(),))


def bidirectional() -> Mask:
    """Every query sees every key. Padding included: join it with `lengths` where there is some."""
    return Mask()


def sliding_window(window: int) -> Mask:
    """Query i sees itself and the `window - 1` keys before it: `[i-window+1, i+1)`.

    Raises:
        ValueError: if `window` is less than 1.
    """
    return Mask((_SlidingWindow(_positive("sliding_window", "window", window)),))


def chunked_local(chunk: int) -> Mask:
    """The stream in chunks of `chunk` tokens; a query sees the keys of its own chunk.

    Join it with `causal()` for the masks of the Llama 4 kind.

    Raises:
        ValueError: if `chunk` is less than 1.
    """
    return Mask((_ChunkedLocal(_positive("chunked_local", "chunk", chunk)),))


def prefix_lm(prefix_length: int | Int32[jax.Array | np.ndarray, "B"]) -> Mask:
    """The first `prefix_length` tokens see each other; all later ones are causal.

    Args:
        prefix_length: one number, or one per row.
    """
    return Mask((_PrefixLM(_per_row("prefix_lm", prefix_length)),))


def lengths(length: int | Int32[jax.Array | np.ndarray, "B"]) -> Mask:
    """Only the first `length` tokens are real: none sees the others, and those see nothing.

    Args:
        length: one number, or one per row.
    """
    return Mask((_Lengths(_per_row("lengths", length)),))


def documents(
    segment_ids: Int32[jax.Array | np.ndarray, "B1 T"] | Int32[jax.Array | np.ndarray, "T"],
    *,
    padding_id: int | None = None,
) -> Mask:
    """Documents packed one behind the other; a query sees the keys of its own document.

    Args:
        segment_ids: equal for the tokens of one document, which stand side by side. Documents may
            have any length; ids need not be sorted, only not come again.
        padding_id: the id of tokens that belong to no document (0 in grain's and Flax's packing);
            they see nothing.

    Raises:
        ValueError: if an id comes again after another one (checked unless `segment_ids` is traced).
    """
    ids = segment_ids if isinstance(segment_ids, jax.Array) else np.asarray(segment_ids)
    if ids.ndim == 1:
        ids = ids[None]
    if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"segment_ids must be integers of shape [T] or [B, T], got {ids.dtype} of shape "
            f"{tuple(segment_ids.shape)}."
        )
    if not isinstance(ids, jax.core.Tracer):
        _require_runs(np.asarray(ids))
    return Mask((_Documents(ids, padding_id),))


def intervals(
    start: Int32[jax.Array | np.ndarray, "B1 T"], end: Int32[jax.Array | np.ndarray, "B1 T"]
) -> Mask:
    """Any mask of this kind, given as numbers: query i sees keys `[start_i, end_i)`.

    Raises:
        ValueError: if the two are not integers of one shape, `[B, T]` or `[1, T]`.
    """
    if start.shape != end.shape or len(start.shape) != 2:
        raise ValueError(
            "start and end must have one shape [B, T] or [1, T], got "
            f"{start.shape} and {end.shape}."
        )
    for name, x in (("start", start), ("end", end)):
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"{name} must be integers, got {x.dtype}.")
    return Mask((_Given(start, end),))


def _accumulate_max(x, xp):
    return np.maximum.accumulate(x, axis=1) if xp is np else jax.lax.cummax(x, axis=1)


def _positive(name: str, argument: str, value: int) -> int:
    if not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} needs {argument} >= 1, got {value!r}.")
    return int(value)


def _per_row(name: str, value: Any) -> Any:
    value = value if isinstance(value, jax.Array) else np.asarray(value, np.int32)
    if value.ndim > 1:
        raise ValueError(f"{name} needs one number, or one per row, got shape {value.shape}.")
    return value.reshape(-1, 1)


def _require_runs(ids: np.ndarray) -> None:
    for row, of_row in enumerate(ids):
        firsts = of_row[np.flatnonzero(np.concatenate([[True], of_row[1:] != of_row[:-1]]))]
        values, counts = np.unique(firsts, return_counts=True)
        if np.any(counts > 1):
            raise ValueError(
                f"segment_ids of row {row} are not sorted into runs: id {values[counts > 1][0]} "
                "comes again after another one. Put the tokens of a document side by side, or give "
                "the second stretch an id of its own."
            )
