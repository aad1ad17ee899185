"""Check the numbers that users pass, with one wording for every public function; needs no jax."""

import math
import operator
from typing import Any

import numpy as np

# Beyond these, float32 loses x / cap or cap * tanh(x / cap) for common logits x.
_LEAST_CAP, _GREATEST_CAP = 1e-30, 1e30


def integer(name: str, value: Any, *, least: int | None = None, most: int | None = None) -> int:
    """Return `value` as an int.

    Python and NumPy integers pass. Booleans, floats and strings do not, even where Python would
    convert them.

    Args:
        name: what the caller calls the argument.
        value: what was given.
        least: the least value that is allowed; any if None.
        most: the greatest value that is allowed; any if None.

    Raises:
        ValueError: unless `value` is an integer between `least` and `most`.

    >>> integer("window", 3, least=1)
    3
    """
    try:
        number = None if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:  # floats, strings, arrays, and tracers
        number = None
    low = least is not None and number is not None and number < least
    high = most is not None and number is not None and number > most
    if number is None or low or high:
        raise ValueError(f"{name} must be {_range(least, most)}, got {value!r}.")
    return number


def number(name: str, value: Any, *, none: str = "") -> float:
    """Return `value` as a finite float.

    Args:
        name: what the caller calls the argument.
        value: what was given.
        none: what passing None would mean, for the error.

    Raises:
        ValueError: for NaN, infinity, booleans, and what is no number.
    """
    found = _float(value)
    if not math.isfinite(found):
        hint = f" {none}" if none else ""
        raise ValueError(f"{name} must be a finite Python number, got {value!r}.{hint}")
    return found


def soft_cap(name: str, value: Any) -> float:
    """Return a soft cap of logits as a float.

    Raises:
        ValueError: unless it is a positive number that float32 can divide by.
    """
    found = _float(value)
    if not _LEAST_CAP <= found <= _GREATEST_CAP:  # False for NaN
        raise ValueError(
            f"{name} must be a Python number from {_LEAST_CAP:g} to {_GREATEST_CAP:g}, got "
            f"{value!r}. None means no cap; 0 does not."
        )
    return found


def boolean(name: str, value: Any) -> bool:
    """Return `value` as a bool.

    Raises:
        ValueError: unless it is True or False.
    """
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be True or False, got {value!r}.")
    return bool(value)


def dimension(name: str, value: Any, ndim: int) -> int:
    """Return a dim of an array of `ndim` dims, counted from 0.

    Raises:
        ValueError: unless the array has that dim.
    """
    return integer(name, value, least=-ndim, most=ndim - 1) % ndim


def _float(value: Any) -> float:
    """Return NaN for what is no number (strings, booleans, tracers)."""
    if isinstance(value, bool | np.bool_ | str | bytes):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _range(least: int | None, most: int | None) -> str:
    if least is None and most is None:
        return "an integer"
    if most is None:
        return "a positive integer" if least == 1 else f"an integer >= {least}"
    if least is None:
        return f"an integer <= {most}"
    return f"an integer from {least} to {most}"
