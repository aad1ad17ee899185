"""Load, multiply, cap and mask blocks in the Mosaic kernels.

Blocks pass through queues in shared memory, from the warpgroup that loads to those that compute.

The forward and backward kernels share these functions.
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

ROWS = 64  # rows of one warpgroup's wgmma
LOG2_E = math.log2(math.e)
WGMMA = plgpu.Layout.WGMMA
PER_ROW, PER_COLUMN = WGMMA.reduce(1), WGMMA.reduce(0)


class Queue(NamedTuple):
    """A circular buffer in shared memory that one warpgroup fills and the others read.

    Step i, counted over all items of the program, uses slot i mod depth. The barrier `full`
    completes when all copies into a slot have arrived, `free` when all readers have released it.
    The filler waits for every completion of `free`, and the readers for every completion of `full`.
    So a barrier is never more than one completion ahead of a waiter; its parity bit cannot
    distinguish more.
    """

    slots: tuple[Any, ...]  # references [depth, ...]
    full: Any
    free: Any

    @property
    def depth(self) -> int:
        """The number of slots."""
        return int(self.slots[0].shape[0])

    def slot(self, step: Any) -> Any:
        """Return the references of a step's slot."""
        return tuple(ref.at[self._at(step)] for ref in self.slots)

    def _at(self, step: Any) -> Any:
        return lax.rem(step, jnp.int32(self.depth)) if self.depth > 1 else 0

    def fill(self, step: Any, copies: Callable[..., Any]) -> None:
        """Wait until the slot is free, then start `copies(*slot)`: (source, target) pairs."""

        @pl.when(step >= self.depth)
        def _() -> None:
            plgpu.barrier_wait(self.free.at[self._at(step)])

        for source, target in copies(*self.slot(step)):
            plgpu.copy_gmem_to_smem(source, target, self.full.at[self._at(step)])

    def take(self, step: Any) -> Any:
        """Wait until a step's slot is full and return it; each reader calls this once per step."""
        plgpu.barrier_wait(self.full.at[self._at(step)])
        return self.slot(step)

    def release(self, step: Any) -> None:
        """Mark a step's slot as no longer needed by this reader."""
        plgpu.barrier_arrive(self.free.at[self._at(step)])

    def drain(self, steps: Any) -> None:
        """Wait until all slots are free again, after `steps` steps in total."""

        @pl.loop(jnp.maximum(steps - self.depth, 0), steps)
        def _(step: Any) -> None:
            plgpu.barrier_wait(self.free.at[self._at(step)])


def queue(depth: int, copies: int, readers: int, *slots: Any) -> Queue:
    """Return the scratch types of a `Queue`; a slot is filled by `copies` copies."""
    return Queue(
        slots,
        plgpu.Barrier(num_arrivals=copies, num_barriers=depth),
        plgpu.Barrier(num_arrivals=readers, num_barriers=depth),
    )


def matrices(c: KernelShape, *shape: int) -> Any:
    """Return scratch for matrices that wgmma reads: tiles of 8 rows of 128 bytes, swizzled."""
    return plgpu.SMEM(
        shape,
        c.dtype,
        transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)),
    )


def multiply(
    c: KernelShape, *terms: Any, spare: Any = None, meanwhile: Callable[..., Any] | None = None
) -> tuple[Any, ...]:
    """Compute matrix products `begin + left · right`, issued together and awaited together.

    Args:
        c: shape of the call.
        *terms: (begin, left, right): begin is an array in the layout of wgmma, or None for zero;
            left is an array or a reference to shared memory; right is a reference.
        spare: a reference that a left array fits in, for JAX's interpreter. The interpreter only
            multiplies matrices in memory and has no accumulators with an initial value.
        meanwhile: function to call after all products are issued.
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

    def start(accumulators: Any) -> None:
        for accumulator, (_, left, right) in zip(accumulators, terms, strict=True):
            plgpu.wgmma(accumulator, left, right)
        if meanwhile is not None:
            meanwhile()

    begins = [
        zeros(*shape) if term[0] is None else term[0]
        for shape, term in zip(shapes, terms, strict=True)
    ]
    return pl.run_state(start)(tuple(map(plgpu.ACC.init, begins)))


def _interpreted(shape: Any, begin: Any, left: Any, right: Any, spare: Any) -> Any:
    if isinstance(left, jax.Array):
        spare[...] = left
        plgpu.commit_smem()
        left = spare

    def product(accumulator: Any) -> Any:
        plgpu.wgmma(accumulator, left, right)
        return accumulator[...]

    result = pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))
    return result if begin is None else begin + result


def zeros(*shape: int) -> Any:
    """Return zeros in the layout of a wgmma accumulator, or of one number per row of it."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), WGMMA if len(shape) == 2 else PER_ROW)


def per_row(x: Any, columns: int) -> Any:
    """Broadcast one number per row to a matrix."""
    return lax.broadcast_in_dim(x, (x.shape[0], columns), (0,))


def per_column(x: Any, rows: int) -> Any:
    """Broadcast one number per column to a matrix."""
    return lax.broadcast_in_dim(x, (rows, x.shape[0]), (1,))


def hide(logits: Any, start: Any, end: Any, index: Any) -> Any:
    """Set logits to -inf where a key is outside a query's interval; padding has index -1.

    `start`, `end` and `index` are matrices (`per_row`, `per_column`).
    """
    seen = jnp.logical_and(start <= index, index < end)
    return jnp.where(seen, logits, -jnp.inf)


def capped(c: KernelShape, products: Any) -> Any:
    """Return (unscaled logits, a positive factor, the slope of the soft cap or None).

    The logits times the factor are exponents of 2. The factor is applied just before `exp2`, in one
    multiply-add.
    """
    scale, cap = c.spec.scale, c.spec.logits_soft_cap
    if cap is None:
        return (products, scale * LOG2_E, None) if scale > 0 else (products * scale, LOG2_E, None)
    # tanh by its definition: the GPU's instruction has three digits, and the cap multiplies its
    # error.
    tanh = 1.0 - 2.0 / (jnp.exp2(products * (2 * LOG2_E * scale / cap)) + 1.0)
    return tanh, cap * LOG2_E, 1.0 - tanh * tanh
