"""Declare, beside each config field, its bounds and whether a resumed run may change it.

Every field of a config is a `dataclasses.field` whose metadata come from one of three functions:

    free      changes memory, speed, paths or reports: a resumed run may use another value
    numbers   changes what is computed: a resumed run needs consent to use another value
    fixed     changes the set of parameters or the order of the data: a resumed run must keep it

Each function takes the bounds of a number. Infinities and NaN are refused everywhere.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import numpy as np

Kind = Literal["free", "numbers", "fixed"]

MOST = 2**31 - 1
"""Largest allowed size or count; devices count in int32."""


CONSENT = ("numbers", "data")
"""Values of --accept: the user agrees to changed numbers, or to changed data."""


class Bounds(NamedTuple):
    """Bounds of a number; None means no bound on that side.

    Attributes:
        least: smallest allowed value.
        above: value that the number must exceed.
        most: largest allowed value.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None

    def fault(self, value: float) -> str | None:
        """Return the requirement that `value` breaks, in words; None if it is within the bounds.

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
    """Declaration of one config field: its kind and its bounds."""

    kind: Kind
    bounds: Bounds


class Change(NamedTuple):
    """Config field whose value differs between a checkpoint's run and the current run."""

    key: str
    kind: Kind
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} was {self.before!r} and is {self.now!r}"


def free(**bounds: float) -> dict[str, Setting]:
    """Declare a field that a resumed run may change freely; see `Bounds`."""
    return {"setting": Setting("free", Bounds(**bounds))}


def numbers(**bounds: float) -> dict[str, Setting]:
    """Declare a field that changes what is computed, so changing it needs consent; see `Bounds`."""
    return {"setting": Setting("numbers", Bounds(**bounds))}


def fixed(**bounds: float) -> dict[str, Setting]:
    """Declare a field that a resumed run must keep; see `Bounds`."""
    return {"setting": Setting("fixed", Bounds(**bounds))}


def fixed_later(**bounds: float) -> dict[str, Any]:
    """Declare a `fixed` field that older checkpoints do not have; they mean its default."""
    return fixed(**bounds) | {"omit_default": True}


def check(config: Any, prefix: str = "") -> None:
    """Check the numbers of a config against the types and bounds of its fields.

    Nested configs are skipped: they have already checked themselves.

    Args:
        config: an instance of a dataclass.
        prefix: prefix of the keys in errors, such as "optimizer.".

    Raises:
        ValueError: if a number is not finite or is out of bounds; names the key, the value and the
            requirement.
    """
    config_type: Any = type(config)  # Any, because mypy does not treat a type as hashable
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
    """Compare a config with a stored one and return the fields that differ.

    Args:
        before: the stored config, as plain values; a missing key means the field's default.
        now: an instance of a dataclass.
        prefix: prefix of its keys.
    """
    found = []
    for field in dataclasses.fields(now):
        key, ours = f"{prefix}{field.name}", getattr(now, field.name)
        theirs = before.get(field.name, _default(field))
        if dataclasses.is_dataclass(ours) and isinstance(theirs, Mapping):
            found += changes(theirs, ours, f"{key}.")
            continue
        ours = _plain(ours)
        if _plain(theirs) != ours:
            # A field without a declaration may change results, so it counts as "numbers".
            setting: Setting = field.metadata.get("setting") or Setting("numbers", Bounds())
            found.append(Change(key, setting.kind, theirs, ours))
    return found


def fixed_values(config: Any) -> dict[str, Any]:
    """Return the `fixed` fields of a config in plain values, without nested configs.

    A field declared with `fixed_later` is left out at its default.
    """
    values = {
        field.name: (field, _plain(getattr(config, field.name)))
        for field in dataclasses.fields(config)
        if "setting" in field.metadata and field.metadata["setting"].kind == "fixed"
    }
    return {
        name: value
        for name, (field, value) in values.items()
        if not (field.metadata.get("omit_default") and value == _default(field))
    }


def _default(field: "dataclasses.Field[Any]") -> Any:
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
    """Return the scalar types in the annotation of each field, at any depth."""

    def scalars(hint: Any) -> set[type]:
        if get_origin(hint) is Literal:
            return {type(one) for one in get_args(hint)}
        inner = get_args(hint)
        return set().union(*map(scalars, inner)) if inner else {hint}

    return {name: scalars(hint) for name, hint in get_type_hints(config).items()}


def _wrong_kind(value: Any, allowed: set[type]) -> str | None:
    """Return the required type in words; None if the type of `value` is one of `allowed`."""
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
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return list(map(_plain, value)) if isinstance(value, list | tuple) else value
