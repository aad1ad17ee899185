"""What each comm type moves: the one list of collectives of a layer's attention.

`layer_traffic` lists every collective with its axes, its bytes and how often it runs. The start-up
log, `hcp verify`, the planner, the scheduler of dynamic CP and the tests read this list; what the
compiler made of it is in the compiled program (`hcp audit`).

With A devices that exchange heads and P that K and V move over, T tokens of a row on C = A · P
devices, and each kv head replicated r = A / gcd(K, A) times:

    exchange   q, k, v in and out out, forward; their cotangents, backward: (A - 1) / A of each
    ring       K and V, P - 1 hops; backward K and V again, and dK and dV in float32, P - 1 each
    gather     the same bytes, in one collective

It stands in this room, below meshes and attention, because a plan is made where there is no jax.
Pure Python, on shapes alone.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

CommType = Literal["p2p", "all_gather", "a2a", "a2a+p2p", "a2a+all_gather"]
COMM_TYPES: tuple[CommType, ...] = get_args(CommType)
Remat = Literal["none", "attention", "full"]
Direction = Literal["forward", "backward"]

# Names under which the collectives stand in a compiled program (`jax.named_scope`).
EXCHANGE_HEADS, RING_HOP, GATHER_KV = "exchange_heads", "ring_hop", "gather_kv"
SCOPES = (RING_HOP, GATHER_KV, EXCHANGE_HEADS)

GRADIENT_BYTES = 4  # dK and dV travel and add up in float32
ITEM_BYTES = {"float32": 4, "bfloat16": 2}


class Strategy(NamedTuple):
    """Exchange heads for sequence over some axes, then move K and V over the others."""

    exchange: tuple[str, ...]
    move: tuple[str, ...]
    by: Literal["ring", "gather"] = "ring"


STRATEGIES: dict[str, Strategy] = {
    "p2p": Strategy((), ("cp_outer", "cp_inner"), "ring"),
    "all_gather": Strategy((), ("cp_outer", "cp_inner"), "gather"),
    "a2a": Strategy(("cp_outer", "cp_inner"), ()),
    "a2a+p2p": Strategy(("cp_inner",), ("cp_outer",), "ring"),
    "a2a+all_gather": Strategy(("cp_inner",), ("cp_outer",), "gather"),
}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Arrays that one device sends together, some number of times a step.

    Attributes:
        scope: one of `SCOPES`.
        kind: of the collective, in HLO's words.
        direction: the pass that needs it; what remat repeats counts as backward.
        axes: mesh axes it runs over.
        group: number of devices along them.
        arrays: collectives that run side by side: one for each array.
        count: how often they run.
        bytes: that one device puts in each time, all arrays together.
        repeated: whether a remat policy makes it run again.
    """

    scope: str
    kind: str
    direction: Direction
    axes: tuple[str, ...]
    group: int
    arrays: int
    count: int
    bytes: int
    repeated: bool = False

    @property
    def sent_bytes(self) -> float:
        """Bytes that one device sends each time."""
        return sent_bytes(self.kind, self.bytes, self.group)


def sent_bytes(kind: str, put: float, group: int) -> float:
    """Return the bytes that one device sends, in the algorithm that sends the least.

    With g devices in a group: all that it puts in (permute, broadcast), (g - 1) times that
    (all-gather), a share of (g - 1) / g (all-to-all, reduce-scatter), twice that (all-reduce).

    Args:
        kind: of the collective, in HLO's words.
        put: bytes that one device puts in.
        group: g.

    >>> sent_bytes("all-gather", 10, 4), sent_bytes("reduce-scatter", 40, 4)
    (30, 30.0)
    """
    others = group - 1
    share = {
        "all-gather": others,
        "all-reduce": 2 * others / group,
        "all-to-all": others / group,
        "ragged-all-to-all": others / group,
        "reduce-scatter": others / group,
    }
    return put * share.get(kind, 1.0 if others else 0.0)


def kv_heads_exchanged(kv_heads: int, exchange: int) -> int:
    """Return the kv heads of a device before an exchange, replicated just enough to share out."""
    return math.lcm(kv_heads, exchange)


def layer_traffic(
    strategy: Strategy,
    sizes: Mapping[str, int],
    *,
    tokens: int,
    heads: int,
    kv_heads: int,
    head_size: int,
    item_bytes: int,
    remat: Remat = "none",
) -> tuple[Traffic, ...]:
    """List the collectives of one layer's attention in one step, forward and backward.

    Args:
        strategy: which axes exchange heads and which move K and V, by names in `sizes`.
        sizes: devices along each axis.
        tokens: of one device, all its rows together.
        heads: query heads of one device before the exchange (those of its tp part).
        kv_heads: kv heads, likewise.
        head_size: H.
        item_bytes: bytes of an element of q, k, v and out.
        remat: what backward computes again: "attention" exchanges q, k and v again, "full" also
            moves K and V again and exchanges out again.

    Returns:
        Nothing for an axis of one device.
    """
    exchange, move = (math.prod(sizes[axis] for axis in axes) for axes in strategy[:2])
    kv_items = 2 * tokens * kv_heads_exchanged(kv_heads, exchange) * head_size
    q_bytes, kv_bytes = tokens * heads * head_size * item_bytes, kv_items * item_bytes
    found: list[Traffic] = []
    if exchange > 1:
        found += _exchange(strategy.exchange, exchange, q_bytes, kv_bytes, remat)
    if move > 1:
        movers = {"ring": _ring, "gather": _gather}
        grads = kv_items * GRADIENT_BYTES
        found += movers[strategy.by](strategy.move, move, kv_bytes, grads, remat)
    return tuple(found)


def total(
    traffic: tuple[Traffic, ...],
    scopes: tuple[str, ...] = SCOPES,
    direction: Direction | None = None,
) -> int:
    """Return the bytes that one device sends in a step, of some scopes and one direction or both.

    What a remat policy repeats is included: list the traffic with remat "none" to leave it out.
    """
    return round(
        sum(
            t.count * t.sent_bytes
            for t in traffic
            if t.scope in scopes and direction in (None, t.direction)
        )
    )


def state_bytes(
    params: float, copies: int, item_bytes: int, *, fsdp: bool, gathers: int = 2
) -> float:
    """Return the bytes that one device sends in a step for weights and their gradients.

    Args:
        params: parameters of one device's tp part.
        copies: devices along dp and cp.
        item_bytes: bytes of a weight as it is gathered.
        fsdp: each device holds a part: it gathers the weights and scatters float32 gradients.
            Otherwise float32 gradients are summed.
        gathers: how often FSDP gathers each weight: forward and backward, and once more where a
            remat policy computes layers again.
    """
    gradients = GRADIENT_BYTES * params
    if not fsdp:
        return sent_bytes("all-reduce", gradients, copies)
    gathered = sent_bytes("all-gather", item_bytes * params / copies, copies)
    return gathers * gathered + sent_bytes("reduce-scatter", gradients, copies)


def _exchange(
    axes: tuple[str, ...], size: int, q_bytes: int, kv_bytes: int, remat: Remat
) -> list[Traffic]:
    def one(direction: Direction, arrays: int, put: int, repeated: bool = False) -> Traffic:
        return Traffic(
            *(EXCHANGE_HEADS, "all-to-all", direction, axes, size, arrays, 1, put, repeated)
        )

    qkv, out = (3, q_bytes + kv_bytes), (1, q_bytes)
    found = [one("forward", *qkv), one("forward", *out)]
    if remat != "none":
        found.append(one("backward", *qkv, repeated=True))
    if remat == "full":
        found.append(one("backward", *out, repeated=True))
    # The cotangent of out comes in; those of q, k and v go out.
    return [*found, one("backward", *out), one("backward", *qkv)]


def _ring(
    axes: tuple[str, ...], size: int, kv_bytes: int, grad_bytes: int, remat: Remat
) -> list[Traffic]:
    def hops(direction: Direction, put: int, repeated: bool = False) -> Traffic:
        return Traffic(
            *(RING_HOP, "collective-permute", direction, axes, size, 2, size - 1, put, repeated)
        )

    again = [hops("backward", kv_bytes, repeated=True)] if remat == "full" else []
    return [
        hops("forward", kv_bytes),
        *again,
        hops("backward", kv_bytes),
        hops("backward", grad_bytes),
    ]


def _gather(
    axes: tuple[str, ...], size: int, kv_bytes: int, grad_bytes: int, remat: Remat
) -> list[Traffic]:
    def gather(direction: Direction, repeated: bool = False) -> Traffic:
        return Traffic(*(GATHER_KV, "all-gather", direction, axes, size, 2, 1, kv_bytes, repeated))

    again = [gather("backward", repeated=True)] if remat == "full" else []
    # Each device puts in the gradients of all keys, and keeps the sum of those of its own.
    scatter = Traffic(
        *(GATHER_KV, "reduce-scatter", "backward", axes, size, 2, 1, size * grad_bytes)
    )
    return [gather("forward"), *again, gather("backward"), scatter]
