"""Model the seconds of a microbatch; the scheduler minimises them.

A microbatch runs the program of its widest group. Every device holds one buffer of T tokens. It
takes

    seconds_per_microbatch                    fixed
    + T · seconds_per_token                   all work that is linear in tokens, with padding
    + exchange of heads                       over the program's lanes, q, k, v and the output
    + max over groups of                      the other groups wait for the slowest
        pairs · seconds_per_pair              attention, on each device of the group
        + Σ over hops of max(0, transfer - attention of one hop)      the part that is not hidden

A program of `widest` devices exchanges heads over A = gcd(widest, lanes) of them and has
W = widest / A members. A group of w members cuts a document of L tokens zigzag into 2w chunks, and
each lane of a member computes a share of the heads: each of its devices attends to L² / 2g pairs,
with g = w·A. A kernel computes whole tiles: a chunk of L / 2w tokens is rounded up by half a tile
on average, which gives the pairs of a document of L + w · tile tokens.

K and V make W - 1 hops forward and W - 1 backward, dk and dv (float32) W - 1 moves home.
Collectives are static, so all members make all of them with whole buffers, whatever their own group
has left to do. The first w hops of a group run beside its attention, the others beside nothing.
Hops between members of one host use NVLink, all others the network. Backward, dk and dv of a hop
travel with the K and V of the next one; the last dk and dv go home alone, which nothing hides.

The exchange of heads is hidden by nothing if heads are exchanged at once; in n chunks of heads,
1 / n of it stays exposed (the first chunk going in, the last coming out).

Times are linear in the parameters once it is known which group is slowest and which hops are
hidden, so `Cost.calibrate` fits them to timed microbatches by least squares.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hcp_jax.base import checks
from hcp_jax.cost.models import model_shape
from hcp_jax.cost.shape import BACKWARD, ModelShape, step_flops
from hcp_jax.cost.traffic import GRADIENT_BYTES, ITEM_BYTES
from hcp_jax.dynamic.group import Group, Move, TimedMicrobatch
from hcp_jax.hardware import GPU, gpu
from hcp_jax.sequence import groupings

# Share of forward in an attention kernel's time, by FLOPs.
FORWARD_SHARE = 1 / (1 + BACKWARD)
_ITEM_BYTES = ITEM_BYTES["bfloat16"]
# Bytes of a hop relative to a forward hop: backward moves K and V again together with dK and dV; at
# the end dK and dV travel home alone.
HOME_TRAFFIC = GRADIENT_BYTES / _ITEM_BYTES
BACKWARD_TRAFFIC = 1 + HOME_TRAFFIC

# Rate of all work that is linear in tokens (products, norms, activations, optimizer), as a share of
# the rate of large products. Modelled.
LINEAR_SHARE = 0.6
# Fixed seconds of one microbatch. Modelled.
MICROBATCH_SECONDS = 2e-3
DEFAULT_MODEL, DEFAULT_GPU = "gpt-12x2048", "h200"


def _parameters(model: ModelShape, on: GPU, tp: int) -> dict[str, float]:
    """Return the parameters of `Cost` for a model, in bfloat16 and without recomputation."""
    forward, backward = (on.attention_rate("triton", d).value for d in ("forward", "backward"))
    kinds = [(kind.computed_layers, kind) for kind in model.by_kind]
    query_width = sum(n * kind.query_width for n, kind in kinds)
    kv_width = sum(n * kind.kv_width for n, kind in kinds)
    attending = sum(n for n, kind in kinds if kind.query_width)
    pair_flops = 4 * query_width / tp
    linear_flops = step_flops(model, 1, 0) / tp
    return {
        "seconds_per_pair": pair_flops * (1 / forward + BACKWARD / backward),
        "seconds_per_token": linear_flops / (LINEAR_SHARE * on.product_rate.value),
        "seconds_per_microbatch": MICROBATCH_SECONDS,
        "kv_bytes_per_token": 2 * _ITEM_BYTES * kv_width / tp,
        "q_bytes_per_token": _ITEM_BYTES * query_width / tp,
        "seconds_per_byte_inside": 1 / on.nvlink.rate.value,
        "seconds_per_byte_across": 1 / on.network.rate.value,
        "seconds_per_hop": attending * on.nvlink.latency,
    }


_DEFAULTS = _parameters(model_shape(DEFAULT_MODEL), gpu(DEFAULT_GPU), tp=1)
_DEFAULT_KV_HEADS = model_shape(DEFAULT_MODEL).num_kv_heads


@dataclasses.dataclass(frozen=True)
class Cost:
    """Parameters of the model above; all seconds are forward plus backward, over all layers.

    The defaults are a GPT of 12 layers, 2048 wide, on H200s: `model_cost("gpt-12x2048", "h200")`.
    Create others with `model_cost`, or fit them with `calibrate`.

    Attributes:
        seconds_per_pair: seconds of attention for one (query, key) pair.
        seconds_per_token: seconds of everything else for one token.
        seconds_per_microbatch: fixed seconds of a microbatch.
        kv_bytes_per_token: bytes of K and V of one token, all layers.
        q_bytes_per_token: bytes of the queries of one token, all layers.
        seconds_per_byte_inside: seconds per byte of a transfer inside a host.
        seconds_per_byte_across: seconds per byte of a transfer between hosts.
        seconds_per_hop: latency of one transfer, summed over layers.
        tile: kernels round a chunk up to a multiple of this number of tokens.
        devices_per_host: devices that share a host; device d is on host d // devices_per_host.
        lanes: devices that exchange heads with each other: the greatest common divisor of cp_inner
            and the query heads of a device; 1 for comm types that exchange none. It is lowered to
            a divisor of the number of devices.
        kv_heads: key and value heads of a device before the exchange; they are replicated until
            the lanes divide them.
        head_chunks: chunks of heads that are exchanged one after the other.

    >>> cost = Cost(lanes=1, devices_per_host=4)
    >>> cost.widths(8)
    (1, 2, 4, 8)
    >>> one, eight = (cost.microbatch_seconds((n,), ((8192,),), 8192 // n) for n in (1, 8))
    >>> one > eight
    True
    """

    seconds_per_pair: float = _DEFAULTS["seconds_per_pair"]
    seconds_per_token: float = _DEFAULTS["seconds_per_token"]
    seconds_per_microbatch: float = _DEFAULTS["seconds_per_microbatch"]
    kv_bytes_per_token: float = _DEFAULTS["kv_bytes_per_token"]
    q_bytes_per_token: float = _DEFAULTS["q_bytes_per_token"]
    seconds_per_byte_inside: float = _DEFAULTS["seconds_per_byte_inside"]
    seconds_per_byte_across: float = _DEFAULTS["seconds_per_byte_across"]
    seconds_per_hop: float = _DEFAULTS["seconds_per_hop"]
    tile: int = 64
    devices_per_host: int = 8
    lanes: int = 8
    kv_heads: int = _DEFAULT_KV_HEADS
    head_chunks: int = 1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = checks.number(f"Cost.{field.name}", getattr(self, field.name))
            if value < 0:
                raise ValueError(f"Cost.{field.name} must be 0 or greater, got {value}.")
        for name in ("devices_per_host", "lanes", "kv_heads", "head_chunks"):
            checks.integer(f"Cost.{name}", getattr(self, name), least=1)

    def chain(self, num_devices: int) -> tuple[int, ...]:
        """Return the sizes of groups with whole members; see `groupings.chain`."""
        lanes = self.lanes_of(num_devices, num_devices)
        return groupings.chain(num_devices, self.devices_per_host, lanes)

    def widths(self, num_devices: int) -> tuple[int, ...]:
        """Return the widths that programs may have; see `groupings.widths`."""
        lanes = self.lanes_of(num_devices, num_devices)
        return groupings.widths(num_devices, self.devices_per_host, lanes)

    def lanes_of(self, widest: int, num_devices: int) -> int:
        """Return the lanes of the program of width `widest`."""
        return groupings.program_lanes(widest, math.gcd(self.lanes, num_devices))

    def moves(self, size: int, widest: int, num_devices: int, tokens: int) -> list[Move]:
        """List the transfers of a program as a group of `size` devices sees them.

        Args:
            size: devices of the group.
            widest: width of the program.
            num_devices: all devices.
            tokens: tokens of each device's buffer.
        """
        lanes = self.lanes_of(widest, num_devices)
        members, own = widest // lanes, size // lanes
        per_host = num_devices
        if num_devices > self.devices_per_host:
            per_host = math.gcd(num_devices, self.devices_per_host)
        kv = tokens * self.kv_bytes_per_token * math.lcm(self.kv_heads, lanes) / self.kv_heads
        moves = []

        def add(share: float, times: int, sent: float, across: bool, latencies: int = 1) -> None:
            per_byte = self.seconds_per_byte_across if across else self.seconds_per_byte_inside
            seconds = latencies * self.seconds_per_hop + sent * per_byte
            if times > 0:
                moves.append(Move(share, seconds, times, latencies, sent, across))

        if lanes > 1:
            # q, k and v go in and the output comes back; backward likewise with their gradients.
            both = 2 * (2 * tokens * self.q_bytes_per_token + kv) * (lanes - 1) / lanes
            add(0.0, 1, both / self.head_chunks, per_host % lanes > 0, latencies=4)
        inside = max(1, math.gcd(widest, per_host) // lanes)
        grads = HOME_TRAFFIC * kv
        for first, last, across in ((1, inside, False), (inside, members, True)):
            for beside in (True, False):
                low, high = (first, min(last, own + 1)) if beside else (max(first, own + 1), last)
                forward, backward = (FORWARD_SHARE / own, (1 - FORWARD_SHARE) / own)
                forward, backward = (forward, backward) if beside else (0.0, 0.0)
                ends = low < high == members  # the last hop, whose dk and dv go home alone
                add(forward, high - low, kv, across)
                add(backward, high - low - ends, kv + grads, across)
                add(backward, int(ends), kv, across)
                add(0.0, int(ends), grads, across)
        return moves

    def group(self, size: int, widest: int, num_devices: int, tokens: int) -> Group:
        """Return the cost of a group of `size` devices in a program; arguments as in `moves`."""
        moves = self.moves(size, widest, num_devices, tokens)
        members = size // self.lanes_of(widest, num_devices)
        return Group(
            size=size,
            members=members,
            work=self.seconds_per_pair,
            fixed=sum(move.times * move.seconds for move in moves if not move.share),
            hidden=tuple((m.share, m.seconds, m.times) for m in moves if m.share),
            padding=members * self.tile,
        )

    def groups(self, grouping: Sequence[int], tokens: int) -> list[Group]:
        """Return the costs of a grouping's groups; `tokens` as in `moves`."""
        widest, num_devices = max(grouping), sum(grouping)
        known = {size: self.group(size, widest, num_devices, tokens) for size in set(grouping)}
        return [known[size] for size in grouping]

    def network_bytes(self, grouping: Sequence[int], tokens: int) -> float:
        """Return the bytes that each device sends over the network in one microbatch."""
        moves = self.moves(max(grouping), max(grouping), sum(grouping), tokens)
        return sum(move.times * move.bytes for move in moves if move.across)

    def dense_seconds(self, tokens: int) -> float:
        """Return the seconds of a microbatch without attention, with buffers of `tokens` tokens."""
        return self.seconds_per_microbatch + tokens * self.seconds_per_token

    def group_seconds(
        self, grouping: Sequence[int], lengths: Sequence[Sequence[int]], tokens: int
    ) -> list[float]:
        """Return the seconds of attention and exposed transfers of every group.

        Args:
            grouping: group sizes in device order.
            lengths: the lengths of each group's documents.
            tokens: tokens of each device's buffer.
        """
        return [
            group.seconds(sum(group.pairs(length) for length in documents))
            for group, documents in zip(self.groups(grouping, tokens), lengths, strict=True)
        ]

    def microbatch_seconds(
        self, grouping: Sequence[int], lengths: Sequence[Sequence[int]], tokens: int
    ) -> float:
        """Return the seconds of one microbatch; arguments as in `group_seconds`."""
        return self.dense_seconds(tokens) + max(self.group_seconds(grouping, lengths, tokens))

    def calibrate(self, rows: Sequence[TimedMicrobatch]) -> "Cost":
        """Return the cost that fits timed microbatches best, by relative least squares.

        Which group is slowest and which hops are hidden depends on the parameters, so the fit is
        repeated until that no longer changes, at most 50 times; the best fit is kept. A parameter
        that the rows do not determine keeps its value: seconds_per_token if all rows have buffers
        of one size, a link if no row uses it.

        Args:
            rows: timed microbatches, as varied as possible; at least one.

        Raises:
            ValueError: if there are no rows, or one took no time.
        """
        rows = [TimedMicrobatch(*row) for row in rows]
        if not rows or any(not math.isfinite(row.seconds) or row.seconds <= 0 for row in rows):
            raise ValueError("calibrate needs at least one row, each with seconds > 0.")
        best = cost = self
        for _ in range(50):
            fitted = cost._fit(rows)
            if fitted._misfit(rows) < best._misfit(rows) * (1 - 1e-12):
                best = fitted
            if fitted == cost:
                break
            cost = fitted
        return best

    def _misfit(self, rows: Sequence[TimedMicrobatch]) -> float:
        modelled = (self.microbatch_seconds(row.grouping, row.lengths, row.tokens) for row in rows)
        return sum((m / row.seconds - 1) ** 2 for m, row in zip(modelled, rows, strict=True))

    def _fit(self, rows: Sequence[TimedMicrobatch]) -> "Cost":
        from scipy.optimize import nnls

        now = np.array([getattr(self, name) for name in _FITTED])
        features = np.array([self._features(row) for row in rows])
        features, target = _relative(features, rows)
        free = np.any(features != 0, axis=0)
        if len({row.tokens for row in rows}) == 1:
            free[_FITTED.index("seconds_per_token")] = False
        scale = np.linalg.norm(features[:, free], axis=0)
        rest = target - features[:, ~free] @ now[~free]
        # A weak pull towards the present values fixes only what the rows do not determine.
        ridge = 1e-6 * np.eye(scale.size)
        matrix = np.concatenate([features[:, free] / scale, ridge])
        fitted, _ = nnls(matrix, np.concatenate([rest, ridge @ (now[free] * scale)]))
        now[free] = fitted / scale
        values: dict[str, Any] = dict(zip(_FITTED, now.tolist(), strict=True))
        return dataclasses.replace(self, **values)

    def _features(self, row: TimedMicrobatch) -> np.ndarray:
        """Return the factor of each of `_FITTED` in the modelled seconds of `row`."""
        seconds = self.group_seconds(row.grouping, row.lengths, row.tokens)
        slowest = int(np.argmax(seconds))
        group = self.groups(row.grouping, row.tokens)[slowest]
        pairs = sum(group.pairs(length) for length in row.lengths[slowest])
        latencies = hidden = 0.0
        sent = [0.0, 0.0]  # bytes inside hosts and across
        for move in self.moves(group.size, max(row.grouping), sum(row.grouping), row.tokens):
            if not move.share or move.seconds > move.share * pairs * group.work:
                latencies += move.times * move.latencies
                sent[move.across] += move.times * move.bytes
                hidden += move.times * move.share
        return np.array([pairs * (1 - hidden), row.tokens, 1.0, latencies, *sent])


_FITTED = (
    "seconds_per_pair",
    "seconds_per_token",
    "seconds_per_microbatch",
    "seconds_per_hop",
    "seconds_per_byte_inside",
    "seconds_per_byte_across",
)


def _relative(
    features: np.ndarray, rows: Sequence[TimedMicrobatch]
) -> tuple[np.ndarray, np.ndarray]:
    seconds = np.array([row.seconds for row in rows])
    return features / seconds[:, None], np.ones(len(rows))


def model_cost(
    model: ModelShape | str,
    on: GPU | str = DEFAULT_GPU,
    *,
    tp: int = 1,
    devices_per_host: int = 8,
    lanes: int | None = None,
) -> Cost:
    """Return the cost of training a model in bfloat16, without recomputation.

    Args:
        model: its shape, or a name in `hcp_jax.cost.models.MODELS`.
        on: the GPU, or its name in `hcp_jax.hardware`.
        tp: devices that share each layer's weights and heads; the devices of the cost are such
            groups of tp.
        devices_per_host: how many of them share a host.
        lanes: devices that exchange heads with each other; if None, as many devices of a host as
            divide the query heads of a device.

    Raises:
        ValueError: if there is no model or GPU of that name.

    >>> model_cost("llama3-8b").seconds_per_token > model_cost("gpt-12x2048").seconds_per_token
    True
    """
    shape = model_shape(model)
    parameters: dict[str, Any] = _parameters(shape, gpu(on) if isinstance(on, str) else on, tp)
    if lanes is None:
        lanes = math.gcd(devices_per_host, max(1, shape.num_heads // tp))
    return Cost(
        **parameters,
        devices_per_host=devices_per_host,
        lanes=lanes,
        kv_heads=max(1, shape.num_kv_heads // tp),
    )
