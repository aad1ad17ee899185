"""Keep the tiles that were fastest on a user's own GPU, and find them for a call.

`hcp bench attention --sweep` keeps them, in a file of the user's cache folder, for this kind of
GPU, version of jax and source of the kernels. The attention op puts them into `CoreSpec.tiles`, a
static argument, so no trace reads a file. A process reads the file once and keeps to what it read.
"""

import dataclasses
import functools
import logging
import os
import pathlib
import shlex

import jax

from hcp_jax.kernels import user_cache
from hcp_jax.kernels.tiles import Tile, Tiles

VARIABLE = "HCP_KERNEL_TILES"
"""The environment variable that, set to "off", lets no kept tiles be used."""

FILE = "tiles.json"
"""The file of tiles in the user's cache folder."""

_log = logging.getLogger("hcp_jax")

# What a file may hold: more than anybody sweeps, and nothing that Triton cannot do.
_LEAST = Tile(block_q=16, block_k=16, warps=1, stages=1)
_MOST = Tile(block_q=256, block_k=256, warps=16, stages=8)


def path() -> pathlib.Path:
    """Return the path of the file."""
    return user_cache.path(FILE)


def keep(implementation: str, device_kind: str, dtype: str, head_size: int, tiles: Tiles) -> bool:
    """Keep tiles for calls with this dtype and head size; return whether that was possible.

    This process goes on with the tiles that it has read before.
    """
    key = user_cache.key(implementation, device_kind)
    try:
        found = _checked(user_cache.read(FILE).get(key, {}))
    except ValueError:  # it is written anew
        found = {}
    found[_call(dtype, head_size)] = tiles
    value = {call: dataclasses.asdict(tiles) for call, tiles in found.items()}
    return user_cache.write(FILE, key, value)


def find(
    implementation: str, device_kind: str, dtype: str, head_size: int, v_head_size: int
) -> Tiles | None:
    """Return the tiles that were kept for such calls; None if there are none.

    There are none with several processes either: all of them must run one program, and their hosts'
    files may differ. Nor for GPUs that this machine does not have.

    Args:
        implementation: "triton".
        device_kind: `jax.Device.device_kind`.
        dtype: dtype of q, k and v.
        head_size: head size of q and k.
        v_head_size: head size of v; nothing is kept for one that is not `head_size`.
    """
    if head_size != v_head_size:
        return None
    return _kept(implementation, device_kind).get(_call(dtype, head_size))


def describe(implementation: str, device_kind: str) -> str | None:
    """Say for which calls there are kept tiles; None if for none."""
    found = _kept(implementation, device_kind)
    if not found:
        return None
    return f"for {', '.join(found)} those that `hcp bench attention --sweep` kept"


@functools.lru_cache(maxsize=32)
def _kept(implementation: str, device_kind: str) -> dict[str, Tiles]:
    if os.environ.get(VARIABLE, "").lower() in ("off", "0", "false", "no"):
        return {}
    if jax.process_count() > 1 or not user_cache.is_here(device_kind):
        return {}
    try:
        return _checked(user_cache.read(FILE).get(user_cache.key(implementation, device_kind), {}))
    except ValueError as error:
        _log.warning(
            f"attention does not use the tiles kept in {path()}: {error}. Remove the file "
            f"(rm {shlex.quote(str(path()))}), or sweep again (hcp bench attention --sweep)."
        )
        return {}


def _call(dtype: str, head_size: int) -> str:
    return f"{dtype} with head size {head_size}"


def _checked(found: object) -> dict[str, Tiles]:
    """Return tiles by call, of an entry of the file.

    Raises:
        ValueError: if it holds something else.
    """
    if not isinstance(found, dict):
        raise ValueError(f"it has {found!r} in place of tiles by dtype and head size")
    return {call: _tiles(call, value) for call, value in found.items()}


def _tiles(call: str, value: object) -> Tiles:
    kernels = {field.name for field in dataclasses.fields(Tiles)}
    if (
        not isinstance(value, dict)
        or value.keys() != kernels
        or not all(map(_is_tile, value.values()))
    ):
        raise ValueError(f"its tiles for {call} are {value!r}")
    return Tiles(**{kernel: Tile(**tile) for kernel, tile in value.items()})


def _is_tile(value: object) -> bool:
    least, most = dataclasses.asdict(_LEAST), dataclasses.asdict(_MOST)
    if not isinstance(value, dict) or value.keys() != most.keys():
        return False
    if not all(type(x) is int and least[name] <= x <= most[name] for name, x in value.items()):
        return False
    return all(value[name].bit_count() == 1 for name in ("block_q", "block_k", "warps"))
