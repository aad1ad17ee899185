"""Read untrusted YAML and JSON as plain values, and nothing else.

A config, a run folder, a model folder and a message from the network are not trusted. So this
module never imports a module, builds an object or follows a reference because of what a file says.
Input that is too large, too deep or ambiguous is refused before it costs memory or time:

- a file must be a regular file of UTF-8 text, with or without a byte order mark, of bounded size;
- nesting and the number of values are bounded;
- a repeated key in one mapping is an error (both formats would silently keep the last one);
- YAML anchors, aliases, merge keys and tags are refused.

Every fault raises a ValueError of one line that names the file and position.
"""

import os
import pathlib
import stat
from typing import Any

MAX_BYTES = 2**20
"""Default size limit of a file, in bytes."""

MAX_VALUES = 20_000
"""Most keys and values that a YAML file may hold."""

MAX_DEPTH = 32
"""Deepest nesting of mappings and lists."""


def read_text(path: str | os.PathLike[str], limit: int = MAX_BYTES) -> str:
    """Return the text of a file, without a byte order mark.

    Args:
        path: a regular file.
        limit: largest size, in bytes.

    Raises:
        ValueError: if it is not a regular file, is larger than `limit`, or is not UTF-8 text.
        OSError: if it cannot be opened.
    """
    # Without O_NONBLOCK, opening a FIFO would wait until another process writes to it.
    with open(path, "rb", opener=lambda name, _: os.open(name, os.O_RDONLY | os.O_NONBLOCK)) as f:
        if not stat.S_ISREG(os.fstat(f.fileno()).st_mode):
            raise ValueError(f"{path} is not a regular file.")
        content = f.read(limit + 1)
    if len(content) > limit:
        raise ValueError(
            f"{path} is larger than {limit / 2**20:g} MiB, which is too large for such a file."
        )
    return decode(content, str(path))


def decode(content: bytes, place: str) -> str:
    """Return bytes as text, without a byte order mark; `place` names the source in errors.

    Raises:
        ValueError: if the bytes are not UTF-8 or contain a NUL.
    """
    at = content.find(b"\0")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = error.start
    if at >= 0:
        raise ValueError(f"{place} is not UTF-8 text: byte 0x{content[at]:02x} at offset {at}.")
    return text


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """Return the plain values of a YAML file; see `parse_yaml` and `read_text`."""
    return parse_yaml(read_text(path), str(path))


def parse_yaml(text: str, place: str) -> Any:
    r"""Return the plain values of a YAML text.

    Args:
        text: one document.
        place: name of the source in errors.

    Raises:
        ValueError: if it is not YAML, or contains anything that the module's docstring refuses.

    >>> parse_yaml("steps: 3", "the example")
    {'steps': 3}
    >>> parse_yaml("steps: 3\nsteps: 4", "the example")
    Traceback (most recent call last):
    ValueError: the example has the key 'steps' twice (line 2); keep one of them.
    """
    import yaml

    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Loader(base):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            """Build a mapping; refuse repeated keys."""
            found: dict[Any, Any] = {}
            for key_node, value_node in node.value:
                key = self.construct_object(key_node, deep=True)
                if not isinstance(key, str):
                    raise _refused(f"has {key!r:.60} as a key, which must be a word", key_node)
                if key in found:
                    raise _refused(f"has the key {key!r:.60} twice", key_node, "keep one of them")
                found[key] = self.construct_object(value_node, deep=True)
            return found

    # PyYAML's own constructor of mappings is a generator, which allows references to itself.
    Loader.add_constructor("tag:yaml.org,2002:map", Loader.construct_mapping)
    try:
        _check_events(yaml.parse(text, Loader=base))
        return yaml.load(text, Loader=Loader)
    except _RefusedError as error:
        raise ValueError(f"{place} {error}") from None
    # A ValueError comes from a scalar: an impossible date, or a number of 5,000 digits.
    except (yaml.YAMLError, ValueError) as error:
        tabs = "; indent with spaces, not tabs" if "\t" in text else ""
        said = " ".join(str(error).replace('in "<unicode string>", ', "").split())
        raise ValueError(f"{place} is not YAML: {said}{tabs}.") from None
    except RecursionError:
        raise ValueError(f"{place} is nested too deeply.") from None


def _check_events(events: Any) -> None:
    """Refuse references, tags and excessive size while the text is parsed into events."""
    import yaml

    depth = values = 0
    for event in events:
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _refused("has an anchor or alias (& or *)", event, "write the value out")
        if isinstance(event, yaml.NodeEvent):
            values += 1
            if getattr(event, "tag", None):
                raise _refused(f"has the tag {event.tag!r:.60}", event, "leave it out")
            if isinstance(event, yaml.ScalarEvent) and event.value == "<<" and event.implicit[0]:
                raise _refused("has a merge key (<<)", event, "write the values out")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise _refused(f"is nested more than {MAX_DEPTH} deep", event)
        if values > MAX_VALUES:
            raise _refused(f"holds more than {MAX_VALUES:,} values", event)


class _RefusedError(ValueError):
    """The text is valid in its format, but this module does not allow it."""


def _refused(what: str, where: Any, remedy: str = "") -> _RefusedError:
    line = where.start_mark.line + 1
    return _RefusedError(f"{what} (line {line}){f'; {remedy}' if remedy else ''}.")


def read_json(path: str | os.PathLike[str], limit: int = MAX_BYTES) -> Any:
    """Return the plain values of a JSON file; see `parse_json` and `read_text`."""
    return parse_json(read_text(path, limit), str(path))


def parse_json(text: str, place: str) -> Any:
    """Return the plain values of a JSON text.

    Args:
        text: one JSON value.
        place: name of the source in errors.

    Raises:
        ValueError: if it is not JSON, repeats a key, or is nested too deeply.

    >>> parse_json('{"a": [1]}', "the example")
    {'a': [1]}
    """
    import json

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in found if names.count(name) > 1)
            raise _RefusedError(f"has the key {twice!r:.60} twice; keep one of them.")
        return found

    try:
        value = json.loads(text, object_pairs_hook=mapping)
    except _RefusedError as error:
        raise ValueError(f"{place} {error}") from None
    except ValueError as error:
        raise ValueError(f"{place} is not JSON ({error}).") from None
    except RecursionError:
        raise ValueError(f"{place} is nested too deeply.") from None
    _check_depth(value, place)
    return value


def _check_depth(value: Any, place: str) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH + 1):
        inside = [v.values() if isinstance(v, dict) else v for v in level]
        level = [v for values in inside for v in values if isinstance(v, dict | list)]
        if not level:
            return
    raise ValueError(f"{place} is nested more than {MAX_DEPTH} deep.")


def is_regular(path: pathlib.Path) -> bool:
    """Return whether a path is a regular file; False for names that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False
