"""Describe the work of a gradient kernel on Mosaic GPU: which side is held, and which side passes.

`mosaic_backward` says what the two sides are, and has the kernels.
"""

import dataclasses
from typing import Any, NamedTuple

from hcp_jax.kernels.mosaic_blocks import ROWS
from hcp_jax.kernels.mosaic_call import KernelShape, Masks, Visits


class Arrays(NamedTuple):
    """The inputs of the kernels.

    Attributes:
        q: `[B, Tp, N, H]`.
        k: `[B, Sp, K, H]`.
        v: as k.
        dout: as q.
        minus_lse: the bits of -lse in log2, `[B, N, Tp]`; -inf where a query sees nothing, so that
            its weights are 0.
        minus_delta: the bits of -delta, `[B, N, Tp]`.
        masks: the blocks to visit, and their masks.
    """

    q: Any
    k: Any
    v: Any
    dout: Any
    minus_lse: Any
    minus_delta: Any
    masks: Masks


class Side(NamedTuple):
    """Some rows of one side, Q and dO or K and V, and their numbers for masks and weights."""

    a: Any
    b: Any
    numbers: list[Any]

    @classmethod
    def queries(cls, c: KernelShape, arrays: Arrays, row: Any, head: Any, rows: Any) -> "Side":
        """Return query rows; their numbers are minus_lse, minus_delta, start and end."""
        numbers = [x.at[row, head, rows] for x in (arrays.minus_lse, arrays.minus_delta)]
        numbers += [x.at[c.mask_row(row), rows] for x in (arrays.masks.start, arrays.masks.end)]
        return cls(arrays.q.at[row, rows, head], arrays.dout.at[row, rows, head], numbers)

    @classmethod
    def keys(cls, c: KernelShape, arrays: Arrays, row: Any, head: Any, rows: Any) -> "Side":
        """Return key rows; their number is the global index."""
        k, v = arrays.k.at[row, rows, head], arrays.v.at[row, rows, head]
        return cls(k, v, [arrays.masks.key_index.at[rows]])


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static parameters of one kernel: `sums` are the gradients that it computes."""

    c: KernelShape
    sums: tuple[str, ...]

    @property
    def holds_queries(self) -> bool:
        """Whether programs hold queries; otherwise they hold keys."""
        return self.sums == ("dq",)

    def __post_init__(self) -> None:
        tile = self.c.tile
        block = tile.block_q if self.holds_queries else tile.block_k
        if block != self.held_rows:
            raise ValueError(
                f"{tile.warps} warps hold {self.held_rows} rows, the tile's block {block}: for "
                f"{' and '.join(self.sums)} give the block of "
                f"{'queries' if self.holds_queries else 'keys'} 16 rows per warp."
            )

    def visits(self, masks: Masks, row: Any, rank: Any, part: Any, parts: int) -> Visits:
        """Return the visits of a part of an item."""
        return Visits.load(masks, self.c.mask_row(row), rank, self.passing_heads, part, parts)

    def held(self, *args: Any) -> Side:
        """Return rows of the held side, from `Side.queries` or `Side.keys`."""
        return (Side.queries if self.holds_queries else Side.keys)(self.c, *args)

    def passing(self, *args: Any) -> Side:
        """Return rows of the passing side, from `Side.queries` or `Side.keys`."""
        return (Side.keys if self.holds_queries else Side.queries)(self.c, *args)

    @property
    def passing_rows(self) -> int:
        """Rows of a passing block."""
        return self.c.tile.block_k if self.holds_queries else self.c.tile.block_q

    @property
    def passing_heads(self) -> int:
        """Heads of the passing side for each held head."""
        return 1 if self.holds_queries else self.c.queries_per_kv

    @property
    def held_rows(self) -> int:
        """Rows of the block that a program holds."""
        return self.c.warpgroups * ROWS

    @property
    def held_matrices(self) -> int:
        """The number of held matrices: A only for dv, which needs no dP; else A and B."""
        return 1 if self.sums == ("dv",) else 2

    @property
    def most_steps(self) -> int:
        """Most steps that an item can have."""
        return (self.c.blocks_k if self.holds_queries else self.c.blocks_q) * self.passing_heads

    @property
    def length(self) -> int:
        """Rows of the held side, padded to whole blocks."""
        return self.c.padded_t if self.holds_queries else self.c.padded_s

    @property
    def held_heads(self) -> int:
        """Heads of the held side."""
        return self.c.n if self.holds_queries else self.c.k
