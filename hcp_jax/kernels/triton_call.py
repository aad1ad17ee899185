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
from hcp_jax.kernels.tiles import Tile, processors, tiles_for
from hcp_jax.kernels.work_split import are_few, cut_spans, cuts_for, divide
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
    kernel: str  # a field of `Tiles`
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
            kernel=kernel,
            tile=getattr(tiles, kernel),
            spec=spec,
        )

    @property
    def grid(self) -> "Grid":
        """The grid of the kernel."""
        on = processors(self.spec.device_kind)
        if self.kernel == "dkv":
            shape, passing, steps = (self.blocks_k, self.k), self.queries_per_kv, self.blocks_q
        else:
            shape, passing, steps = (self.blocks_q, self.n), 1, self.blocks_k
        # Other tiles leave no registers: on B200 kernels that find their part would spill.
        roomy = self.dtype != "float32" and max(self.h, self.hv) <= 128
        if not (roomy or self.spec.interpret):
            return Grid(*shape, self.b, 1, 1, few=False)
        items = shape[0] * shape[1] * self.b
        cuts = cuts_for(shape[0], shape[1] * self.b, passing, steps, on)
        return Grid(*shape, self.b, *cuts, are_few(items, on))

    @property
    def passing_heads(self) -> int:
        """Query heads that pass the key block of a program."""
        return self.queries_per_kv // self.grid.head_parts

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

    # Block specs. A program works on one part of a block of one head (of q, or of k) of one row.

    def head(self, *width: int) -> pl.BlockSpec:
        """Return the spec of all rows (or numbers) of the program's query head."""
        zeros = (0,) * len(width)
        return self._spec((None, self.padded_t, None, *width), lambda n, b: (b, 0, n, *zeros))

    def shared_kv_head(self, width: int) -> pl.BlockSpec:
        """Return the spec of all rows of the kv head that the program's query head reads."""
        return self._spec(
            (None, self.padded_s, None, width),
            lambda n, b: (b, 0, lax.div(n, jnp.int32(self.queries_per_kv)), 0),
        )

    @property
    def head_stats(self) -> pl.BlockSpec:
        """The spec of all numbers of the program's query head."""
        return self._spec((None, None, self.padded_t), lambda n, b: (b, n, 0))

    def query_heads(self, width: int) -> pl.BlockSpec:
        """Return the spec of all rows of the query heads that pass the program's key block."""
        return self._spec(
            (None, self.padded_t, self.passing_heads, width), lambda i, b: (b, 0, i, 0)
        )

    def kv_head(self, width: int) -> pl.BlockSpec:
        """Return the spec of all rows of the program's kv head."""
        return self._spec(
            (None, self.padded_s, None, width),
            lambda i, b: (b, 0, self.grid.whole_head(i), 0),
        )

    @property
    def query_heads_stats(self) -> pl.BlockSpec:
        """The spec of all numbers of the query heads that pass the program's key block."""
        return self._spec((None, self.passing_heads, self.padded_t), lambda i, b: (b, i, 0))

    def _spec(self, block: tuple[int | None, ...], index: Callable[..., Any]) -> pl.BlockSpec:
        """Return a block spec from a function of (head of the grid, batch row)."""

        def index_map(*program: Any) -> Any:
            _, _, head, row = self.grid.item(*program)
            return index(head, row)

        return pl.BlockSpec(block, index_map)

    def masks(self, queries: QueryBlocks, keys: KeyBlocks, block_map: BlockMap) -> Masks:
        """Return the mask arrays, each with its `BlockSpec`."""

        def with_spec(array: Any) -> Any:
            own_row, zeros = array.shape[0] > 1, (0,) * (array.ndim - 1)
            block = (None, *array.shape[1:])
            return array, self._spec(block, lambda _, b: (b if own_row else 0, *zeros))

        arrays = (
            queries.start,
            queries.end,
            keys.global_index[None],
            block_map.order,
            cut_spans(block_map.spans, self.grid.parts),
        )
        return Masks(*map(with_spec, arrays))

    def run(self, kernel: Callable[..., Any], inputs: Any, masks: Masks, outputs: Any) -> Any:
        """Call `kernel(*inputs, masks, *outputs, c=self)`; each array comes with its `BlockSpec`.

        `outputs` are shapes; all outputs are float32. If the grid cuts its items, each output
        has a leading dim of parts, whose results the caller must add up or merge.
        """
        compat.expect_pallas_triton()
        grid = self.grid
        if grid.cut:
            outputs = [
                ((grid.head_parts * grid.parts, *shape), grid.one_part_each(spec))
                for shape, spec in outputs
            ]
        call = pl.pallas_call(
            functools.partial(kernel, c=self),
            grid=grid.shape,
            in_specs=[*(spec for _, spec in inputs), Masks(*(spec for _, spec in masks))],
            out_specs=[spec for _, spec in outputs],
            out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape, _ in outputs],
            compiler_params=plgpu.CompilerParams(
                num_warps=self.tile.warps, num_stages=self.tile.stages
            ),
            interpret=self.spec.interpret,
        )
        return call(*(array for array, _ in inputs), Masks(*(array for array, _ in masks)))

    def run_and_add(self, *args: Any, **options: Any) -> Any:
        """Call `run` and add up the results of all parts."""
        results = self.run(*args, **options)
        return [jnp.sum(x, axis=0) for x in results] if self.grid.cut else results


@dataclasses.dataclass(frozen=True)
class Grid:
    """The programs of a kernel, in the order in which a GPU starts them.

    If there are many, all blocks of a head come before the next head, which uses the cache best. If
    there are few, all heads of a block come before the next block: blocks are in the order of their
    work under a causal mask, so the last programs to start are short, and none ends long after the
    others. If the work would still be uneven, each item is cut into parts (`work_split`).

    Attributes:
        blocks: number of blocks of each head.
        whole_heads: number of heads.
        rows: number of batch rows.
        head_parts: number of parts that the heads that pass a block are cut into.
        parts: number of parts that each span is cut into.
        few: whether all heads of a block come before the next block.
    """

    blocks: int
    whole_heads: int
    rows: int
    head_parts: int
    parts: int
    few: bool

    @property
    def cut(self) -> bool:
        """Whether an item has several parts."""
        return self.head_parts * self.parts > 1

    @property
    def heads(self) -> int:
        """The number of heads of the grid: one for each part of a head."""
        return self.whole_heads * self.head_parts

    @property
    def shape(self) -> tuple[int, int, int]:
        """The number of programs along each dim of the grid; the first dim varies fastest."""
        if self.few:
            return self.heads * self.parts, self.blocks, self.rows
        return self.blocks, self.heads, self.rows

    def item(self, x: Any, y: Any, z: Any) -> tuple[Any, Any, Any, Any]:
        """Return (block, part of its span, head of the grid, batch row) of a program."""
        if not self.few:
            return x, 0, y, z
        head, part = divide(x, self.parts)
        return y, part, head, z

    def whole_head(self, head: Any) -> Any:
        """Return the head of the arrays of a head of the grid."""
        return divide(head, self.head_parts)[0]

    def one_part_each(self, spec: Any) -> pl.BlockSpec:
        """Return the spec of an output with a leading dim of parts, from that of one part."""

        def index_map(*program: Any) -> Any:
            _, part, head, _ = self.item(*program)
            head_part = divide(head, self.head_parts)[1]
            return head_part * self.parts + part, *spec.index_map(*program)

        return pl.BlockSpec((None, *spec.block_shape), index_map)
