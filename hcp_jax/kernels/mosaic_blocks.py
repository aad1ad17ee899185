"""What the Mosaic kernels share: the static facts of a call, its arrays, and masking a block.

TMA copies whole blocks, so lengths are padded to whole blocks before the kernels see them (a copy,
where they are not whole already): padding keys have global index -1, padding queries see nothing.
The mask's arrays are those of `walks`: intervals, the global index of each key place, and for each
block the span of the blocks of the other side that it visits.

It stands apart from the kernels because forward and backward must agree on it.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int32

from hcp_jax.kernels.core import CoreSpec
from hcp_jax.kernels.tiles import Tile, mosaic_tiles_for
from hcp_jax.kernels.walks import (
    Walk,
    key_blocks,
    query_blocks,
    walk_over_keys,
    walk_over_queries,
)
from hcp_jax.layout import KeyRuns
from hcp_jax.mask import Intervals

ROWS = 64  # of a warpgroup's wgmma


class Masks(NamedTuple):
    """What a kernel needs to find its blocks and to mask them (arrays, or references to them).

    Every array has a row per mask: one for all rows of the batch, or one each (`Facts.mask_row`);
    `key_index` has none, since all rows hold the same keys.
    """

    start: Any  # [B1, Tp], of each query
    end: Any  # [B1, Tp]
    key_index: Any  # [Sp], global; -1 for padding
    order: Any  # [B1 or 1, blocks walked over], in the order of the walk
    spans: Any  # [B1, blocks · 4]: first, full_first, full_last, last of each block's walk
    longest: Any  # [B1, blocks]: the blocks, those with the longest walk first


@dataclasses.dataclass(frozen=True)
class Facts:
    """The static facts of one call; the letters are those of `core.attend`."""

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
    def of(cls, spec: CoreSpec, q, k, intervals: Intervals, runs: KeyRuns, kernel: str) -> "Facts":
        """The facts of calling `kernel`, a field of `Tiles`, with these arguments."""
        b, t, n, h = q.shape
        return cls(
            *(b, t, k.shape[1], n, k.shape[2], h),
            masks=intervals.start.shape[0],
            one_run=runs.starts.shape[0] == 1,
            dtype=q.dtype,
            tile=getattr(mosaic_tiles_for(spec.device_kind, h), kernel),
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
    rows = walk.spans.shape[0]
    return Masks(
        queries.start,
        queries.end,
        keys.global_index,
        walk.order,
        walk.spans.reshape(rows, -1),
        longest_first(walk.spans),
    )


def longest_first(spans: Int32[Array, "B1 X 4"]) -> Int32[Array, "B1 X"]:
    """The blocks in the order of falling work, so that the last ones to start are short.

    Equal ones in falling order: under causal masks of one run that is what is there already.
    """
    visits = spans[..., 3] - spans[..., 0]
    return jnp.argsort(visits, axis=1, stable=True)[:, ::-1].astype(jnp.int32)


def hide(logits, start, end, index):
    """-inf where a key's global index lies outside a query's interval; padding has index -1.

    `start`, `end` and `index` broadcast to the logits' shape.
    """
    seen = jnp.logical_and(start <= index, index < end)
    return jnp.where(seen, logits, -jnp.inf)


class Span(NamedTuple):
    """One block's walk: places `first … last` of `order`, of which the full ones need no mask.

    Steps count the masked places at both ends first, then the full ones (so that a kernel has two
    loops and not three).
    """

    first: Any
    full_first: Any
    full_last: Any
    last: Any

    @classmethod
    def of(cls, spans_ref, row, block) -> "Span":
        """Read from `Masks.spans`."""
        return cls(*(spans_ref[row, block * 4 + i] for i in range(4)))

    @property
    def steps(self):
        """How many places there are."""
        return self.last - self.first

    @property
    def masked(self):
        """How many of the steps, the first ones, need a mask."""
        return (self.full_first - self.first) + (self.last - self.full_last)

    def place(self, step):
        """The place in `order` of a step."""
        full = self.full_last - self.full_first
        masked_place = self.first + step
        masked_place = jnp.where(masked_place < self.full_first, masked_place, masked_place + full)
        return jnp.where(step < self.masked, masked_place, self.full_first + step - self.masked)


def work_item(facts: Facts, index, blocks: int, heads: int, longest_ref):
    """(block, head, batch row) of a work item.

    Heads are innermost, so that the programs that run at one time share as few keys and values as
    their blocks allow, and the longest blocks of all heads come first.
    """
    head, rest = lax.rem(index, jnp.int32(heads)), lax.div(index, jnp.int32(heads))
    rank, row = lax.rem(rest, jnp.int32(blocks)), lax.div(rest, jnp.int32(blocks))
    return longest_ref[facts.mask_row(row), rank], head, row


def multiply(c: Facts, *terms, spare=None, meanwhile=None):
    """Matrix products `begin + left · right`, issued together and awaited together.

    Args:
        c: of the call.
        *terms: (begin, left, right): begin is an array in the layout of wgmma, or None for zero;
            left is an array or a reference to shared memory; right is a reference.
        spare: a reference that a left array fits in. The interpreter takes no arrays.
        meanwhile: called when all are under way.
    """
    shapes = [(left.shape[0], right.shape[1]) for _, left, right in terms]
    if not c.spec.interpret:

        def start(accs):
            for acc, (_, left, right) in zip(accs, terms, strict=True):
                plgpu.wgmma(acc, left, right)
            if meanwhile is not None:
                meanwhile()

        begins = [
            zeros(*shape) if term[0] is None else term[0]
            for shape, term in zip(shapes, terms, strict=True)
        ]
        return pl.run_state(start)(tuple(map(plgpu.ACC.init, begins)))
    results = []
    for shape, (begin, left, right) in zip(shapes, terms, strict=True):
        if isinstance(left, jax.Array):
            spare[...] = left
            plgpu.commit_smem()
            left = spare

        def product(acc, left=left, right=right):
            plgpu.wgmma(acc, left, right)
            return acc[...]

        result = pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))
        results.append(result if begin is None else begin + result)
    if meanwhile is not None:
        meanwhile()
    return tuple(results)


def zeros(*shape):
    """Where sums of products, or of their rows, begin."""
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


def shape_like(shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    """An output of a kernel."""
    return jax.ShapeDtypeStruct(shape, dtype)
