"""Remember which streams a context has padded, to warn if attention sees the padding.

Arrays do not record their padding, and attention must not see it silently.
"""

import warnings

import jax
import numpy as np

from hcp_jax.sequence.mask import Mask


class PaddingWarning(UserWarning):
    """Attention sees tokens that only pad a stream."""


class PaddedStreams:
    """The lengths of the streams that one context has padded; its contexts of layers share it.

    A context that was made apart has a record of its own, also if it is equal.
    """

    def __init__(self) -> None:
        self._padded: dict[int, set[int]] = {}
        self._warned: set[tuple[int, int]] = set()

    def add(self, length: int, padded: int) -> bool:
        """Record that a stream of `length` tokens was padded; return whether this is new."""
        lengths = self._padded.setdefault(padded, set())
        new = length not in lengths
        lengths.add(length)
        return new

    def warn_if_seen(self, mask: Mask, length: int, key_length: int) -> None:
        """Warn, once per length, if a mask lets queries see padding that was added.

        Args:
            mask: in natural order.
            length: T, padded.
            key_length: S, padded.
        """
        for real in sorted(self._padded.get(key_length, ())):
            if (real, key_length) in self._warned:
                continue
            if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(mask)):
                start, end = mask.intervals(length, key_length)
                if not np.any((end > np.maximum(start, real))[:, :real]):
                    continue
            self._warned.add((real, key_length))
            warnings.warn(
                f"attention with this mask also sees padding: cp.shard has padded {real} tokens to "
                f"{key_length}, and the mask does not say where the stream ends. Join it with "
                f"hcp.lengths({real}), or place it with cp.place(mask, {real}); if this stream is "
                f"another one, of {key_length} tokens, join it with hcp.lengths({key_length}).",
                PaddingWarning,
                stacklevel=3,
            )
