"""What happens to a block in the Mosaic kernels: it is loaded, multiplied, capped and masked.

Blocks come through rings in shared memory, from the warpgroup that loads to those that compute.

It stands apart from the kernels because forward and backward do the same here.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hcp_jax.kernels.mosaic_call import KernelShape

ROWS = 64  # of a warpgroup's wgmma
LOG2_E = math.log2(math.e)
WGMMA = plgpu.Layout.WGMMA
PER_ROW, PER_COLUMN = WGMMA.reduce(1), WGMMA.reduce(0)


class Ring(NamedTuple):
    """Blocks in shared memory that one warpgroup fills and the others read, slot after slot.

    Step i, counted over all items of the program, uses slot i mod depth. `here` completes when all
    copies into a slot have arrived, `free` when all readers have let go of it. The filler waits for
    every completion of `free`, the readers for every one of `here`, so no barrier is ever more than
    one completion ahead of a waiter, which is all that its parity can tell apart.
    """

    slots: tuple  # of references [depth, ...]
    here: Any
    free: Any

    @property
    def depth(self) -> int:
        """How many slots there are."""
        return self.slots[0].shape[0]

    def slot(self, step):
        """The references of a step's slot."""
        return tuple(ref.at[self._at(step)] for ref in self.slots)

    def _at(self, step):
        return lax.rem(step, jnp.int32(self.depth)) if self.depth > 1 else 0

    def fill(self, step, copies: Callable) -> None:
        """Start `copies(*slot)`, pairs of source and target, once the slot is free."""

        @pl.when(step >= self.depth)
        def _():
            plgpu.barrier_wait(self.free.at[self._at(step)])

        for source, target in copies(*self.slot(step)):
            plgpu.copy_gmem_to_smem(source, target, self.here.at[self._at(step)])

    def take(self, step):
        """Wait for a step's slot; to be called once per step by each reader."""
        plgpu.barrier_wait(self.here.at[self._at(step)])
        return self.slot(step)

    def release(self, step) -> None:
        """Let go of a step's slot."""
        plgpu.barrier_arrive(self.free.at[self._at(step)])

    def drain(self, steps) -> None:
        """Wait until all slots are free again, after `steps` steps in all."""

        @pl.loop(jnp.maximum(steps - self.depth, 0), steps)
        def _(step):
            plgpu.barrier_wait(self.free.at[self._at(step)])


def ring(depth: int, copies: int, readers: int, *slots: Any) -> Ring:
    """The scratch types of a `Ring`; `copies` is how many fill a slot."""
    return Ring(
        slots,
        plgpu.Barrier(num_arrivals=copies, num_barriers=depth),
        plgpu.Barrier(num_arrivals=readers, num_barriers=depth),
    )


def matrices(c: KernelShape, *shape: int) -> Any:
    """Scratch for matrices that wgmma reads: in tiles of 8 rows of 128 bytes, swizzled."""
    return plgpu.SMEM(
        shape,
        c.dtype,
        transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)),
    )


def multiply(c: KernelShape, *terms, spare=None, meanwhile: Callable | None = None) -> tuple:
    """Matrix products `begin + left · right`, issued together and awaited together.

    Args:
        c: of the call.
        *terms: (begin, left, right): begin is an array in the layout of wgmma, or None for zero;
            left is an array or a reference to shared memory; right is a reference.
        spare: a reference that a left array fits in. JAX's interpreter multiplies only what lies in
            memory, and knows no accumulator that begins with a value; this is all that differs.
        meanwhile: called when all are under way.
    """
    shapes = [(left.shape[0], right.shape[1]) for _, left, right in terms]
    if c.spec.interpret:
        results = [
            _interpreted(shape, begin, left, right, spare)
            for shape, (begin, left, right) in zip(shapes, terms, strict=True)
        ]
        if meanwhile is not None:
            meanwhile()
        return tuple(results)

    def start(accumulators):
        for accumulator, (_, left, right) in zip(accumulators, terms, strict=True):
            plgpu.wgmma(accumulator, left, right)
        if meanwhile is not None:
            meanwhile()

    begins = [
        zeros(*shape) if term[0] is None else term[0]
        for shape, term in zip(shapes, terms, strict=True)
    ]
    return pl.run_state(start)(tuple(map(plgpu.ACC.init, begins)))


def _interpreted(shape, begin, left, right, spare):
    if isinstance(left, jax.Array):
        spare[...] = left
        plgpu.commit_smem()
        left = spare

    def product(accumulator):
        plgpu.wgmma(accumulator, left, right)
        return accumulator[...]

    result = pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))
    return result if begin is None else begin + result


def zeros(*shape: int):
    """Where sums of products, or of their rows, begin."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), WGMMA if len(shape) == 2 else PER_ROW)


def per_row(x, columns: int):
    """A matrix of the numbers of its rows."""
    return lax.broadcast_in_dim(x, (x.shape[0], columns), (0,))


def per_column(x, rows: int):
    """A matrix of the numbers of its columns."""
    return lax.broadcast_in_dim(x, (rows, x.shape[0]), (1,))


def hide(logits, start, end, index):
    """-inf where a key's global index lies outside a query's interval; padding has index -1.

    `start`, `end` and `index` are matrices (`per_row`, `per_column`).
    """
    seen = jnp.logical_and(start <= index, index < end)
    return jnp.where(seen, logits, -jnp.inf)


def capped(c: KernelShape, products):
    """(logits but for a factor, that factor, which is positive, the cap's slope or None).

    Times the factor they are exponents of 2: it enters where they meet `exp2`, in one multiply-add.
    """
    scale, cap = c.spec.scale, c.spec.logits_soft_cap
    if cap is None:
        return (products, scale * LOG2_E, None) if scale > 0 else (products * scale, LOG2_E, None)
    # tanh by its definition: the GPU's own is good to three digits, and the cap multiplies it.
    tanh = 1.0 - 2.0 / (jnp.exp2(products * (2 * LOG2_E * scale / cap)) + 1.0)
    return tanh, cap * LOG2_E, 1.0 - tanh * tanh
