"""List the keys of a config's dataclass, and word the errors about them.

A config is a dataclass whose fields may be dataclasses again. A key is a path of field names,
joined by dots, such as `model.num_layers`.
"""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import docstring_parser

_ELSEWHERE = {
    "num_nextn_predict_layers": "model.mtp_depths",  # DeepSeek-V3's config.json
    "mtp_num_layers": "model.mtp_depths",  # Megatron-LM, as the next
    "mtp_loss_scaling_factor": "model.mtp_loss_weight",
}
"""The keys of this config for words of other programs, by their last part."""

_SHOWN = 100  # characters of a key or value in a message


def keys(cls: type, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yield (dotted key, type, description) of every value that a config can have."""
    kinds = typing.get_type_hints(cls)
    texts = {p.arg_name: p.description for p in docstring_parser.parse(cls.__doc__ or "").params}
    for name in (one.name for one in dataclasses.fields(cls)):
        part = section(kinds[name])
        if part is not kinds[name]:
            text = " ".join((texts.get(name) or "").split())
            yield f"{prefix}{name}", kinds[name], text
        if part is not None:
            yield from keys(part, f"{prefix}{name}.")


def section(kind: Any) -> type | None:
    """Return the dataclass that a field holds or may hold; None if it holds none."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    parts = [k for k in options if isinstance(k, type) and dataclasses.is_dataclass(k)]
    return parts[0] if parts else None


def listed_section(kind: Any) -> type | None:
    """Return the dataclass that the entries of a list are; None if the field holds no such list."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    entries = [typing.get_args(k)[0] for k in options if typing.get_origin(k) in (list, tuple)]
    parts = [section(entry) for entry in entries]
    return parts[0] if parts else None


def metavar(kind: Any) -> str:
    """Return a type as the help of an option shows it."""
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(map(str, typing.get_args(kind)))
    if isinstance(kind, types.UnionType):
        return metavar(typing.get_args(kind)[0])
    return {int: "INT", float: "FLOAT", str: "STR", bool: "BOOL"}.get(kind, "VALUE")


def explain(message: str, values: Mapping[str, Any], cls: type) -> str:
    """Return msgspec's error about a value of `cls` as a message that names the config's key."""
    found = re.search(r"at `\$\.([\w.]+)", message)
    key = found[1] if found else ""
    kinds = {known: kind for known, kind, _ in keys(cls)}
    if key not in kinds:
        return message
    value: Any = values
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    part = section(kinds[key])
    if part is not None and isinstance(value, Mapping):
        absent = [f.name for f in dataclasses.fields(part) if _required(f) and f.name not in value]
        if absent:
            return f"{key} needs {', '.join(absent)}, too."
    near = difflib.get_close_matches(str(value)[:_SHOWN], choices(kinds[key]), 1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"{key} must be {_describe_type(kinds[key])}, got {_short(value)}{hint}"


def require_known(values: Mapping[str, Any], cls: type, origin: str) -> None:
    """Refuse keys that a config does not have.

    Args:
        values: the config as nested mappings.
        cls: the dataclass of the config.
        origin: where the values are from, for the error.

    Raises:
        ValueError: names the key and the nearest right one.
    """
    _require_known(values, cls, cls, origin, "")


def _require_known(
    values: Mapping[str, Any], cls: type, whole: type, origin: str, prefix: str
) -> None:
    kinds = typing.get_type_hints(cls)
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in kinds:
            raise ValueError(f"{origin}: there is no key {_short(key)}{nearest(key, whole)}")
        part, listed = section(kinds[name]), listed_section(kinds[name])
        if listed is not None and isinstance(value, list | tuple):
            for i, one in enumerate(value):
                _require_known_entry(one, listed, origin, f"{key}[{i}]")
        if value is None and type(None) not in typing.get_args(kinds[name]):
            raise ValueError(f"{origin}: {key} must be {_describe_type(kinds[name])}, got null.")
        if part is None:
            continue
        if isinstance(value, Mapping):
            _require_known(value, part, whole, origin, f"{key}.")
        elif part is kinds[name]:
            raise ValueError(f"{origin}: {key} must hold keys and values, got {_short(value)}.")


def _require_known_entry(value: Any, part: type, origin: str, key: str) -> None:
    """Check the keys of one entry of a list, as those of the file are checked."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{origin}: {key} must hold keys and values, got {_short(value)}.")
    names = [f.name for f in dataclasses.fields(part)]
    unknown = [name for name in value if name not in names]
    if unknown:
        near = difflib.get_close_matches(str(unknown[0]), names, 1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(names)}."
        raise ValueError(f"{origin}: there is no key {key}.{_short(unknown[0])}{hint}")


def nearest(key: str, cls: type) -> str:
    """Return the end of a message: a key that is spelt alike, or has the same last part."""
    key = key[:_SHOWN]
    known = [k for k, _, _ in keys(cls)] + [
        f.name for f in dataclasses.fields(cls) if section(f.type)
    ]
    near = difflib.get_close_matches(key, known, 1, cutoff=0.75)
    last = key.rsplit(".", 1)[-1]
    if last in _ELSEWHERE:
        return f"; did you mean {_ELSEWHERE[last]!r}?"
    near = near or [k for k in known if k.rsplit(".", 1)[-1] == last]
    near = near or difflib.get_close_matches(key, known, 1)
    return f"; did you mean {near[0]!r}?" if near else "."


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def choices(kind: Any) -> list[str]:
    """Return the values that a type has, as text, if they are few; otherwise nothing."""
    if kind is bool:
        return ["true", "false"]
    if typing.get_origin(kind) is typing.Literal:
        return [str(value) for value in typing.get_args(kind)]
    return [c for k in typing.get_args(kind) for c in choices(k)]


def _describe_type(kind: Any) -> str:
    """Return a type as a phrase for messages."""
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(kind)))}"
    if isinstance(kind, types.UnionType):
        return " or ".join(map(_describe_type, typing.get_args(kind)))
    plain = {int: "int", float: "float", str: "str", bool: "true or false", types.NoneType: "null"}
    if kind in plain:
        return plain[kind]
    if typing.get_origin(kind) in (list, tuple):
        return f"a list of {_describe_type(typing.get_args(kind)[0])}"
    return "keys and values" if dataclasses.is_dataclass(kind) else str(kind)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
