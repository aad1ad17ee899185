"""Define the conditions that masks are joined from: each gives every query one interval of keys.

A term is a small pytree: its arrays are leaves, its sizes are static. `mask.py` builds terms from
checked arguments and joins them.
"""

# ruff: noqa: D102 (`Term` says what each method does)

import dataclasses
from types import ModuleType
from typing import Any, dataclass_transform

import numpy as np

from hcp_jax.sequence import arrays

# Greater than the index of any key.
NO_LIMIT = np.iinfo(np.int32).max


class Term:
    """One condition on (query, key) pairs."""

    @property
    def length(self) -> int | None:
        """The number of queries that the term was written for; None if it fits any."""
        return None

    @property
    def looks_ahead(self) -> bool:
        """Whether a query may see later keys, which could be padding as far as the term knows."""
        return False

    def bounds(self, index: Any, xp: ModuleType) -> tuple[Any, Any]:
        """Return (start, end) of the queries `index`; each broadcasts against `[B1, T]`."""
        raise NotImplementedError


@dataclass_transform(frozen_default=True)
def _term(cls: Any) -> Any:
    """Make a frozen dataclass a pytree; its fields marked `_static` are not leaves."""
    return arrays.pytree(dataclasses.dataclass(frozen=True)(cls))


def _static() -> Any:
    return dataclasses.field(metadata={"static": True})


@_term
class Causal(Term):
    """Query i sees keys `[0, i+1)`."""

    def bounds(self, index: Any, xp: ModuleType) -> tuple[Any, Any]:
        return 0, index + 1


@_term
class SlidingWindow(Term):
    """A query sees some keys before it, itself, and some after it."""

    left: int = _static()  # keys before the query, at most NO_LIMIT - 1
    right: int = _static()  # keys after it

    @property
    def looks_ahead(self) -> bool:
        return self.right > 0

    def bounds(self, index: Any, xp: ModuleType) -> tuple[Any, Any]:
        # Written so that no sum overflows int32, however wide the window is.
        return index - self.left, xp.minimum(index, NO_LIMIT - 1 - self.right) + (self.right + 1)


@_term
class ChunkedLocal(Term):
    """A query sees the keys of its own chunk of the stream."""

    chunk: int = _static()

    @property
    def looks_ahead(self) -> bool:
        return True

    def bounds(self, index: Any, xp: ModuleType) -> tuple[Any, Any]:
        start = index - index % self.chunk
        return start, xp.minimum(start, NO_LIMIT - self.chunk) + self.chunk


@_term
class PrefixLM(Term):
    """The first tokens see each other; all later ones are causal."""

    prefix_length: Any  # [B1, 1]

    @property
    def looks_ahead(self) -> bool:
        return True

    def bounds(self, index: Any, xp: ModuleType) -> tuple[Any, Any]:
        return 0, xp.maximum(index + 1, self.prefix_length)


@_term
class Lengths(Term):
    """Only the first queries and keys are real."""

    queries: Any  # [B1, 1]
    keys: Any  # [B1, 1]; NO_LIMIT where only the queries have a length

    @property
    def looks_ahead(self) -> bool:
        return isinstance(self.keys, np.ndarray) and bool(np.any(self.keys >= NO_LIMIT))

    def bounds(self, index: Any, xp: ModuleType) -> tuple[Any, Any]:
        # Queries past the end are padding too: their intervals are empty.
        return 0, xp.where(index < self.queries, self.keys, 0)


@_term
class Documents(Term):
    """A query sees the keys of its own document."""

    segment_ids: Any  # [B1, T], any integers
    padding_id: int | None = _static()

    @property
    def length(self) -> int | None:
        return int(self.segment_ids.shape[1])

    def bounds(self, index: Any, xp: ModuleType) -> tuple[Any, Any]:
        ids = xp.asarray(self.segment_ids)
        token = xp.arange(ids.shape[1], dtype=np.int32)[None]
        differs = ids[:, 1:] != ids[:, :-1]
        edge = xp.ones((ids.shape[0], min(1, ids.shape[1])), bool)
        first = xp.where(xp.concatenate([edge, differs], axis=1), token, 0)
        last = xp.where(xp.concatenate([differs, edge], axis=1), token + 1, NO_LIMIT)
        start = _accumulate_max(first, xp)
        end = -_accumulate_max(-last[:, ::-1], xp)[:, ::-1]
        if self.padding_id is not None:
            end = xp.where(ids == self.padding_id, start, end)
        return start, end


@_term
class Given(Term):
    """A term that holds the intervals as numbers, one per query."""

    start: Any  # [B1, T]
    end: Any

    @property
    def length(self) -> int | None:
        return int(self.start.shape[1])

    def bounds(self, index: Any, xp: ModuleType) -> tuple[Any, Any]:
        return xp.asarray(self.start), xp.asarray(self.end)


@_term
class Alike(Term):
    """A term under which all queries of a row see the same keys; it fits any number of queries."""

    start: Any  # [B1, 1]
    end: Any

    def bounds(self, index: Any, xp: ModuleType) -> tuple[Any, Any]:
        return xp.asarray(self.start), xp.asarray(self.end)


def _accumulate_max(x: Any, xp: ModuleType) -> Any:
    if xp is np:
        return np.maximum.accumulate(x, axis=1)
    from jax import lax  # here alone: the host needs no jax

    return lax.cummax(x, axis=1)
