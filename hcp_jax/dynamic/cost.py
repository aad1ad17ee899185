"""Model the seconds of a microbatch; the scheduler minimises them.

A microbatch is one run of a compiled program in which every device holds one buffer of M tokens and
its devices form groups, each with its own documents. It takes

    seconds_per_microbatch                    fixed
    + M · seconds_per_token                   all work that is linear in tokens, with padding
    + exchange of heads                       over the program's lanes; none of it is hidden
    + max over groups of                      the other groups wait for the slowest
        attention, and what its transfers take beyond it

A group of g devices has w = g / lanes members. Zigzag cuts a document of L tokens into 2w chunks,
and lanes share the heads of a member, so each device computes L² / 2g pairs. A kernel computes
whole tiles: a chunk of L / 2w tokens is rounded up by half a tile on average, which gives the pairs
of a document of L + w · tile tokens. So short documents need few members even where links are free.

K and V make w - 1 hops forward and w - 1 backward, and dK and dV come home once more. Members on
one host are visited one after the other while the next host's K and V are on their way
(`attention.walk.Nested`), so over `outer` hosts of `inner` members each, with h the seconds of
attention of one hop,

    forward = (outer - 1) · max(network transfer, host) + host
    host    = inner · h + (inner - 1) · max(0, NVLink transfer - h)

and likewise backward, where float32 dK and dV travel along. Each transfer moves the whole buffer
(shapes are static). A program makes the hops of its widest group on all devices, so a narrower
group spends the time of the other hops, too, with nothing to hide them behind.

Times are linear in the parameters once it is known which group is slowest and which hops are
hidden, so `Cost.calibrate` fits them to timed microbatches by least squares.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from hcp_jax.base import checks
from hcp_jax.cost.models import model_shape
from hcp_jax.cost.shape import BACKWARD, ModelShape
from hcp_jax.cost.traffic import GRADIENT_BYTES, ITEM_BYTES
from hcp_jax.hardware import GPU, gpu

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


class Direction(NamedTuple):
    """Forward or backward: its share of the attention, and seconds of a transfer on each link."""

    share: float
    inside: float
    across: float


class GroupCost(NamedTuple):
    """Cost of one group of devices, with all constants multiplied out.

    Attributes:
        size: number of devices.
        inner: members on one host that the group spans, 1 or more.
        outer: hosts (or members, if a member is a host or more) that it spans.
        work: seconds per (query, key) pair on one device.
        forward: see `Direction`.
        backward: see `Direction`.
        fixed: seconds of the last move of dK and dV, and of the program's hops beyond the group.
        padding: tokens that rounding to tiles adds to a document.
    """

    size: int
    inner: int
    outer: int
    work: float
    forward: Direction
    backward: Direction
    fixed: float
    padding: int

    @property
    def members(self) -> int:
        """The number of members; a group of one makes no hops."""
        return self.inner * self.outer

    def pairs(self, length: int) -> float:
        """Return the pairs that each device computes for a document of `length` tokens."""
        padded = length + self.padding
        return padded * padded / (2 * self.size)

    def seconds(self, pairs: float) -> float:
        """Return the seconds for `pairs` pairs per device; increasing and convex in `pairs`."""
        work = pairs * self.work
        if self.inner == 1 and self.outer == 1:
            return work + self.fixed
        total = self.fixed
        for share, inside, across in (self.forward, self.backward):
            hop = work * share / (self.inner * self.outer)
            host = self.inner * hop
            if inside > hop:
                host += (self.inner - 1) * (inside - hop)
            total += host + (self.outer - 1) * (across if across > host else host)
        return total

    def lines(self) -> list[tuple[float, float]]:
        """Return (α, β) of the lines α · work + β whose maximum `seconds` is."""
        found = [(0.0, self.fixed)]
        for share, inside, across in (self.forward, self.backward):
            options = []
            hop = share / (self.inner * self.outer)
            for exposed in (0.0, 1.0):
                alpha = (self.inner - exposed * (self.inner - 1)) * hop
                beta = exposed * (self.inner - 1) * inside
                options.append((self.outer * alpha, self.outer * beta))
                options.append((alpha, beta + (self.outer - 1) * across))
            found = [(a + c, b + d) for a, b in found for c, d in options]
        return found


class TimedMicrobatch(NamedTuple):
    """Timed microbatch, for `Cost.calibrate`.

    Attributes:
        grouping: group sizes in device order.
        lengths: the lengths of each group's documents.
        tokens: tokens of each device's buffer, with padding.
        seconds: measured seconds, forward and backward.
        lanes: devices that exchange heads with each other.
    """

    grouping: tuple[int, ...]
    lengths: tuple[tuple[int, ...], ...]
    tokens: int
    seconds: float
    lanes: int = 1


def _parameters(model: ModelShape, on: GPU, tp: int) -> dict[str, float]:
    """Return the parameters of `Cost` for a model, in bfloat16 and without recomputation."""
    forward, backward = (on.attention_rate("triton", d).value for d in ("forward", "backward"))
    query_width = sum(kind.num_layers * kind.query_width for kind in model.by_kind)
    pair_flops = 4 * query_width / tp
    kv_width = sum(kind.num_layers * kind.kv_width for kind in model.by_kind)
    linear_flops = 6 * model.product_params / tp
    return {
        "seconds_per_pair": pair_flops * (1 / forward + BACKWARD / backward),
        "seconds_per_token": linear_flops / (LINEAR_SHARE * on.product_rate.value),
        "seconds_per_microbatch": MICROBATCH_SECONDS,
        "kv_bytes_per_token": 2 * _ITEM_BYTES * kv_width / tp,
        "q_bytes_per_token": _ITEM_BYTES * query_width / tp,
        "seconds_per_byte_inside": 1 / on.nvlink.rate.value,
        "seconds_per_byte_across": 1 / on.network.rate.value,
        "seconds_per_hop": model.num_layers * on.nvlink.latency,
    }


_DEFAULTS = _parameters(model_shape(DEFAULT_MODEL), gpu(DEFAULT_GPU), tp=1)


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
        q_bytes_per_token: bytes of the queries of one token, all layers; as many as of the output.
        seconds_per_byte_inside: seconds per byte of a transfer inside a host.
        seconds_per_byte_across: seconds per byte of a transfer between hosts.
        seconds_per_hop: latency of one transfer, summed over layers.
        tile: kernels round a chunk up to a multiple of this number of tokens.
        devices_per_host: devices that share a host; device d is on host d // devices_per_host.
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

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = checks.number(f"Cost.{field.name}", getattr(self, field.name))
            if value < 0:
                raise ValueError(f"Cost.{field.name} must be 0 or greater, got {value}.")
        checks.integer("Cost.devices_per_host", self.devices_per_host, least=1)

    def group(
        self, size: int, tokens: int, lanes: int = 1, program: int | None = None
    ) -> GroupCost:
        """Return the cost of a group.

        Args:
            size: devices of the group.
            tokens: M, tokens of each device's buffer.
            lanes: devices that exchange heads with each other.
            program: devices of the widest group that the program serves; `size` if None.
        """
        return _group(self, size, tokens, min(lanes, size), size if program is None else program)

    def groups(
        self,
        grouping: Sequence[int],
        tokens: int,
        lanes: int = 1,
        program: int | None = None,
    ) -> list[GroupCost]:
        """Return the costs of a grouping's groups; arguments as in `group`."""
        program = max(grouping) if program is None else program
        known = {size: self.group(size, tokens, lanes, program) for size in set(grouping)}
        return [known[size] for size in grouping]

    def hop_seconds(self, tokens: int) -> tuple[Direction, Direction, Direction]:
        """Return the seconds of one transfer forward, backward, and of the last one home."""
        inside, across = (
            tokens * self.kv_bytes_per_token * rate
            for rate in (self.seconds_per_byte_inside, self.seconds_per_byte_across)
        )
        hop = self.seconds_per_hop
        return tuple(  # type: ignore[return-value]
            Direction(share, hop + traffic * inside, hop + traffic * across)
            for share, traffic in (
                (FORWARD_SHARE, 1.0),
                (1 - FORWARD_SHARE, BACKWARD_TRAFFIC),
                (0.0, HOME_TRAFFIC),
            )
        )

    def dense_seconds(self, tokens: int, lanes: int = 1) -> float:
        """Return the seconds of a microbatch without attention and hops.

        Args:
            tokens: M, tokens of each device's buffer.
            lanes: devices that exchange heads with each other.
        """
        linear = self.seconds_per_microbatch + tokens * self.seconds_per_token
        if lanes == 1:
            return linear
        across = lanes > self.devices_per_host
        rate = self.seconds_per_byte_across if across else self.seconds_per_byte_inside
        # q, K, V and the output forward, their cotangents backward.
        sent = 2 * (2 * self.q_bytes_per_token + self.kv_bytes_per_token) * (lanes - 1) / lanes
        return linear + 4 * self.seconds_per_hop + tokens * sent * rate

    def group_seconds(
        self,
        grouping: Sequence[int],
        lengths: Sequence[Sequence[int]],
        tokens: int,
        lanes: int = 1,
        program: int | None = None,
    ) -> list[float]:
        """Return the seconds of attention and transfers of every group.

        Args:
            grouping: group sizes in device order.
            lengths: the lengths of each group's documents.
            tokens: M, tokens of each device's buffer.
            lanes: devices that exchange heads with each other.
            program: devices of the widest group that the program serves; of the grouping if None.
        """
        return [
            group.seconds(sum(group.pairs(length) for length in documents))
            for group, documents in zip(
                self.groups(grouping, tokens, lanes, program), lengths, strict=True
            )
        ]

    def microbatch_seconds(
        self,
        grouping: Sequence[int],
        lengths: Sequence[Sequence[int]],
        tokens: int,
        lanes: int = 1,
        program: int | None = None,
    ) -> float:
        """Return the seconds of one microbatch; arguments as in `group_seconds`."""
        slowest = max(self.group_seconds(grouping, lengths, tokens, lanes, program))
        return self.dense_seconds(tokens, lanes) + slowest

    def calibrate(self, rows: Sequence[TimedMicrobatch]) -> "Cost":
        """Return the cost that fits timed microbatches best, by relative least squares.

        Which group is slowest and which hops are hidden depends on the parameters, so the fit is
        repeated until that no longer changes, at most 50 times; the best fit is kept. A parameter
        that the rows do not determine keeps its value: seconds_per_token if all rows have buffers
        of one size, a link if no row has a transfer on it.

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

    def _modelled(self, row: TimedMicrobatch) -> float:
        return self.microbatch_seconds(row.grouping, row.lengths, row.tokens, row.lanes)

    def _misfit(self, rows: Sequence[TimedMicrobatch]) -> float:
        return sum((self._modelled(row) / row.seconds - 1) ** 2 for row in rows)

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
        """Return the factor of each of `_FITTED` in the modelled seconds of `row`.

        The model is linear in them around their values, so differences are exact.
        """
        base = self._modelled(row)
        found = []
        for name in _FITTED:
            value = getattr(self, name)
            step = 1e-5 * max(value, _DEFAULTS[name])
            more = dataclasses.replace(self, **{name: value + step})._modelled(row)
            factor = (more - base) / step
            found.append(factor if abs(factor) * step > 1e-12 * base else 0.0)
        return np.array(found)


_FITTED = (
    "seconds_per_pair",
    "seconds_per_token",
    "seconds_per_microbatch",
    "seconds_per_hop",
    "seconds_per_byte_inside",
    "seconds_per_byte_across",
)


@functools.lru_cache(maxsize=4096)
def _group(cost: Cost, size: int, tokens: int, lanes: int, program: int) -> GroupCost:
    forward, backward, home = cost.hop_seconds(tokens)
    inner, outer = _spans(size, lanes, cost.devices_per_host)
    alone = GroupCost(
        size=size,
        inner=inner,
        outer=outer,
        work=cost.seconds_per_pair,
        forward=forward,
        backward=backward,
        fixed=0.0 if size == lanes else home.across if outer > 1 else home.inside,
        padding=size // lanes * cost.tile,
    )
    if program <= size:
        return alone
    whole = _group(cost, program, tokens, lanes, program)
    return alone._replace(fixed=alone.fixed + whole.seconds(0.0) - alone.seconds(0.0))


def _spans(size: int, lanes: int, devices_per_host: int) -> tuple[int, int]:
    """Return the members on one host, and the number of hosts, of a group of `size` devices."""
    members = size // lanes
    inner = min(members, max(1, devices_per_host // lanes))
    return (inner, members // inner) if members % inner == 0 else (1, members)


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
) -> Cost:
    """Return the cost of training a model in bfloat16, without recomputation.

    Args:
        model: its shape, or a name in `hcp_jax.cost.models.MODELS`.
        on: the GPU, or its name in `hcp_jax.hardware`.
        tp: devices that share each layer's weights and heads; the devices of the cost are such
            groups of tp.
        devices_per_host: how many of them share a host.

    Raises:
        ValueError: if there is no model or GPU of that name.

    >>> model_cost("llama3-8b").seconds_per_token > model_cost("gpt-12x2048").seconds_per_token
    True
    """
    parameters: dict[str, Any] = _parameters(
        model_shape(model), gpu(on) if isinstance(on, str) else on, tp
    )
    return Cost(**parameters, devices_per_host=devices_per_host)
