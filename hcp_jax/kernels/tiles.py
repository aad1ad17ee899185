"""List the tile sizes of the Pallas kernels by kind of device, dtype and head size.

This is data, not code: it changes when somebody measures, and the kernels do not. The sizes were
chosen without a GPU, from what ptxas reports (docs/kernels.md has the figures): the largest tiles
without register spills, with a soft cap and without. Large tiles are better because a tile's
arithmetic grows with its area and its loads with its edge. `hcp bench attention --sweep` measures
alternatives and keeps the fastest for the GPU at hand (`kept_tiles.py`).
"""

import dataclasses
from typing import Literal

Product = Literal["triton", "ragged_dot"]
"""Implementations of the products of experts (`expert_product.py`)."""


@dataclasses.dataclass(frozen=True)
class Tile:
    """The block sizes and compiler parameters of one kernel.

    Attributes:
        block_q: number of queries of a block.
        block_k: number of keys of a block.
        warps: number of warps that work on one block (32 threads each).
        stages: depth of the pipeline that loads the blocks of the inner loop.
    """

    block_q: int
    block_k: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The tiles of the three kernels: output, dq, and dk with dv."""

    forward: Tile
    dq: Tile
    dkv: Tile


@dataclasses.dataclass(frozen=True)
class ProductTile:
    """The block sizes and compiler parameters of a kernel that multiplies rows with experts.

    Attributes:
        rows: number of rows of a block of the result.
        columns: number of its columns.
        inner: length of the sum that one step of the inner loop adds.
        warps: as in `Tile`.
        stages: as in `Tile`.
    """

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class ProductTiles:
    """The tiles of the products of experts.

    Attributes:
        rows: of the products of rows with weights, forward and dx.
        weights: of the gradient of the weights; its blocks have K as rows and N as columns.
    """

    rows: ProductTile
    weights: ProductTile


# Keys are the largest head size that the tiles are for.
_Table = dict[int, Tiles]

# Hopper (wgmma) and Blackwell (tcgen05): 227 KiB of shared memory.
_HOPPER: _Table = {
    64: Tiles(Tile(128, 64, 4, 3), Tile(128, 128, 8, 2), Tile(64, 64, 4, 2)),
    128: Tiles(Tile(128, 128, 8, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
    192: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
    256: Tiles(Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(32, 64, 8, 2)),
}

# Ampere (mma). All fit into 99 KiB of shared memory, the smallest of any GPU from Ampere on, and
# use nothing that later GPUs lack. So they are also the tiles of unknown GPUs.
_AMPERE: _Table = {
    64: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
    128: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(32, 64, 8, 2)),
    192: Tiles(Tile(128, 32, 8, 2), Tile(32, 64, 8, 2), Tile(32, 32, 8, 2)),
    256: Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(16, 64, 8, 2)),
}

# float32 has no exact tensor cores: small tiles, for any GPU.
_FLOAT32: _Table = {
    64: Tiles(Tile(32, 32, 4, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    128: Tiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(16, 32, 8, 1)),
    256: Tiles(Tile(32, 32, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
}

# Small, so that the short sequences of tests have several blocks.
_INTERPRETER = Tiles(Tile(32, 16, 4, 1), Tile(16, 32, 4, 1), Tile(16, 32, 4, 1))

# The Mosaic kernels on Hopper. `warps` counts the warps that compute: two warpgroups of four, each
# with 64 rows of the block; one more warpgroup loads. `stages` is the depth of the queues of blocks
# in shared memory.
_MOSAIC: _Table = {
    64: Tiles(Tile(128, 128, 8, 4), Tile(128, 128, 8, 4), Tile(64, 128, 8, 4)),
    128: Tiles(Tile(128, 128, 8, 2), Tile(128, 128, 8, 3), Tile(64, 128, 8, 4)),
    256: Tiles(Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
}
MOSAIC_HEAD_SIZES = tuple(_MOSAIC)

# The smallest sizes that wgmma supports.
_MOSAIC_INTERPRETER = Tiles(Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2))

# Products of experts; 96 KiB of shared memory, which any GPU since Ampere has.
_PRODUCTS = ProductTiles(ProductTile(128, 128, 64, 8, 3), ProductTile(128, 128, 64, 8, 3))
_PRODUCTS_FLOAT32 = ProductTiles(ProductTile(64, 64, 16, 4, 1), ProductTile(64, 64, 16, 4, 1))
_PRODUCTS_INTERPRETER = ProductTiles(ProductTile(4, 8, 8, 4, 1), ProductTile(8, 4, 8, 4, 1))

_PROCESSORS = {"A100": 108, "H100": 132, "H200": 132, "B200": 148}

_TABLES = {"A100": _AMPERE, "H100": _HOPPER, "H200": _HOPPER, "B200": _HOPPER}


def tiles_for(device_kind: str, dtype: str, head_size: int, v_head_size: int) -> Tiles:
    """Return the tiles for a call.

    Args:
        device_kind: `jax.Device.device_kind`; "cpu" or "" for the interpreter.
        dtype: dtype of q, k and v.
        head_size: head size of q and k, at most 256.
        v_head_size: head size of v, at most 256.
    """
    if device_kind in ("", "cpu"):
        return _INTERPRETER
    known = _known(device_kind)
    table = _FLOAT32 if dtype == "float32" else _TABLES[known] if known else _AMPERE
    return table[min(size for size in table if size >= max(head_size, v_head_size))]


def mosaic_tiles_for(device_kind: str, head_size: int) -> Tiles:
    """Return the tiles for a call of the Mosaic kernels; arguments as in `tiles_for`."""
    return _MOSAIC_INTERPRETER if device_kind in ("", "cpu") else _MOSAIC[head_size]


def product_tiles_for(device_kind: str, dtype: str) -> ProductTiles:
    """Return the tiles of products of experts; arguments as in `tiles_for`."""
    if device_kind in ("", "cpu"):
        return _PRODUCTS_INTERPRETER
    return _PRODUCTS_FLOAT32 if dtype == "float32" else _PRODUCTS


def has_wgmma(device_kind: str) -> bool:
    """Return whether the device is a Hopper GPU with tiles in this module."""
    return _known(device_kind) in ("H100", "H200")


def processors(device_kind: str) -> int:
    """Return the number of multiprocessors of a GPU (of an H200 if unknown); 2 for the interpreter.

    With 2, the short sequences of tests need several rounds of work.
    """
    if device_kind in ("", "cpu"):
        return 2
    if "PCIe" in device_kind and _known(device_kind) == "H100":
        return 114
    return _PROCESSORS[_known(device_kind) or "H200"]


def describe(device_kind: str) -> str:
    """Describe where the tiles for a device kind come from.

    >>> describe("NVIDIA H100 80GB HBM3")
    'tiles for H100'
    """
    known = _known(device_kind)
    if device_kind in ("", "cpu"):
        return "small tiles for the interpreter"
    if known is None:
        return (
            f"tiles that fit any GPU since Ampere ({device_kind!r} has none of its own; "
            f"{', '.join(_TABLES)} have)"
        )
    return f"tiles for {known}"


def _known(device_kind: str) -> str | None:
    """Return the name in `_TABLES` of a device kind, such as "NVIDIA H100 80GB HBM3"; or None."""
    names = device_kind.replace("-", " ").split()
    return next((name for name in _TABLES for word in (name, "G" + name) if word in names), None)
