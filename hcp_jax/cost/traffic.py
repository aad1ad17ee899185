"""List the collectives of a layer's attention, for each comm type; no other such list exists.

`layer_traffic` lists every collective with its axes, its bytes and how often it runs. The start-up
log, `hcp verify`, the planner, the scheduler of dynamic CP and the tests read this list. `hcp
audit` reads the collectives that the compiler issues from the compiled program.

With A devices that exchange heads and P that K and V move over, T tokens of a row on C = A · P
devices, and each kv head replicated r = A / gcd(K, A) times:

    exchange   forward: q, k, v and the output; backward: their cotangents; (A - 1) / A of each
    ring       forward: K and V, P - 1 hops; backward: K and V again, and dK and dV in float32
    gather     the same bytes, in one collective

This module lies below meshes and attention, because the planner runs without jax. Pure Python, on
shapes alone.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

CommType = Literal["p2p", "all_gather", "a2a", "a2a+p2p", "a2a+all_gather"]
COMM_TYPES: tuple[CommType, ...] = get_args(CommType)
Remat = Literal["none", "mlp", "projections", "attention", "full"]
Direction = Literal["forward", "backward"]

# Names of the collectives in a compiled program (`jax.named_scope`).
EXCHANGE_HEADS, RING_HOP, GATHER_KV = "exchange_heads", "ring_hop", "gather_kv"
SCOPES = (RING_HOP, GATHER_KV, EXCHANGE_HEADS)
STATE_SCAN, HALO = "state_scan", "halo"  # of recurrent layers
EXPERT_DISPATCH = "expert_dispatch"  # of a mixture of experts
EXPERT_ROUNDS = "expert_rounds"  # rounds of dispatch after the first, for an uneven load
RECURRENT_SCOPES = (STATE_SCAN, HALO)

GRADIENT_BYTES = 4  # dK and dV are sent and summed in float32
STATE_BYTES = 4  # states of recurrences are float32
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
    """Collectives over the same axes that run together, and how often they run in a step.

    Attributes:
        scope: one of `SCOPES`.
        kind: kind of the collective, as HLO names it.
        direction: pass that needs it; what remat repeats counts as backward.
        axes: mesh axes it runs over.
        group: number of devices along these axes.
        arrays: number of collectives that run at the same time, one for each array.
        count: how often they run in a step.
        bytes: bytes that one device puts in each time, summed over the arrays.
        repeated: True if it runs only because a remat policy recomputes.
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
        """Bytes that one device sends each time it runs."""
        return sent_bytes(self.kind, self.bytes, self.group)


def sent_bytes(kind: str, put: float, group: int) -> float:
    """Return the bytes that one device sends, for the algorithm that sends the least.

    For g devices in a group, as a multiple of the bytes that the device puts in: 1 (permute,
    broadcast), g - 1 (all-gather), (g - 1) / g (all-to-all, reduce-scatter), or 2 (g - 1) / g
    (all-reduce).

    Args:
        kind: kind of the collective, as HLO names it.
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
    """Return a device's kv heads before an exchange, replicated until `exchange` divides them."""
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
        tokens: tokens of one device, over all its rows.
        heads: query heads of one device before the exchange (those of its tp part).
        kv_heads: kv heads of one device before the exchange.
        head_size: H.
        item_bytes: bytes of an element of q, k, v and the output.
        remat: what backward recomputes: "attention" exchanges q, k and v again, "full" also moves
            K and V again and exchanges the output again.

    Returns:
        All collectives; none for axes of one device.
    """
    lanes, sources = (math.prod(sizes[axis] for axis in axes) for axes in strategy[:2])
    kv_items = 2 * tokens * kv_heads_exchanged(kv_heads, lanes) * head_size
    q_bytes, kv_bytes = tokens * heads * head_size * item_bytes, kv_items * item_bytes
    found: list[Traffic] = []
    if lanes > 1:
        found += exchange(strategy.exchange, lanes, q_bytes, kv_bytes, remat)
    moves = {"ring": hops, "gather": gather}[strategy.by]
    found += moves(strategy.move, sources, kv_bytes, kv_items * GRADIENT_BYTES, remat)
    return tuple(found)


def total(
    traffic: tuple[Traffic, ...],
    scopes: tuple[str, ...] = SCOPES,
    direction: Direction | None = None,
) -> int:
    """Return the bytes that one device sends in a step, for some scopes and one or both directions.

    Repetitions by a remat policy are included; list the traffic with remat "none" to exclude them.
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
        params: number of parameters of one device's tp part.
        copies: number of devices along dp and cp.
        item_bytes: bytes per weight when weights are gathered.
        fsdp: if True, each device holds a part of the weights: it gathers weights and scatters
            float32 gradients. If False, float32 gradients are summed.
        gathers: how often FSDP gathers each weight: forward, backward, and once more if a remat
            policy recomputes layers.
    """
    gradients = GRADIENT_BYTES * params
    if not fsdp:
        return sent_bytes("all-reduce", gradients, copies)
    gathered = sent_bytes("all-gather", item_bytes * params / copies, copies)
    return gathers * gathered + sent_bytes("reduce-scatter", gradients, copies)


def exchange(
    axes: tuple[str, ...], size: int, q_bytes: int, kv_bytes: int, remat: Remat
) -> list[Traffic]:
    """List the exchanges of heads in a layer, forward and backward.

    Args:
        axes: mesh axes that they run over.
        size: A, how many devices exchange heads with each other.
        q_bytes: bytes of a device's queries, as many as of its output.
        kv_bytes: bytes of its K and V, replicated until A divides the heads.
        remat: what backward recomputes.
    """

    def one(direction: Direction, arrays: int, put: int, repeated: bool = False) -> Traffic:
        return Traffic(
            *(EXCHANGE_HEADS, "all-to-all", direction, axes, size, arrays, 1, put, repeated)
        )

    qkv, out = (3, q_bytes + kv_bytes), (1, q_bytes)
    found = [one("forward", *qkv), one("forward", *out)]
    if remat in ("attention", "full"):
        found.append(one("backward", *qkv, repeated=True))
    if remat == "full":
        found.append(one("backward", *out, repeated=True))
    # The cotangent of the output comes in; those of q, k and v go out.
    return [*found, one("backward", *out), one("backward", *qkv)]


def hops(
    axes: tuple[str, ...], size: int, kv_bytes: int, grad_bytes: int, remat: Remat
) -> list[Traffic]:
    """List the moves of K and V from device to device, and of dK and dV back, in a layer.

    Args:
        axes: mesh axes that they move over.
        size: how many devices' keys a device attends to, its own included.
        kv_bytes: bytes of a device's K and V.
        grad_bytes: bytes of their gradients.
        remat: what backward recomputes.
    """

    def moves(direction: Direction, put: int, repeated: bool = False) -> Traffic:
        return Traffic(
            *(RING_HOP, "collective-permute", direction, axes, size, 2, size - 1, put, repeated)
        )

    if size == 1:
        return []
    again = [moves("backward", kv_bytes, repeated=True)] if remat == "full" else []
    return [
        moves("forward", kv_bytes),
        *again,
        moves("backward", kv_bytes),
        moves("backward", grad_bytes),
    ]


def gather(
    axes: tuple[str, ...], size: int, kv_bytes: int, grad_bytes: int, remat: Remat
) -> list[Traffic]:
    """List the gathers of K and V, and the scatters of their gradients; arguments as of `hops`."""

    def once(direction: Direction, repeated: bool = False) -> Traffic:
        return Traffic(*(GATHER_KV, "all-gather", direction, axes, size, 2, 1, kv_bytes, repeated))

    if size == 1:
        return []
    again = [once("backward", repeated=True)] if remat == "full" else []
    # Each device puts in gradients for all keys, and receives the sum for its own keys.
    scatter = Traffic(
        *(GATHER_KV, "reduce-scatter", "backward", axes, size, 2, 1, size * grad_bytes)
    )
    return [once("forward"), *again, once("backward"), scatter]


def state_scan_traffic(
    axes: tuple[str, ...],
    sizes: Mapping[str, int],
    *,
    runs: int,
    rows: int,
    heads: int,
    key_size: int,
    value_size: int,
    matrix: bool,
    remat: Remat = "none",
) -> tuple[Traffic, ...]:
    """List the collectives that pass one recurrent layer's state over devices in one step.

    The bytes do not depend on the number of tokens: each device puts in the maps (A, B) of its
    runs, and receives the state that enters each of them, all in float32.

    Args:
        axes: mesh axes that the stream is cut over, by names in `sizes`.
        sizes: devices along each axis.
        runs: runs of the stream on a device: 1 (contiguous) or 2 (zigzag).
        rows: rows of the batch on one device.
        heads: heads of one device (those of its tp part).
        key_size: K, the rows of a head's state.
        value_size: V, the columns of a head's state.
        matrix: True for delta rules, whose A is [K, K]; False if A is one number.
        remat: what backward recomputes; all policies but "none" repeat the forward pass.

    Returns:
        All collectives; none for one device.

    >>> scan = state_scan_traffic(("cp",), {"cp": 4}, runs=1, rows=1, heads=4, key_size=8,
    ...                           value_size=8, matrix=True)
    >>> [(t.direction, t.arrays, t.bytes) for t in scan[:2]]
    [('forward', 2, 2048), ('forward', 1, 1024)]
    """
    group = math.prod(sizes[axis] for axis in axes)
    if group == 1:
        return ()
    blocks = group // math.gcd(group, heads)  # a head's columns are shared out if heads are few
    states = runs * rows * heads * key_size * -(-value_size // blocks) * blocks * STATE_BYTES
    maps = runs * rows * heads * blocks * (key_size**2 if matrix else 1) * STATE_BYTES

    def both(direction: Direction, repeated: bool = False) -> list[Traffic]:
        names = STATE_SCAN, "all-to-all", direction, axes, group
        return [
            Traffic(*names, 2, 1, maps + states, repeated),
            Traffic(*names, 1, 1, states, repeated),
        ]

    again = both("backward", repeated=True) if remat != "none" else []
    return (*both("forward"), *again, *both("backward"))


def halo_traffic(
    axes: tuple[str, ...],
    sizes: Mapping[str, int],
    *,
    runs: int,
    rows: int,
    halo: int,
    channels: tuple[int, ...],
    item_bytes: int,
    remat: Remat = "none",
) -> tuple[Traffic, ...]:
    """List the moves of the tokens before each run, for one layer's short convolutions.

    Args:
        axes: as in `state_scan_traffic`.
        sizes: as in `state_scan_traffic`.
        runs: as in `state_scan_traffic`.
        rows: as in `state_scan_traffic`.
        halo: tokens before each run; runs have at least as many.
        channels: channels of one device, for each array that is convolved.
        item_bytes: bytes of an element.
        remat: as in `state_scan_traffic`.

    Returns:
        All collectives; none for one device.
    """
    group = math.prod(sizes[axis] for axis in axes)
    if group == 1 or halo == 0:
        return ()
    put = rows * halo * sum(channels) * item_bytes

    def moves(direction: Direction, repeated: bool = False) -> Traffic:
        names = HALO, "collective-permute", direction, axes, group
        return Traffic(*names, len(channels), runs, put, repeated)

    again = [moves("backward", repeated=True)] if remat != "none" else []
    return (moves("forward"), *again, moves("backward"))
