"""Send rows to the devices that hold their experts, and bring the results back.

Experts are cut over some of the axes that tokens are cut over, too. A device cannot know how many
rows it will get, so rows travel in rounds of a fixed size: in each, a device has `slots` rows for
every other one. A first round takes all of them if the load is about even. If any device has more
rows for another one, all devices go through more rounds, as many as the fullest needs: no row is
lost at any imbalance, and no memory is held for the worst case.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from hcp_jax.cost import experts
from hcp_jax.cost.traffic import EXPERT_DISPATCH, EXPERT_ROUNDS, Remat, Traffic
from hcp_jax.models.layers.moe_order import by_expert, collect, spread


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """How the rows of a device travel; hashable.

    Attributes:
        axes: mesh axes that experts are cut over.
        devices: number of devices along them.
        rows: rows of a device: its tokens times the experts of each.
    """

    axes: tuple[str, ...]
    devices: int
    rows: int

    @property
    def slots(self) -> int:
        """Rows that a device has for each other device in one round."""
        return experts.slots(self.rows, self.devices)

    @property
    def rounds(self) -> int:
        """The most rounds: one device needs all rows."""
        return math.ceil(self.rows / self.slots)

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
        out = self._round(x, sizes, compute, 0)
        if self.rounds == 1:
            return out

        @jax.checkpoint
        def again(x: Any, number: Any) -> Any:
            return self._round(x, sizes, compute, number)

        def one(out: Any, number: Any) -> tuple[Any, None]:
            more = jax.lax.cond(number < needed, lambda: out + again(x, number), lambda: out)
            return more, None

        def rest(out: Any) -> Any:
            return jax.lax.scan(one, out, jnp.arange(1, self.rounds))[0]

        with jax.named_scope(EXPERT_ROUNDS):
            return jax.lax.cond(needed > 1, rest, lambda out: out, out)

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
        )

    def _round(self, x: Any, sizes: Any, compute: Callable[[Any, Any], Any], number: Any) -> Any:
        per = sizes.size // self.devices
        by_device = jnp.sum(sizes.reshape(self.devices, per), axis=1)
        first = jnp.cumsum(by_device) - by_device
        nth = number * self.slots + jnp.arange(self.slots)
        there = nth[None] < by_device[:, None]
        row = jnp.where(there, first[:, None] + nth[None], 0)
        expert = jnp.searchsorted(jnp.cumsum(sizes), row, side="right").astype(jnp.int32)
        expert = jnp.where(there, expert - per * jnp.arange(self.devices)[:, None], per)
        arrived = self._exchange(jnp.where(there[..., None], x[row], 0))
        expert = self._exchange(expert).reshape(-1)
        order = by_expert(expert[:, None], expert < per, per)
        rows = spread(1, arrived.reshape(-1, x.shape[-1]), order)
        out = collect(1, compute(rows, order.sizes), order)
        back = self._exchange(out.reshape(arrived.shape))
        # Where each own row lies in what has come back.
        position = jnp.arange(x.shape[0])
        owner = jnp.searchsorted(first, position, side="right") - 1
        offset = position - first[owner] - number * self.slots
        mine = (offset >= 0) & (offset < self.slots) & (position < jnp.sum(sizes))
        found = back[owner, jnp.clip(offset, 0, self.slots - 1)]
        return jnp.where(mine[:, None], found, 0)

    def _exchange(self, x: Any) -> Any:
        with jax.named_scope(EXPERT_DISPATCH):
            return jax.lax.all_to_all(x, self.axes, 0, 0, tiled=True)
