"""Implement the products of experts as Pallas kernels on Triton, for NVIDIA GPUs from Ampere on.

A program computes one tile of rows of *one* expert, against one block of columns. Tiles start at
the first row of their expert, and the last tile of an expert may be partly empty. So E experts and
M rows have at most M / tile + E tiles, whatever the load: that is the grid, and programs without a
tile end at once. Rows behind those of the last expert make tiles of an expert E, whose results are
zero. No two programs write the same row, so nothing is added atomically.

The gradient of the weights has one program for each block of each expert's weights; it visits the
rows of that expert. An expert without rows gets zeros.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Int32

from hcp_jax import compat
from hcp_jax.kernels.tiles import ProductTile, ProductTiles, product_tiles_for

SCOPE = "expert_product"
"""The name of these products in compiled programs."""

_DTYPES = ("bfloat16", "float16", "float32")
# Blocks of columns that come before the next tile of rows: they share the rows in the cache, while
# the programs that run at one time share the weights of few blocks.
_COLUMNS_TOGETHER = 8


def unsupported(dtype: str, platform: str) -> str | None:
    """Return why these kernels do not run with this dtype on this platform, or None."""
    if platform not in ("gpu", "cuda", "cpu"):
        return f"it runs on NVIDIA GPUs and, interpreted, on CPUs, not on {platform}"
    if dtype not in _DTYPES:
        return f"it takes {', '.join(_DTYPES)}, not {dtype}"
    if platform == "cpu" and jax.dtypes.canonicalize_dtype(np.int64) == np.int64:
        return "its interpreter on CPUs does not run with jax_enable_x64"
    return None


@dataclasses.dataclass(frozen=True)
class Call:
    """The static parameters of one call; M rows, E experts, weights [K, N] of each."""

    m: int
    e: int
    k: int
    n: int
    dtype: str
    tiles: ProductTiles
    interpret: bool

    @classmethod
    def from_arrays(
        cls, device_kind: str, interpret: bool, tiles: ProductTiles | None, x: Any, weights: Any
    ) -> "Call":
        """Return the parameters of a call with these rows and weights."""
        dtype = str(x.dtype)
        tiles = tiles or product_tiles_for(device_kind, dtype)
        e, k, n = weights.shape
        return cls(x.shape[0], e, k, n, dtype, tiles, interpret)

    def multiply(self, x: Any, weights: Any, sizes: Any, transposed: bool) -> Any:
        """Return the rows times the weights of their experts, or times their transposes.

        Args:
            x: `[M, K]`, or `[M, N]` for the transposes.
            weights: `[E, K, N]`.
            sizes: rows of each expert.
            transposed: whether to multiply with the transposes.
        """
        tile = self.tiles.rows
        columns = self.k if transposed else self.n
        tiles = tiles_of_rows(sizes, self.m, tile.rows)
        blocks = pl.cdiv(columns, tile.columns)
        kernel = functools.partial(_multiply, c=self, transposed=transposed)
        name = "expert_product_dx" if transposed else "expert_product_forward"
        shape = self.m, columns
        return self._run(kernel, name, tile, tiles.shape[0] * blocks, (tiles, x, weights), shape)

    def weight_gradients(self, x: Any, dout: Any, sizes: Any) -> Any:
        """Return the gradient of the weights, `[E, K, N]`, of the product's cotangent."""
        tile = self.tiles.weights
        ends = jnp.cumsum(sizes, dtype=jnp.int32)
        spans = jnp.stack([ends - sizes, ends], axis=1)
        programs = self.e * pl.cdiv(self.k, tile.rows) * pl.cdiv(self.n, tile.columns)
        kernel = functools.partial(_weight_gradients, c=self)
        shape = self.e, self.k, self.n
        return self._run(kernel, "expert_product_dw", tile, programs, (spans, x, dout), shape)

    def _run(
        self,
        kernel: Any,
        name: str,
        tile: ProductTile,
        programs: int,
        arrays: tuple[Any, ...],
        shape: tuple[int, ...],
    ) -> Any:
        compat.expect_pallas_triton()
        call = pl.pallas_call(
            kernel,
            name=name,
            grid=(programs,),
            in_specs=[_whole(x.shape) for x in arrays],
            out_specs=_whole(shape),
            out_shape=jax.ShapeDtypeStruct(shape, self.dtype),
            compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
            interpret=self.interpret,
        )
        return call(*arrays)


def tiles_of_rows(sizes: Int32[Array, "E"], rows: int, tile: int) -> Int32[Array, "tiles 3"]:
    """Return (expert, first row, end of the expert's rows) of each tile.

    Tiles of rows behind those of the last expert have expert E. Tiles that are not needed have
    expert E and no rows.

    Args:
        sizes: rows of each expert.
        rows: number of all rows, those behind included.
        tile: rows of a tile.

    >>> tiles_of_rows(jnp.array([3, 0, 2], jnp.int32), 6, 2).tolist()
    [[0, 0, 3], [0, 2, 3], [2, 3, 5], [3, 5, 6], [3, 6, 6]]
    """
    experts = sizes.shape[0]
    sizes = sizes.astype(jnp.int32)
    sizes = jnp.append(sizes, rows - jnp.sum(sizes, dtype=jnp.int32))
    most = (rows + min(experts + 1, rows) * (tile - 1)) // tile
    last = jnp.cumsum(-(-sizes // tile), dtype=jnp.int32)
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    number = jnp.arange(most, dtype=jnp.int32)
    expert = jnp.searchsorted(last, number, side="right").astype(jnp.int32)
    needed = expert <= experts
    expert = jnp.minimum(expert, experts)
    inside = number - (last - -(-sizes // tile))[expert]
    first = jnp.where(needed, (ends - sizes)[expert] + inside * tile, rows)
    return jnp.stack([expert, first, ends[expert]], axis=1)


def _multiply(
    tiles_ref: Any, x_ref: Any, weights_ref: Any, out_ref: Any, *, c: Call, transposed: bool
) -> None:
    """Compute one tile of rows against one block of columns."""
    tile, inner = c.tiles.rows, c.n if transposed else c.k
    width = out_ref.shape[1]
    number, block = _tile_and_block(pl.program_id(0), tiles_ref.shape[0], width, tile.columns)
    expert, first, end = (tiles_ref[number, i] for i in range(3))
    rows, columns = pl.ds(first, tile.rows), _block(block, tile.columns)
    own = _below(rows, end)

    def visit(step: Any, total: Any) -> Any:
        part = _block(step, tile.inner)
        x = _load(x_ref, (rows, part), (own, _within(part, inner)))
        at, inside = (part, columns), (_within(part, inner), _within(columns, width))
        order = slice(None, None, -1 if transposed else 1)
        weights = _load(weights_ref, at[order], inside[order], expert)
        return total + _dot(x, weights, 1, 1 if transposed else 0)

    steps = jnp.where(expert < c.e, jnp.int32(pl.cdiv(inner, tile.inner)), jnp.int32(0))
    total = jnp.zeros((tile.rows, tile.columns), jnp.float32)
    total = lax.fori_loop(jnp.int32(0), steps, visit, total)
    _store(out_ref, (rows, columns), (own, _within(columns, width)), total)


def _weight_gradients(spans_ref: Any, x_ref: Any, dout_ref: Any, out_ref: Any, *, c: Call) -> None:
    """Compute one block of one expert's weights over all its rows."""
    tile = c.tiles.weights
    columns_n, columns_k = pl.cdiv(c.n, tile.columns), pl.cdiv(c.k, tile.rows)
    program, block_n = _divide(pl.program_id(0), columns_n)
    expert, block_k = _divide(program, columns_k)
    first, end = spans_ref[expert, 0], spans_ref[expert, 1]
    at_k, at_n = _block(block_k, tile.rows), _block(block_n, tile.columns)
    inside = _within(at_k, c.k), _within(at_n, c.n)

    def visit(step: Any, total: Any) -> Any:
        rows = pl.ds(first + step * tile.inner, tile.inner)
        own = _below(rows, end)
        x = _load(x_ref, (rows, at_k), (own, inside[0]))
        dout = _load(dout_ref, (rows, at_n), (own, inside[1]))
        return total + _dot(x, dout, 0, 0)

    steps = lax.div(end - first + (tile.inner - 1), jnp.int32(tile.inner))
    total = jnp.zeros((tile.rows, tile.columns), jnp.float32)
    total = lax.fori_loop(jnp.int32(0), steps, visit, total)
    _store(out_ref, (at_k, at_n), inside, total, expert)


def _tile_and_block(program: Any, tiles: int, width: int, columns: int) -> tuple[Any, Any]:
    """Return the tile of rows and the block of columns of a program.

    Few neighbouring blocks of columns come first, then all tiles of rows, then the next blocks.
    """
    blocks = pl.cdiv(width, columns)
    whole = blocks // _COLUMNS_TOGETHER * _COLUMNS_TOGETHER
    chunk, inside = _divide(program, tiles * _COLUMNS_TOGETHER)
    first = chunk * _COLUMNS_TOGETHER
    rest = jnp.int32(max(1, blocks - whole))
    together = jnp.where(first < whole, jnp.int32(_COLUMNS_TOGETHER), rest)
    return lax.div(inside, together), first + lax.rem(inside, together)


def _divide(number: Any, by: int) -> tuple[Any, Any]:
    return lax.div(number, jnp.int32(by)), lax.rem(number, jnp.int32(by))


def _whole(shape: tuple[int, ...]) -> pl.BlockSpec:
    """Return the spec of an array that every program gets whole."""
    return pl.BlockSpec(shape, lambda _: (0,) * len(shape))


def _block(number: Any, size: int) -> Any:
    return pl.ds(pl.multiple_of(number * size, size), size)


def _below(span: Any, limit: Any) -> Any:
    return span.start + lax.iota(jnp.int32, span.size) < limit


def _within(span: Any, limit: int) -> Any:
    """Return which of a span of whole blocks are below `limit`; None if all are known to be."""
    return None if limit % span.size == 0 else _below(span, limit)


def _mask(inside: tuple[Any, Any]) -> Any:
    rows, columns = inside
    if columns is None:
        return None if rows is None else rows[:, None]
    return columns[None, :] if rows is None else rows[:, None] & columns[None, :]


def _load(ref: Any, at: tuple[Any, Any], inside: tuple[Any, Any], *expert: Any) -> Any:
    """Load a block, of an expert if there is one; what is not inside is zero."""
    mask = _mask(inside)
    masking = {} if mask is None else {"mask": mask, "other": 0.0}
    return plgpu.load(ref.at[(*expert, *at)], **masking)


def _store(
    ref: Any, at: tuple[Any, Any], inside: tuple[Any, Any], value: Any, *expert: Any
) -> None:
    plgpu.store(ref.at[(*expert, *at)], value.astype(ref.dtype), mask=_mask(inside))


def _dot(a: Any, b: Any, of_a: int, of_b: int) -> Any:
    """Contract in float32; HIGHEST precision means no TF32 for float32 operands."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((of_a,), (of_b,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
