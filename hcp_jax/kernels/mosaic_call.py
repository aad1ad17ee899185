"""Prepare and launch a Mosaic kernel: its static shape, mask arrays and visits.

TMA copies whole blocks, so lengths are padded to whole blocks before a kernel runs (this copies
arrays that are not whole already): padding keys have global index -1, padding queries see nothing.

Each program of a persistent grid processes some of the work items of a call, or parts of them
(`work_split`). Within a program one warpgroup loads and the others compute.

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
from hcp_jax.kernels.work_split import WorkSplit, part_of
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

    def split(self, blocks: int, heads: int, steps: int) -> WorkSplit:
        """Return the split of a kernel with `blocks` and `heads` (q's or k's) per batch row.

        `steps` is the most steps that an item can have.
        """
        on = processors(self.spec.device_kind)
        return WorkSplit.over_processors(blocks, heads, self.b, steps, on)

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


class Visits(NamedTuple):
    """A block, and the entries `first … last` of `order` that a part of its work visits.

    A step visits one of them, for one of the `heads` that pass; all heads of an entry come before
    the next entry. Steps visit the full blocks (which need no mask) first, then the masked ones at
    both ends, so that a kernel has two loops, not three. The part is the steps `begin … stop` of
    these.
    """

    block: Any
    first: Any
    full_first: Any
    full_last: Any
    last: Any
    heads: int
    begin: Any
    stop: Any

    @classmethod
    def load(
        cls, masks: Masks, mask_row: Any, rank: Any, heads: int = 1, part: Any = 0, parts: int = 1
    ) -> "Visits":
        """Read the visits of the block with this rank in `masks.work`, and take one of its parts.

        Args:
            masks: the masks of the call.
            mask_row: row of the mask arrays.
            rank: rank of the block, which has the longest span at 0.
            heads: number of heads that pass the block.
            part: number of the part.
            parts: number of parts.
        """
        block, first, full_first, full_last, last = (
            masks.work[mask_row, rank * 5 + i] for i in range(5)
        )
        begin, stop = part_of((last - first) * heads, part, parts)
        return cls(block, first, full_first, full_last, last, heads, begin, stop)

    @property
    def steps(self) -> Any:
        """The number of steps of the part."""
        return self.stop - self.begin

    @property
    def full(self) -> Any:
        """The number of steps, at the beginning of the part, that need no mask."""
        full = (self.full_last - self.full_first) * self.heads
        if isinstance(self.begin, int):  # the only part
            return full
        return jnp.clip(full - self.begin, 0, self.steps)

    def at(self, step: Any) -> tuple[Any, Any]:
        """Return (index into `order`, number of the passing head) of a step of the part."""
        step = self.begin + step
        head: Any = 0
        if self.heads > 1:
            step, head = lax.div(step, jnp.int32(self.heads)), lax.rem(step, jnp.int32(self.heads))
        full = self.full_last - self.full_first
        masked = self.first + step - full
        masked = jnp.where(masked < self.full_first, masked, masked + full)
        return jnp.where(step < full, self.full_first + step, masked), head


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
