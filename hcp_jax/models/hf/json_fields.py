"""Read the fields of a config.json, and refuse those of a wrong type or out of bounds.

The file is not trusted. JSON has values that are not sizes (1.5, true, "32", NaN, 1e999); without
these checks they would fail much later, or compute something else.
"""

import math
from collections.abc import Mapping
from typing import Any

from hcp_jax.base.terminal import printable

SIZES = {
    "vocab_size": 2**24,
    "num_hidden_layers": 2**12,
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14,
    "head_dim": 2**14,
}
"""Largest allowed value of each size of a model, far above existing models."""

MAX_TOKENS = 2**40
"""Longest allowed context or window, in tokens."""


class Fields:
    """Fields of one mapping.

    Args:
        values: the mapping.
        place: name of the mapping in errors.
    """

    def __init__(self, values: Mapping[str, Any], place: str):
        self.values, self.place = values, place

    def whole(self, key: str, most: int = MAX_TOKENS, least: int = 1) -> int:
        """Return a whole number from `least` to `most`.

        Raises:
            ValueError: if the field is missing or anything else.
        """
        value = self.values.get(key)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.wrong(key, "an integer")
        if not least <= value <= most:
            raise self.wrong(key, f"an integer from {least} to {most}")
        return value

    def whole_or_none(self, key: str, most: int = MAX_TOKENS) -> int | None:
        """Return the same, or None if the field is missing or null."""
        return None if self.values.get(key) is None else self.whole(key, most)

    def size(self, key: str) -> int:
        """Return a field of `SIZES`, checked against its bound."""
        return self.whole(key, SIZES[key])

    def number(self, key: str, low: float, high: float) -> float:
        """Return a finite number from `low` to `high`, as `whole` does."""
        value = self.values.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.wrong(key, "a number")
        if not low <= value <= high:  # also refuses NaN
            raise self.wrong(key, f"a number from {low:g} to {high:g}")
        return float(value)

    def number_or_none(self, key: str, low: float, high: float) -> float | None:
        """Return the same, or None if the field is missing or null."""
        return None if self.values.get(key) is None else self.number(key, low, high)

    def numbers_or_none(self, key: str, low: float, high: float) -> tuple[float, ...] | None:
        """Return a list of at most 4096 finite numbers; None if the field is missing or null."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) > 4096:
            raise self.wrong(key, "a list of numbers")
        inside = Fields({f"{key}[{i}]": one for i, one in enumerate(value)}, self.place)
        return tuple(inside.number(name, low, high) for name in inside.values)

    def flag(self, key: str, default: bool) -> bool:
        """Return true or false, or the default if the field is missing or null."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return default if value is None else value

    def mapping(self, key: str) -> "Fields":
        """Return the fields of a mapping inside this one; none if it is missing or null."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(key, "keys and values")
        return Fields(value or {}, f"{self.place}: {key}")

    def wrong(self, key: str, needed: str) -> ValueError:
        """Return the error for a field that does not have the needed value."""
        value: Any = self.values.get(key)
        large = isinstance(value, int) and abs(value) > 10**30
        got = f"about 1e{math.log10(abs(value)):.0f}" if large else printable(repr(value), 80)
        return ValueError(f"{self.place}: {key} must be {needed}, got {got}.")
