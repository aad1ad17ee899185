"""Tile sizes of the Pallas kernels, per kind of device, dtype and head size.

It stands alone because it is data, not code: it changes when somebody measures, and the kernels do
not.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Tile:
    """How one kernel is cut and compiled.

    Attributes:
        block_q: queries of a block.
        block_k: keys of a block.
        warps: warps that work on one block (32 threads each).
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


# Small, so that the short sequences of tests have several blocks.
_INTERPRETER = Tiles(Tile(32, 16, 4, 1), Tile(16, 32, 4, 1), Tile(16, 32, 4, 1))


def tiles_for(device_kind: str, dtype: str, head_size: int, v_head_size: int) -> Tiles:
    """The tiles of a device kind (`jax.Device.device_kind`)."""
    if device_kind in ("", "cpu"):
        return _INTERPRETER
    return Tiles(Tile(128, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2))
