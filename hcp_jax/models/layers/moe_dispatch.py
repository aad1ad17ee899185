"""Send rows to the devices that hold their experts, and bring the results back.

Experts are cut over some of the axes that tokens are cut over, too. A device cannot know how many
rows it will get, so rows travel in rounds of a fixed size: in each, a device has `slots` rows for
every other one. A first round takes all of them if the load is about even. If any device has more
rows for another one, all devices go through more rounds, as many as the fullest needs: no row is
lost at any imbalance, and no memory is held for the worst case.

The first round may be cut into parts of equally many slots. No part needs another one, so a
compiler that hides collectives sends the rows of the next part while experts compute one.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from hcp_jax.cost import experts
from hcp_jax.cost.traffic import EXPERT_DISPATCH, EXPERT_ROUNDS, Remat, Traffic
from hcp_jax.models.layers.moe_order import Order, by_expert, collect, spread


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """How the rows of a device travel; hashable.

    Attributes:
        axes: mesh axes that experts are cut over.
        devices: number of devices along them.
        rows: rows of a device: its tokens times the experts of each.
        parts: number of parts that an even load travels in.
    """

    axes: tuple[str, ...]
    devices: int
    rows: int
    parts: int = 1

    @property
    def slots(self) -> int:
        """Rows that a device has for each other device in one part of a round."""
        return experts.slots(self.rows, self.devices, self.parts)

    @property
    def rounds(self) -> int:
        """The most parts that travel: one device needs all rows."""
        return max(self.parts, math.ceil(self.rows / self.slots))

    def through(
        self,
        x: Float[Array, "n D"],
        sizes: Int32[Array, "E"],
        compute: Callable[[Any, Any], Any],
        agree: tuple[str, ...],
    ) -> Float[Array, "n D"]:
        """Return the results of all rows, computed where their experts are; inside `shard_map`.

        Args:
            x: rows in the order of their experts; those of no expert last, whose results are 0.
            sizes: rows of each expert of all devices.
            compute: called as `compute(rows, sizes)` with rows in the order of this device's own
                experts, and the number of rows of each.
            agree: axes over which all devices go through equally many rounds.
        """
        by_device = jnp.sum(sizes.reshape(self.devices, -1), axis=1)
        needed = jax.lax.pmax(jnp.max(-(-by_device // self.slots)), agree)
        out = self._travel(x, sizes, compute, list(range(self.parts)))
        if self.rounds == self.parts:
            return out

        @jax.checkpoint
        def again(x: Any, number: Any) -> Any:
            return self._travel(x, sizes, compute, [number])

        def one(out: Any, number: Any) -> tuple[Any, None]:
            more = jax.lax.cond(number < needed, lambda: out + again(x, number), lambda: out)
            return more, None

        def rest(out: Any) -> Any:
            return jax.lax.scan(one, out, jnp.arange(self.parts, self.rounds))[0]

        with jax.named_scope(EXPERT_ROUNDS):
            return jax.lax.cond(needed > self.parts, rest, lambda out: out, out)

    def traffic(self, width: int, item_bytes: int, remat: Remat = "none") -> tuple[Traffic, ...]:
        """List the collectives of one layer in one step, if one round takes all rows.

        Args:
            width: D.
            item_bytes: bytes of one activation.
            remat: what backward recomputes; all policies but "none" repeat the forward pass.
        """
        return experts.dispatch_traffic(
            self.axes,
            self.devices,
            rows=self.rows,
            width=width,
            item_bytes=item_bytes,
            remat=remat,
            parts=self.parts,
        )

    def _travel(
        self, x: Any, sizes: Any, compute: Callable[[Any, Any], Any], parts: list[Any]
    ) -> Any:
        """Return the results of the rows in these parts, zeros for the others.

        Parts are sent, computed and brought back one after the other, also in backward: otherwise
        the compiler puts all products behind all exchanges, and none of them hides the others.
        """
        per = sizes.size // self.devices
        leaving = [self._leaving(sizes, part) for part in parts]
        packed = [jnp.where(there[..., None], x[row], 0) for row, there, _ in leaving]
        arrived = _one_by_one(self._exchange, packed)
        numbers = [self._exchange(expert).reshape(-1) for *_, expert in leaving]
        orders = [by_expert(expert[:, None], expert < per, per) for expert in numbers]

        def computed(rows: Any, order: Order) -> Any:
            rows = spread(1, rows.reshape(-1, rows.shape[-1]), order)
            return collect(1, compute(rows, order.sizes), order).reshape(packed[0].shape)

        done = _one_by_one(computed, arrived, orders)
        back = _one_by_one(self._exchange, done)
        return functools.reduce(jnp.add, map(functools.partial(self._own, sizes), back, parts))

    def _leaving(self, sizes: Any, part: Any) -> tuple[Any, Any, Any]:
        """Return (own row, whether there is one, its expert there) in each slot of each device."""
        per = sizes.size // self.devices
        by_device = jnp.sum(sizes.reshape(self.devices, per), axis=1)
        first = jnp.cumsum(by_device) - by_device
        nth = part * self.slots + jnp.arange(self.slots)
        there = nth[None] < by_device[:, None]
        row = jnp.where(there, first[:, None] + nth[None], 0)
        expert = jnp.searchsorted(jnp.cumsum(sizes), row, side="right").astype(jnp.int32)
        return row, there, jnp.where(there, expert - per * jnp.arange(self.devices)[:, None], per)

    def _own(self, sizes: Any, back: Any, part: Any) -> Any:
        """Return the results of own rows among those that came back in a part, zeros for others."""
        by_device = jnp.sum(sizes.reshape(self.devices, -1), axis=1)
        first = jnp.cumsum(by_device) - by_device
        position = jnp.arange(self.rows)
        owner = jnp.searchsorted(first, position, side="right") - 1
        offset = position - first[owner] - part * self.slots
        mine = (offset >= 0) & (offset < self.slots) & (position < jnp.sum(sizes))
        found = back[owner, jnp.clip(offset, 0, self.slots - 1)]
        return jnp.where(mine[:, None], found, 0)

    def _exchange(self, x: Any) -> Any:
        with jax.named_scope(EXPERT_DISPATCH):
            return jax.lax.all_to_all(x, self.axes, 0, 0, tiled=True)


def _one_by_one(
    function: Callable[..., Any], arrays: list[Any], others: list[Any] | None = None
) -> list[Any]:
    """Apply a function to each array (and its other argument), each time after the time before."""
    rest = [()] * len(arrays) if others is None else [(other,) for other in others]
    results = [function(arrays[0], *rest[0])]
    for array, other in zip(arrays[1:], rest[1:], strict=True):
        later, results[-1] = jax.lax.optimization_barrier((array, results[-1]))
        results.append(function(later, *other))
    return results
