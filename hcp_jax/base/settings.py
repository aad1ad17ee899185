"""Declare beside each field of a config what it may be, and what it means to change it in a run.

Every field of a config is a `dataclasses.field` whose metadata come from one of three functions:

    free      changes memory, speed, paths or reports: a run may go on with another value
    numbers   changes what is computed: a run goes on with another value only with consent
    fixed     changes which parameters, or which order of data, there are: a run keeps it

Each takes the bounds of a number. A number that is not finite is refused everywhere.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import numpy as np

Kind = Literal["free", "numbers", "fixed"]

MOST = 2**31 - 1
"""The greatest size or count that makes sense: devices count in int32."""


CONSENT = ("numbers", "data")
"""The words by which a person agrees to what changes the numbers, or the text."""


class Bounds(NamedTuple):
    """What a number may be; None where there is no bound on that side.

    Attributes:
        least: the least value.
        above: the value that it must exceed.
        most: the greatest value.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None

    def fault(self, value: float) -> str | None:
        """Say what `value` must be and is not; None if it is within the bounds.

        >>> Bounds(least=1, most=8).fault(9)
        'at most 8'
        """
        if isinstance(value, str | bool):
            return None
        if not math.isfinite(value):
            return "a finite number"
        if self.above is not None and not value > self.above:
            return "positive" if self.above == 0 else f"greater than {self.above:g}"
        if self.least is not None and value < self.least:
            return "not be negative" if self.least == 0 else f"at least {self.least:g}"
        if self.most is not None and value > self.most:
            return (
                f"at most {self.most:,}" if isinstance(self.most, int) else f"at most {self.most:g}"
            )
        return None


class Setting(NamedTuple):
    """What is declared of a field."""

    kind: Kind
    bounds: Bounds


class Change(NamedTuple):
    """A field that a run had, and has, with different values."""

    key: str
    kind: Kind
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} was {self.before!r} and is {self.now!r}"


def free(**bounds: float) -> dict[str, Setting]:
    """Declare a field with which a run may go on whatever its value; see `Bounds`."""
    return {"setting": Setting("free", Bounds(**bounds))}


def numbers(**bounds: float) -> dict[str, Setting]:
    """Declare a field that changes what is computed; see `Bounds`."""
    return {"setting": Setting("numbers", Bounds(**bounds))}


def fixed(**bounds: float) -> dict[str, Setting]:
    """Declare a field that a run keeps; see `Bounds`."""
    return {"setting": Setting("fixed", Bounds(**bounds))}


def check(config: Any, prefix: str = "") -> None:
    """Check the numbers of a config against their types and the bounds beside its fields.

    Parts that are configs themselves have checked themselves.

    Args:
        config: an instance of a dataclass.
        prefix: what its keys begin with, such as "optimizer.".

    Raises:
        ValueError: if a number is not finite or out of bounds; names the key, the value and what is
            needed.
    """
    config_type: Any = type(config)  # mypy does not take a type for hashable
    kinds = _scalars(config_type)
    for field in dataclasses.fields(config):
        setting: Setting | None = field.metadata.get("setting")
        bounds = Bounds() if setting is None else setting.bounds
        for value in _numbers(getattr(config, field.name)):
            fault = _wrong_kind(value, kinds[field.name]) or bounds.fault(value)
            if fault is not None:
                must = "must" if fault.startswith("not be") else "must be"
                or_null = " (or null)" if "None" in str(field.type) else ""
                raise ValueError(f"{prefix}{field.name} {must} {fault}, got {value!r}{or_null}.")


def changes(before: Mapping[str, Any], now: Any, prefix: str = "") -> list[Change]:
    """Compare a config with one that was written down; return what differs.

    Args:
        before: the config of before, in plain values; a key that it lacks counts as the default.
        now: an instance of a dataclass.
        prefix: what its keys begin with.
    """
    found = []
    for field in dataclasses.fields(now):
        key, ours = f"{prefix}{field.name}", getattr(now, field.name)
        theirs = before.get(field.name, _default(field))
        if dataclasses.is_dataclass(ours) and isinstance(theirs, Mapping):
            found += changes(theirs, ours, f"{key}.")
            continue
        ours = _plain(dataclasses.asdict(ours) if dataclasses.is_dataclass(ours) else ours)  # type: ignore[arg-type]
        if _plain(theirs) != ours:
            # A field of which nothing is declared is not known to be harmless.
            setting: Setting = field.metadata.get("setting") or Setting("numbers", Bounds())
            found.append(Change(key, setting.kind, theirs, ours))
    return found


def fixed_values(config: Any) -> dict[str, Any]:
    """Return the fields of a config that a run keeps, parts left out."""
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if "setting" in field.metadata and field.metadata["setting"].kind == "fixed"
    }


def _default(field: dataclasses.Field) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is dataclasses.MISSING:
        return None
    made = field.default_factory()
    return dataclasses.asdict(made) if dataclasses.is_dataclass(made) else made  # type: ignore[arg-type]


def _numbers(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for one in value:
            yield from _numbers(one)
    elif isinstance(value, int | float | np.generic | str):
        yield value


@functools.cache
def _scalars(config: type) -> dict[str, set[type]]:
    """Return the scalar types that the annotation of each field allows, at any depth."""

    def scalars(hint: Any) -> set[type]:
        if get_origin(hint) is Literal:
            return {type(one) for one in get_args(hint)}
        inner = get_args(hint)
        return set().union(*map(scalars, inner)) if inner else {hint}

    return {name: scalars(hint) for name, hint in get_type_hints(config).items()}


def _wrong_kind(value: Any, allowed: set[type]) -> str | None:
    """Say what a value must be if its type is not one of `allowed`; None if it is."""
    if {bool, int, float}.isdisjoint(allowed):
        return None if isinstance(value, str) or str not in allowed else "a string"
    if isinstance(value, str):
        needed = "a number" if {int, float} & allowed else "true or false"
        return None if str in allowed else needed
    if isinstance(value, bool | np.bool_):
        return None if bool in allowed else "a number, not a boolean"
    if isinstance(value, float | np.floating):
        return None if float in allowed else "an integer"
    if isinstance(value, int | np.integer):
        return None if {int, float} & allowed else "true or false"
    return "a number"


def _plain(value: Any) -> Any:
    return list(map(_plain, value)) if isinstance(value, list | tuple) else value
