"""Count what the experts of a layer cost: weights, and what moves between devices.

Rows travel by all-to-all in rounds of a fixed size (`models/layers/moe_dispatch.py`): a device has
slots for a quarter more rows than an even load sends to each other device. A row is a token for one
of its k experts.
"""

import dataclasses
import math

from hcp_jax.cost.traffic import EXPERT_DISPATCH, Direction, Remat, Traffic

ROOM = 1.25
"""Rows that a round has slots for, over the rows of an even load."""


@dataclasses.dataclass(frozen=True)
class Experts:
    """What determines the cost of a mixture of experts; each has a gated MLP.

    Attributes:
        number: E.
        per_token: k, experts of each token.
        intermediate_size: F, of each expert.
        shared_gate: whether the output of a shared expert is multiplied by a learnt sigmoid.
    """

    number: int
    per_token: int
    intermediate_size: int
    shared_gate: bool = False

    def params(self, hidden_size: int) -> int:
        """Return the number of weights of all experts but the shared one."""
        return 3 * self.number * hidden_size * self.intermediate_size

    def idle_params(self, hidden_size: int) -> int:
        """Return the number of weights beside those of a token's gated products.

        They are those of the experts that it does not go through, and the router's.
        """
        others = 3 * (self.number - self.per_token) * self.intermediate_size
        return hidden_size * (others + self.number + int(self.shared_gate))


def slots(rows: int, devices: int, parts: int = 1) -> int:
    """Return the rows that a device can send to each other device in one part of a round.

    Args:
        rows: rows of a device.
        devices: devices that experts are cut over.
        parts: parts of the first round.

    >>> slots(64, 4), slots(64, 4, parts=2), slots(3, 4)
    (20, 10, 1)
    """
    return min(rows, math.ceil(ROOM * rows / devices / parts))


def dispatch_traffic(
    axes: tuple[str, ...],
    devices: int,
    *,
    rows: int,
    width: int,
    item_bytes: int,
    remat: Remat = "none",
    parts: int = 1,
) -> tuple[Traffic, ...]:
    """List the collectives of one layer's experts in one step, if one round takes all rows.

    Args:
        axes: mesh axes that experts are cut over.
        devices: number of devices along them.
        rows: rows of a device: its tokens times the experts of each.
        width: D.
        item_bytes: bytes of one activation.
        remat: what backward recomputes; all policies but "none" repeat the forward pass.
        parts: parts in which the first round travels.

    Returns:
        All collectives; none for one device.
    """
    if devices == 1:
        return ()
    put = devices * slots(rows, devices, parts)

    def one(direction: Direction, count: int, size: int, repeated: bool = False) -> Traffic:
        names = EXPERT_DISPATCH, "all-to-all", direction, axes, devices
        return Traffic(*names, 1, count * parts, size, repeated)

    activations, numbers = put * width * item_bytes, 4 * put
    again: tuple[Traffic, ...] = ()
    if remat != "none":
        again = one("backward", 2, activations, True), one("backward", 1, numbers, True)
    forward = one("forward", 2, activations), one("forward", 1, numbers)
    return (*forward, *again, one("backward", 2, activations))
