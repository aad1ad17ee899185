"""Read the file of a config, and the files that it includes.

    # mine.yaml
    include: quickstart            # or a list; files beside this one, or configs of the package
    steps: 1000
    model: {num_layers: 8}

Included values come first; those of the including file replace them key by key, and lists as a
whole. A config is not trusted, so an include can name YAML files only, and few of them.
"""

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from hcp_jax.base import reading, shipped

INCLUDE = "include"
MOST_FILES = 32
"""Most files that one config may be read from, repeated ones included."""

Check = Callable[[Mapping[str, Any], str], None]


def read(path: str | os.PathLike[str], check: Check) -> dict[str, Any]:
    """Return the values of a config file on top of those of the files that it includes.

    Args:
        path: a YAML file, or the name of a config that comes with the package.
        check: called with the values of each file, before they are joined, and the file's name;
            raises ValueError for unknown keys.

    Raises:
        ValueError: if a file is no YAML mapping, includes itself or is not a name of a YAML file,
            or if there are too many files.
        FileNotFoundError: if there is no such file; names the file that includes it.
    """
    return _Reader(check).read(shipped.find(path), ())


class _Reader:
    def __init__(self, check: Check):
        self._check, self._number = check, 0

    def read(self, path: pathlib.Path, opened: tuple[pathlib.Path, ...]) -> dict[str, Any]:
        """Read `path`; `opened` are the files that are being read, outermost first."""
        self._number += 1
        if self._number > MOST_FILES:
            raise ValueError(f"{opened[0]}: it is made of more than {MOST_FILES} files.")
        values = _mapping(path)
        names = _names(values.pop(INCLUDE, []), path)
        self._check(values, str(path))
        opened = (*opened, path)
        joined: dict[str, Any] = {}
        for name in names:
            found = _find(name, path)
            if found.resolve() in [one.resolve() for one in opened]:
                chain = " -> ".join(map(str, (*opened, found)))
                raise ValueError(f"{path}: include: {name} leads back to itself: {chain}.")
            joined = _join(joined, self.read(found, opened))
        return _join(joined, values)


def _mapping(path: pathlib.Path) -> dict[str, Any]:
    values = reading.read_yaml(path)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold keys and values, got {type(values).__name__}.")
    return values


def _names(given: Any, path: pathlib.Path) -> list[str]:
    names = given if isinstance(given, list) else [given]
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise ValueError(
                f"{path}: include must be the name of a YAML file, or a list of them, got {name!r}."
            )
    return names


def _find(name: str, including: pathlib.Path) -> pathlib.Path:
    """Return the file that `name` means in the file `including`."""
    if name in shipped.names():
        return shipped.folder() / f"{name}.yaml"
    if pathlib.Path(name).suffix not in (".yaml", ".yml"):
        raise ValueError(
            f"{including}: include: {name!r} is neither a file ending in .yaml nor a config that "
            f"comes with hcp_jax: {', '.join(shipped.names())}."
        )
    found = including.parent / name
    if not found.exists():
        raise FileNotFoundError(
            f"{including}: include: there is no file {found}; names are relative to the file that "
            "includes them."
        )
    return found


def _join(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return `below` with the values of `above` in their place, key by key."""
    joined = dict(below)
    for key, value in above.items():
        under = joined.get(key)
        if isinstance(value, Mapping) and isinstance(under, Mapping):
            value = _join(under, value)
        joined[key] = value
    return joined
