"""Check numbers that users pass, with the same error wording in every public function; no jax."""

import math
import operator
from typing import Any

import numpy as np

# Outside these bounds float32 cannot represent x / cap or cap * tanh(x / cap) for common logits x.
_LEAST_CAP, _GREATEST_CAP = 1e-30, 1e30


def integer(name: str, value: Any, *, least: int | None = None, most: int | None = None) -> int:
    """Return `value` as an int.

    Python and NumPy integers are accepted. Booleans, floats and strings are refused, even where
    Python would convert them.

    Args:
        name: name of the argument, for the error.
        value: value to check.
        least: smallest allowed value; no bound if None.
        most: largest allowed value; no bound if None.

    Raises:
        ValueError: if `value` is not an integer between `least` and `most`.

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
        name: name of the argument, for the error.
        value: value to check.
        none: hint about the meaning of None, appended to the error.

    Raises:
        ValueError: if `value` is NaN, infinite, a boolean, or not a number.
    """
    found = _float(value)
    if not math.isfinite(found):
        hint = f" {none}" if none else ""
        raise ValueError(f"{name} must be a finite Python number, got {value!r}.{hint}")
    return found


def soft_cap(name: str, value: Any) -> float:
    """Return a soft cap for logits as a float.

    Raises:
        ValueError: if it is not a positive number that float32 can divide by.
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
        ValueError: if it is not True or False.
    """
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be True or False, got {value!r}.")
    return bool(value)


def dimension(name: str, value: Any, ndim: int) -> int:
    """Return the index of a dim, counted from 0, for an array of `ndim` dims.

    Raises:
        ValueError: if the array does not have that dim.
    """
    return integer(name, value, least=-ndim, most=ndim - 1) % ndim


def _float(value: Any) -> float:
    """Return `value` as a float; NaN if it is not a number (strings, booleans, tracers)."""
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
