"""Seal the description of a checkpoint, so that any change of it is noticed.

The description is the item `about`. Its seal is a SHA-256 of `about` itself and of the data's
state, and `about` holds the checksum of every array. So everything that is restored is checked:

    about.seal  ->  about (step, model, config, files, arrays)  ->  the bits of every array
                ->  data
"""

import hashlib
import json
import pathlib
from typing import Any

import jax
from etils import epath

from hcp_jax.train.checkpoint import checksums, writers


class DamageError(Exception):
    """A checkpoint, or a part of it, is not what was written."""


def seal(about: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """Return `about` with its seal.

    Args:
        about: of plain values.
        data: the state of the data pipeline, of plain values.
    """
    return about | {"seal": _digest(about, data)}


def read(folder: epath.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read `about` (with its seal) and the data's state of a checkpoint, and check the seal.

    Args:
        folder: the checkpoint of one step.

    Raises:
        DamageError: if the seal does not fit, or there is none.
        Exception: whatever a reader makes of a file that is not whole.
    """
    items = writers.handlers()
    about, data = (items[name].restore(folder / name) for name in ("about", "data"))
    if not isinstance(about, dict) or "seal" not in about:
        raise DamageError("its description has no seal")
    if about["seal"] != _digest({k: v for k, v in about.items() if k != "seal"}, data):
        raise DamageError("its config or data state is not what was saved: the seal does not fit")
    return about, data


def steps(folder: pathlib.Path) -> list[int]:
    """Return the steps of the checkpoints of a run folder, the newest first."""
    there = folder / "checkpoints"
    names = [path.name for path in there.iterdir()] if there.is_dir() else []
    return sorted((int(name) for name in names if name.isascii() and name.isdigit()), reverse=True)


def describe_arrays(state: Any) -> dict[str, list[Any]]:
    """Return shape and dtype of each array of a state, by its dotted path."""
    return {
        checksums.dotted(path): [list(x.shape), str(x.dtype)]
        for path, x in jax.tree.leaves_with_path(state)
    }


def plain(value: Any) -> Any:
    """Return a value as JSON gives it back: tuples as lists, keys as text."""
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    return list(map(plain, value)) if isinstance(value, list | tuple) else value


def _digest(about: dict[str, Any], data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([about, data], sort_keys=True).encode()).hexdigest()
