"""Prepare and launch a Triton kernel: its static shape, and the array blocks of its programs.

Every program gets all rows of the heads that it works on, and selects its own with `pl.ds`. Lengths
are rounded up to whole blocks; rows past the end are only read or written with a mask.

The kernels know no grid, and `triton.py` knows no program; this module connects them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from hcp_jax import compat
from hcp_jax.kernels.block_map import BlockMap, KeyBlocks, QueryBlocks
from hcp_jax.kernels.core import CoreSpec
from hcp_jax.kernels.tiles import Tile, tiles_for
from hcp_jax.sequence.layout import KeyRuns
from hcp_jax.sequence.mask import Intervals

LEAST_PART = 16  # the smallest inner dim of a matrix product in Triton
GREATEST_HEAD = 256


class Masks(NamedTuple):
    """The arrays (or references to them) with which a program finds and masks its blocks."""

    start: Any  # [Tp], of each query
    end: Any
    key_index: Any  # [Sp], global
    order: Any  # [blocks to visit]
    spans: Any  # [blocks, 4]


@dataclasses.dataclass(frozen=True)
class Call:
    """The static parameters of one call; the letters are those of `core.attend`."""

    b: int
    t: int
    s: int
    n: int
    k: int
    h: int
    hv: int
    one_run: bool
    dtype: str
    tile: Tile
    spec: CoreSpec

    @classmethod
    def from_arrays(
        cls,
        spec: CoreSpec,
        q: Any,
        k: Any,
        v: Any,
        intervals: Intervals,
        runs: KeyRuns,
        kernel: str,
    ) -> "Call":
        """Return the parameters of calling `kernel`, a field of `Tiles`, with these arguments."""
        b, t, n, h = q.shape
        tiles = spec.tiles or tiles_for(spec.device_kind, str(q.dtype), h, v.shape[3])
        return cls(
            *(b, t, k.shape[1], n, k.shape[2], h, v.shape[3]),
            one_run=runs.starts.shape[0] == 1,
            dtype=str(q.dtype),
            tile=getattr(tiles, kernel),
            spec=spec,
        )

    @property
    def queries_per_kv(self) -> int:
        """Query heads per kv head."""
        return self.n // self.k

    @property
    def blocks_q(self) -> int:
        """The number of query blocks."""
        return pl.cdiv(self.t, self.tile.block_q)

    @property
    def blocks_k(self) -> int:
        """The number of key blocks."""
        return pl.cdiv(self.s, self.tile.block_k)

    @property
    def padded_t(self) -> int:
        """T rounded up to whole blocks."""
        return self.blocks_q * self.tile.block_q

    @property
    def padded_s(self) -> int:
        """S rounded up to whole blocks."""
        return self.blocks_k * self.tile.block_k

    def like_q(self, *width: int) -> tuple[int, ...]:
        """Return the shape of an array with a row (or a number) for each query and query head."""
        return self.b, self.t, self.n, *width

    def like_k(self, width: int) -> tuple[int, ...]:
        """Return the shape of an array with a row for each key and kv head."""
        return self.b, self.s, self.k, width

    def parts(self, size: int) -> list[tuple[int, int]]:
        """Cut a head size into powers of two, which Triton needs; return (offset, width) pairs.

        So 192 is 128 and 64: padding it to 256 would cost a third more arithmetic. Parts are narrow
        for float32, whose products are unrolled into single multiply-adds: the operands of a wide
        part would not fit into the registers.
        """
        widest = 32 if self.dtype == "float32" else GREATEST_HEAD
        parts, offset = [], 0
        while offset < size:
            width = min(1 << (size - offset).bit_length() - 1, widest)
            parts.append((offset, width))
            offset += width
        return parts

    # Block specs for a grid of (query block, query head, batch row).

    def head(self, *width: int) -> pl.BlockSpec:
        """Return the spec of all rows (or numbers) of the program's query head."""
        zeros = (0,) * len(width)
        return pl.BlockSpec((None, self.padded_t, None, *width), lambda _, n, b: (b, 0, n, *zeros))

    def shared_kv_head(self, width: int) -> pl.BlockSpec:
        """Return the spec of all rows of the kv head that the program's query head reads."""
        return pl.BlockSpec(
            (None, self.padded_s, None, width),
            lambda _, n, b: (b, 0, lax.div(n, jnp.int32(self.queries_per_kv)), 0),
        )

    @property
    def head_stats(self) -> pl.BlockSpec:
        """The spec of all numbers of the program's query head."""
        return pl.BlockSpec((None, None, self.padded_t), lambda _, n, b: (b, n, 0))

    # Block specs for a grid of (key block, kv head, batch row).

    def query_heads(self, width: int) -> pl.BlockSpec:
        """Return the spec of all rows of the query heads that read the program's kv head."""
        return pl.BlockSpec(
            (None, self.padded_t, self.queries_per_kv, width), lambda _, k, b: (b, 0, k, 0)
        )

    def kv_head(self, width: int) -> pl.BlockSpec:
        """Return the spec of all rows of the program's kv head."""
        return pl.BlockSpec((None, self.padded_s, None, width), lambda _, k, b: (b, 0, k, 0))

    @property
    def query_heads_stats(self) -> pl.BlockSpec:
        """The spec of all numbers of the query heads that read the program's kv head."""
        return pl.BlockSpec((None, self.queries_per_kv, self.padded_t), lambda _, k, b: (b, k, 0))

    def masks(self, queries: QueryBlocks, keys: KeyBlocks, block_map: BlockMap) -> Masks:
        """Return the mask arrays, each with its `BlockSpec`, for either grid."""

        def with_spec(array: Any) -> Any:
            own_row, zeros = array.shape[0] > 1, (0,) * (array.ndim - 1)
            block = (None, *array.shape[1:])
            return array, pl.BlockSpec(block, lambda _, __, b: (b if own_row else 0, *zeros))

        arrays = (
            queries.start,
            queries.end,
            keys.global_index[None],
            block_map.order,
            block_map.spans,
        )
        return Masks(*map(with_spec, arrays))

    def run(
        self, kernel: Callable[..., Any], grid: Any, inputs: Any, masks: Masks, outputs: Any
    ) -> Any:
        """Call `kernel(*inputs, masks, *outputs, c=self)`; each array comes with its `BlockSpec`.

        `outputs` are shapes; all outputs are float32.
        """
        compat.expect_pallas_triton()
        call = pl.pallas_call(
            functools.partial(kernel, c=self),
            grid=grid,
            in_specs=[*(spec for _, spec in inputs), Masks(*(spec for _, spec in masks))],
            out_specs=[spec for _, spec in outputs],
            out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape, _ in outputs],
            compiler_params=plgpu.CompilerParams(
                num_warps=self.tile.warps, num_stages=self.tile.stages
            ),
            interpret=self.spec.interpret,
        )
        return call(*(array for array, _ in inputs), Masks(*(array for array, _ in masks)))
