"""Prepare and launch a Mosaic kernel: its static shape, mask arrays, order of work and grid.

TMA copies whole blocks, so lengths are padded to whole blocks before a kernel runs (this copies
arrays that are not whole already): padding keys have global index -1, padding queries see nothing.

Work is a list of items. An item is a block of queries (or of keys) of one head of one batch row,
with the blocks that it visits. Each program of a persistent grid processes some of the items.
Within a program one warpgroup loads and the others compute.

The forward and backward kernels share this module, because they must agree on these things.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int32

from hcp_jax import compat
from hcp_jax.kernels.block_map import (
    BlockMap,
    KeyBlocks,
    QueryBlocks,
    key_blocks,
    map_over_keys,
    map_over_queries,
    query_blocks,
)
from hcp_jax.kernels.core import CoreSpec
from hcp_jax.kernels.tiles import Tile, mosaic_tiles_for, processors
from hcp_jax.sequence.layout import KeyRuns
from hcp_jax.sequence.mask import Intervals


class Masks(NamedTuple):
    """The arrays (or references to them) with which a kernel finds its blocks and masks them.

    Every array has a row per mask: one row for the whole batch, or one for each batch row
    (`KernelShape.mask_row`). `key_index` has no rows: all batch rows hold the same keys.
    """

    start: Any  # [B1, Tp], of each query
    end: Any  # [B1, Tp]
    key_index: Any  # [Sp], global; -1 for padding
    order: Any  # [B1 or 1, blocks to visit], in the order of visits
    work: Any  # [B1, blocks · 5]: block, first, full_first, full_last, last; longest span first


@dataclasses.dataclass(frozen=True)
class KernelShape:
    """The static parameters of one call; the letters are those of `core.attend`."""

    b: int
    t: int
    s: int
    n: int
    k: int
    h: int
    masks: int  # 1, or b
    one_run: bool
    dtype: Any
    tile: Tile
    spec: CoreSpec

    @classmethod
    def from_arrays(
        cls, spec: CoreSpec, q: Any, k: Any, intervals: Intervals, runs: KeyRuns, kernel: str
    ) -> "KernelShape":
        """Return the shape of a call of `kernel`, a field of `Tiles`, with these arguments."""
        b, t, n, h = q.shape
        tiles = spec.tiles or mosaic_tiles_for(spec.device_kind, h)
        return cls(
            *(b, t, k.shape[1], n, k.shape[2], h),
            masks=intervals.start.shape[0],
            one_run=runs.starts.shape[0] == 1,
            dtype=q.dtype,
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
        return -(-self.t // self.tile.block_q)

    @property
    def blocks_k(self) -> int:
        """The number of key blocks."""
        return -(-self.s // self.tile.block_k)

    @property
    def padded_t(self) -> int:
        """T rounded up to whole blocks."""
        return self.blocks_q * self.tile.block_q

    @property
    def padded_s(self) -> int:
        """S rounded up to whole blocks."""
        return self.blocks_k * self.tile.block_k

    @property
    def warpgroups(self) -> int:
        """The number of warpgroups that compute."""
        return self.tile.warps // 4

    def mask_row(self, row: Any) -> Any:
        """Return the row of the mask arrays that belongs to batch row `row`."""
        return row if self.masks > 1 else 0

    def pad_queries(self, x: Any, value: Any = 0, dim: int = 1) -> Any:
        """Pad the query dim of `x` to whole blocks."""
        return _pad(x, self.padded_t - self.t, value, dim)

    def pad_keys(self, x: Any, value: Any = 0, dim: int = 1) -> Any:
        """Pad the key dim of `x` to whole blocks."""
        return _pad(x, self.padded_s - self.s, value, dim)

    def masks_over_keys(self, intervals: Intervals, runs: KeyRuns) -> Masks:
        """Return the masks of a kernel whose query blocks visit key blocks."""
        queries = query_blocks(intervals, self.tile.block_q)
        keys = key_blocks(runs, self.s, self.tile.block_k)
        return _masks(queries, keys, map_over_keys(queries, keys, self.one_run))

    def masks_over_queries(self, intervals: Intervals, runs: KeyRuns) -> Masks:
        """Return the masks of a kernel whose key blocks visit query blocks."""
        queries = query_blocks(intervals, self.tile.block_q)
        keys = key_blocks(runs, self.s, self.tile.block_k)
        return _masks(queries, keys, map_over_queries(queries, keys))


def _pad(x: Any, more: int, value: Any, dim: int) -> Any:
    if not more:
        return x
    widths = [(0, 0)] * x.ndim
    widths[dim] = (0, more)
    return jnp.pad(x, widths, constant_values=value)


def _masks(queries: QueryBlocks, keys: KeyBlocks, block_map: BlockMap) -> Masks:
    work = longest_first(block_map.spans)
    return Masks(
        queries.start,
        queries.end,
        keys.global_index,
        block_map.order,
        work.reshape(work.shape[0], -1),
    )


def longest_first(spans: Int32[Array, "B1 X 4"]) -> Int32[Array, "B1 X 5"]:
    """Return (block, first, full_first, full_last, last) of each block, longest spans first.

    So the last blocks to be processed are short, and no program ends long after the others.
    """
    visits = spans[..., 3] - spans[..., 0]
    block = jnp.argsort(-visits, axis=1, stable=True).astype(jnp.int32)[..., None]
    return jnp.concatenate([block, jnp.take_along_axis(spans, block, axis=1)], axis=2)


@dataclasses.dataclass(frozen=True)
class WorkSplit:
    """The work items of each program of the grid.

    Items are sorted by the length of their spans, longest first, over all heads and rows. They are
    dealt out in rounds of alternating direction, so that the program with the longest item of one
    round gets the shortest of the next. The programs work on all heads at the same time. Finishing
    some heads before others would use the cache better if there are many kv heads, but then each
    section of heads ends with short items for the same programs, and some programs do up to 1.7
    times the mean work (causal, 16k tokens).

    Attributes:
        blocks: number of blocks of each head of each batch row.
        heads: number of heads of each batch row.
        rows: number of batch rows.
        programs: number of programs of the grid.
    """

    blocks: int
    heads: int
    rows: int
    programs: int

    @classmethod
    def over_processors(cls, c: KernelShape, blocks: int, heads: int) -> "WorkSplit":
        """Return the split of a kernel with `blocks` and `heads` (q's or k's) per batch row."""
        items = blocks * heads * c.b
        return cls(blocks, heads, c.b, min(items, processors(c.spec.device_kind)))

    def rounds(self, program: Any) -> Any:
        """Return how many items a program processes."""
        whole, left = divmod(self.blocks * self.heads * self.rows, self.programs)
        rank = program if whole % 2 == 0 else self.programs - 1 - program
        return whole + (rank < left).astype(jnp.int32)

    def item(self, program: Any, turn: Any) -> Any:
        """Return (rank of the block, head, batch row) of a program's item in round `turn`."""
        forth = lax.rem(turn, jnp.int32(2)) == 0
        position = jnp.where(forth, program, self.programs - 1 - program)
        rest, head = _divmod(turn * self.programs + position, self.heads)
        rank, row = _divmod(rest, self.rows)
        return rank, head, row


def _divmod(x: Any, by: int) -> Any:
    return lax.div(x, jnp.int32(by)), lax.rem(x, jnp.int32(by))


class Visits(NamedTuple):
    """A block, and the entries `first … last` of `order` that it visits.

    Steps visit the full blocks (which need no mask) first, then the masked ones at both ends, so
    that a kernel has two loops, not three.
    """

    block: Any
    first: Any
    full_first: Any
    full_last: Any
    last: Any

    @classmethod
    def load(cls, masks: Masks, mask_row: Any, rank: Any) -> "Visits":
        """Read the visits of the block with this rank in `masks.work`."""
        return cls(*(masks.work[mask_row, rank * 5 + i] for i in range(5)))

    @property
    def steps(self) -> Any:
        """The number of blocks to visit."""
        return self.last - self.first

    @property
    def full(self) -> Any:
        """The number of steps, at the beginning, that need no mask."""
        return self.full_last - self.full_first

    def order_index(self, step: Any) -> Any:
        """Return the index into `order` of a step."""
        masked = self.first + step - self.full
        masked = jnp.where(masked < self.full_first, masked, masked + self.full)
        return jnp.where(step < self.full, self.full_first + step, masked)


def call(
    c: KernelShape, kernel: Callable[..., Any], split: WorkSplit, outputs: Any, scratch: Any
) -> Callable[..., Any]:
    """Return `kernel(*inputs, *outputs, scratch)` as a function of arrays.

    Args:
        c: shape of the call.
        kernel: the kernel; its name is shown in profiles.
        split: the work of the grid's programs.
        outputs: shapes of the outputs, all float32.
        scratch: scratch types.

    Raises:
        NotImplementedError: if the kernel would be interpreted on several devices.
    """
    devices = jax.sharding.get_abstract_mesh().size
    if c.spec.interpret and devices > 1:
        raise NotImplementedError(
            f"JAX's interpreter runs a Mosaic kernel on one CPU device at a time, and this mesh "
            f"has {devices}. Use implementation='blockwise' or 'triton' on CPUs."
        )
    return plgpu.kernel(
        kernel,
        out_type=tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in outputs),
        scratch_types=(scratch,),
        grid=(split.programs,),
        grid_names=("program",),
        num_threads=c.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,  # rows are reduced within a warp
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        interpret=compat.interpret_mosaic() if c.spec.interpret else None,
    )
