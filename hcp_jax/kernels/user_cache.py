"""Keep what a user's own GPU has shown about the kernels, in files of the user's cache folder.

A file is one JSON object. Its keys hold the kind of GPU, the version of jax and a digest of the
source of the kernels, because what was seen holds for no other.
"""

import functools
import hashlib
import json
import logging
import pathlib
import tempfile

import jax

from hcp_jax.base.cache_folder import cache_folder

_log = logging.getLogger("hcp_jax")


def is_here(device_kind: str) -> bool:
    """Return whether this process has a GPU of this kind."""
    return any(d.device_kind == device_kind and d.platform == "gpu" for d in jax.local_devices())


def path(name: str) -> pathlib.Path:
    """Return the path of a file; it may not exist yet."""
    return cache_folder() / name


def key(what: str, device_kind: str) -> str:
    """Return the key of what was seen about `what` on this kind of GPU."""
    return f"{what} | {device_kind} | jax {jax.__version__} | kernels {sources()}"


@functools.lru_cache(maxsize=1)
def sources() -> str:
    """Return a digest of the source of the kernels."""
    digest = hashlib.sha256()
    for file in sorted(pathlib.Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def read(name: str) -> dict[str, object]:
    """Return what a file holds; nothing if there is none.

    Raises:
        ValueError: if the file cannot be read, or is not one JSON object.
    """
    try:
        found = json.loads(path(name).read_text())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ValueError(str(error.strerror)) from error
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object")
    return found


def write(name: str, key: str, value: object) -> bool:
    """Keep a value beside the others; return whether that was possible, and warn if not.

    A file that cannot be read, or is not whole, is written anew.
    """
    try:
        found = read(name)
    except ValueError:
        found = {}
    target = path(name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=target.parent, delete=False) as file:
            json.dump(found | {key: value}, file, indent=1)
        pathlib.Path(file.name).replace(target)
    except OSError as error:
        _log.warning(f"what was seen of the kernels is not kept: {target}: {error.strerror}")
        return False
    return True
