"""One call of a Mosaic kernel: its static facts, the masks' arrays, the order of work, the launch.

TMA copies whole blocks, so lengths are padded to whole blocks before the kernels see them (a copy,
where they are not whole already): padding keys have global index -1, padding queries see nothing.

Work is a list of items, each a block of queries (or of keys) of one head of one batch row, with the
walk of the blocks that it visits. Each program of a persistent grid works through its share: within
a program one warpgroup loads and the others compute.

It stands between the kernels and the door, because forward and backward must agree on it.
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
    Walk,
    key_blocks,
    query_blocks,
    walk_over_keys,
    walk_over_queries,
)
from hcp_jax.kernels.core import CoreSpec
from hcp_jax.kernels.tiles import Tile, mosaic_tiles_for, processors
from hcp_jax.sequence.layout import KeyRuns
from hcp_jax.sequence.mask import Intervals


class Masks(NamedTuple):
    """What a kernel needs to find its blocks and to mask them (arrays, or references to them).

    Every array has a row per mask: one for all rows of the batch, or one each
    (`KernelShape.mask_row`); `key_index` has none, since all rows hold the same keys.
    """

    start: Any  # [B1, Tp], of each query
    end: Any  # [B1, Tp]
    key_index: Any  # [Sp], global; -1 for padding
    order: Any  # [B1 or 1, blocks walked over], in the order of the walk
    work: Any  # [B1, blocks · 5]: block, first, full_first, full_last, last; longest walk first


@dataclasses.dataclass(frozen=True)
class KernelShape:
    """What is static of one call; the letters are those of `core.attend`."""

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
        cls, spec: CoreSpec, q, k, intervals: Intervals, runs: KeyRuns, kernel: str
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
    def group(self) -> int:
        """Query heads of a kv head."""
        return self.n // self.k

    @property
    def blocks_q(self) -> int:
        """Blocks of queries."""
        return -(-self.t // self.tile.block_q)

    @property
    def blocks_k(self) -> int:
        """Blocks of keys."""
        return -(-self.s // self.tile.block_k)

    @property
    def padded_t(self) -> int:
        """T in whole blocks."""
        return self.blocks_q * self.tile.block_q

    @property
    def padded_s(self) -> int:
        """S in whole blocks."""
        return self.blocks_k * self.tile.block_k

    @property
    def warpgroups(self) -> int:
        """Warpgroups that compute."""
        return self.tile.warps // 4

    def mask_row(self, row):
        """Which row of the masks' arrays is that of batch row `row`."""
        return row if self.masks > 1 else 0

    def pad_queries(self, x, value=0, dim: int = 1):
        """`x` with its query dim in whole blocks."""
        return _pad(x, self.padded_t - self.t, value, dim)

    def pad_keys(self, x, value=0, dim: int = 1):
        """`x` with its key dim in whole blocks."""
        return _pad(x, self.padded_s - self.s, value, dim)

    def masks_over_keys(self, intervals: Intervals, runs: KeyRuns) -> Masks:
        """For a kernel whose query blocks walk over key blocks."""
        queries = query_blocks(intervals, self.tile.block_q)
        keys = key_blocks(runs, self.s, self.tile.block_k)
        return _masks(queries, keys, walk_over_keys(queries, keys, self.one_run))

    def masks_over_queries(self, intervals: Intervals, runs: KeyRuns) -> Masks:
        """For a kernel whose key blocks walk over query blocks."""
        queries = query_blocks(intervals, self.tile.block_q)
        keys = key_blocks(runs, self.s, self.tile.block_k)
        return _masks(queries, keys, walk_over_queries(queries, keys))


def _pad(x, more: int, value, dim: int):
    if not more:
        return x
    widths = [(0, 0)] * x.ndim
    widths[dim] = (0, more)
    return jnp.pad(x, widths, constant_values=value)


def _masks(queries, keys, walk: Walk) -> Masks:
    work = longest_first(walk.spans)
    return Masks(
        queries.start, queries.end, keys.global_index, walk.order, work.reshape(work.shape[0], -1)
    )


def longest_first(spans: Int32[Array, "B1 X 4"]) -> Int32[Array, "B1 X 5"]:
    """(block, first, full_first, full_last, last) of each block, those that visit most first.

    So the last ones to be worked on are short, and no program ends long after the others.
    """
    visits = spans[..., 3] - spans[..., 0]
    block = jnp.argsort(-visits, axis=1, stable=True).astype(jnp.int32)[..., None]
    return jnp.concatenate([block, jnp.take_along_axis(spans, block, axis=1)], axis=2)


@dataclasses.dataclass(frozen=True)
class WorkSplit:
    """The work items that each program of the grid does.

    The longest blocks of all heads and rows come first, then the next ones. Items are dealt out in
    rounds to and fro, so that whoever got the longest of one round gets the shortest of the next.
    At any time the programs are at work on all heads: finishing some heads before others would use
    the cache better where there are many kv heads, but then each section of heads ends with short
    items dealt to the same programs (up to 1.7 times the mean work, at 16k tokens causal).

    Attributes:
        blocks: that each head of each batch row has.
        heads: that each batch row has.
        rows: of the batch.
        programs: of the grid.
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

    def rounds(self, program):
        """How many items a program does."""
        whole, left = divmod(self.blocks * self.heads * self.rows, self.programs)
        place = program if whole % 2 == 0 else self.programs - 1 - program
        return whole + (place < left).astype(jnp.int32)

    def item(self, program, turn):
        """(rank of the block, head, batch row) of the item that a program does in its `turn`."""
        forth = lax.rem(turn, jnp.int32(2)) == 0
        place = jnp.where(forth, program, self.programs - 1 - program)
        rest, head = _divmod(turn * self.programs + place, self.heads)
        rank, row = _divmod(rest, self.rows)
        return rank, head, row


def _divmod(x, by: int):
    return lax.div(x, jnp.int32(by)), lax.rem(x, jnp.int32(by))


class Walked(NamedTuple):
    """A block, and the places `first … last` of `order` that it visits.

    Steps count the full ones (which need no mask) first, then the masked ones at both ends, so that
    a kernel has two loops and not three.
    """

    block: Any
    first: Any
    full_first: Any
    full_last: Any
    last: Any

    @classmethod
    def of(cls, masks: Masks, mask_row, rank) -> "Walked":
        """The walk of the block that comes `rank`-th."""
        return cls(*(masks.work[mask_row, rank * 5 + i] for i in range(5)))

    @property
    def steps(self):
        """How many places there are."""
        return self.last - self.first

    @property
    def full(self):
        """How many of the steps, the first ones, need no mask."""
        return self.full_last - self.full_first

    def place(self, step):
        """The place in `order` of a step."""
        masked = self.first + step - self.full
        masked = jnp.where(masked < self.full_first, masked, masked + self.full)
        return jnp.where(step < self.full, self.full_first + step, masked)


def call(
    c: KernelShape, kernel: Callable, share: WorkSplit, outputs: Any, scratch: Any
) -> Callable:
    """`kernel(*inputs, *outputs, scratch)` as a function of arrays.

    Args:
        c: of the call.
        kernel: its name is that of the kernel in profiles.
        share: the grid.
        outputs: shapes, all float32.
        scratch: types.

    Raises:
        NotImplementedError: if it is to be interpreted on several devices.
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
        grid=(share.programs,),
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
