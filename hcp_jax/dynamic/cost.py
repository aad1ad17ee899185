"""Model the seconds of a microbatch; the scheduler minimises them.

A microbatch is one compiled program in which every device holds one buffer of T tokens, and its
devices are cut into rings, each with its own documents. It takes

    seconds_per_microbatch                    fixed
    + T · seconds_per_token                   all work that is linear in tokens, with padding
    + max over rings of                       the other rings wait for the slowest
        pairs · seconds_per_pair              attention, on each device of the ring
        + Σ over hops of max(0, transfer - attention of one hop)      the part that is not hidden

Zigzag cuts a document of L tokens into 2g chunks, so each of g devices attends to L² / 2g pairs. A
kernel computes whole tiles: a chunk of L / 2g tokens is rounded up by half a tile on average, which
gives the pairs of a document of L + g · tile tokens. So short documents need few devices even where
links are free.

A ring of g devices makes g - 1 hops forward and g - 1 backward, and one more that brings dk and dv
home. Each hop moves the whole buffer's K and V (shapes are static); backward, float32 dk and dv
travel along. The slowest link of a ring decides, so a ring that leaves its host runs at the speed
of the network. A ring without documents still makes its hops: collectives are unconditional.

Times are linear in the parameters once it is known which ring is slowest and which hops are
hidden, so `Cost.calibrate` fits them to timed microbatches by least squares.
"""

import dataclasses
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


class Ring(NamedTuple):
    """Cost of one ring of devices, with all constants multiplied out.

    Attributes:
        size: number of devices.
        crosses: True if the ring spans several hosts.
        work: seconds per (query, key) pair on one device.
        forward_hop: seconds of one transfer forward.
        backward_hop: seconds of one transfer backward.
        home: seconds of the last transfer, which nothing hides.
        padding: tokens that rounding to tiles adds to a document.
    """

    size: int
    crosses: bool
    work: float
    forward_hop: float
    backward_hop: float
    home: float
    padding: int

    def pairs(self, length: int) -> float:
        """Return the pairs that each device computes for a document of `length` tokens."""
        padded = length + self.padding
        return padded * padded / (2 * self.size)

    def seconds(self, pairs: float) -> float:
        """Return the seconds for `pairs` pairs per device; increasing and convex in `pairs`."""
        work = pairs * self.work
        if self.size == 1:
            return work
        forward = self.forward_hop - work * FORWARD_SHARE / self.size
        backward = self.backward_hop - work * (1 - FORWARD_SHARE) / self.size
        exposed = (forward if forward > 0 else 0.0) + (backward if backward > 0 else 0.0)
        return work + (self.size - 1) * exposed + self.home


class TimedMicrobatch(NamedTuple):
    """Timed microbatch, for `Cost.calibrate`.

    Attributes:
        layout: group sizes in device order.
        lengths: the lengths of each group's documents.
        tokens: tokens of each device's buffer, with padding.
        seconds: measured seconds, forward and backward.
    """

    layout: tuple[int, ...]
    lengths: tuple[tuple[int, ...], ...]
    tokens: int
    seconds: float


def _parameters(model: ModelShape, on: GPU, tp: int) -> dict[str, float]:
    """Return the parameters of `Cost` for a model, in bfloat16 and without recomputation."""
    forward, backward = (on.attention_rate("triton", d).value for d in ("forward", "backward"))
    pair_flops = 4 * sum(kind.num_layers * kind.query_width for kind in model.by_kind) / tp
    kv_width = sum(kind.num_layers * kind.kv_width for kind in model.by_kind)
    linear_flops = 6 * model.product_params / tp
    return {
        "seconds_per_pair": pair_flops * (1 / forward + BACKWARD / backward),
        "seconds_per_token": linear_flops / (LINEAR_SHARE * on.product_rate.value),
        "seconds_per_microbatch": MICROBATCH_SECONDS,
        "kv_bytes_per_token": 2 * _ITEM_BYTES * kv_width / tp,
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

    def crosses(self, first: int, size: int) -> bool:
        """Return whether devices `first` to `first + size - 1` are on more than one host."""
        return first // self.devices_per_host != (first + size - 1) // self.devices_per_host

    def ring(self, size: int, crosses: bool, tokens: int) -> Ring:
        """Return the ring of `size` devices whose transfers move `tokens` tokens each."""
        per_byte = self.seconds_per_byte_across if crosses else self.seconds_per_byte_inside
        transfer = tokens * self.kv_bytes_per_token * per_byte
        hop = self.seconds_per_hop
        return Ring(
            size=size,
            crosses=crosses,
            work=self.seconds_per_pair,
            forward_hop=hop + transfer,
            backward_hop=hop + BACKWARD_TRAFFIC * transfer,
            home=hop + HOME_TRAFFIC * transfer if size > 1 else 0.0,
            padding=size * self.tile,
        )

    def rings(self, layout: Sequence[int], tokens: int) -> list[Ring]:
        """Return the rings of a grouping over devices 0, 1, …; `tokens` as in `ring`."""
        known: dict[tuple[int, bool], Ring] = {}
        rings, first = [], 0
        for size in layout:
            key = size, self.crosses(first, size)
            if key not in known:
                known[key] = self.ring(*key, tokens)
            rings.append(known[key])
            first += size
        return rings

    def dense_seconds(self, tokens: int) -> float:
        """Return the seconds of a microbatch without attention, with buffers of `tokens` tokens."""
        return self.seconds_per_microbatch + tokens * self.seconds_per_token

    def group_seconds(
        self, layout: Sequence[int], lengths: Sequence[Sequence[int]], tokens: int
    ) -> list[float]:
        """Return the seconds of attention and exposed transfers of every group.

        Args:
            layout: group sizes in device order.
            lengths: the lengths of each group's documents.
            tokens: tokens of each device's buffer.
        """
        rings = self.rings(layout, tokens)
        return [
            ring.seconds(sum(ring.pairs(length) for length in documents))
            for ring, documents in zip(rings, lengths, strict=True)
        ]

    def microbatch_seconds(
        self, layout: Sequence[int], lengths: Sequence[Sequence[int]], tokens: int
    ) -> float:
        """Return the seconds of one microbatch; arguments as in `group_seconds`."""
        return self.dense_seconds(tokens) + max(self.group_seconds(layout, lengths, tokens))

    def calibrate(self, rows: Sequence[TimedMicrobatch]) -> "Cost":
        """Return the cost that fits timed microbatches best, by relative least squares.

        Which ring is slowest and which hops are hidden depends on the parameters, so the fit is
        repeated until that no longer changes, at most 50 times; the best fit is kept. A parameter
        that the rows do not determine keeps its value: seconds_per_token if all rows have buffers
        of one size, a link if no row has a ring on it.

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
        modelled = (self.microbatch_seconds(row.layout, row.lengths, row.tokens) for row in rows)
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
        seconds = self.group_seconds(row.layout, row.lengths, row.tokens)
        slowest = int(np.argmax(seconds))
        ring = self.rings(row.layout, row.tokens)[slowest]
        pairs = sum(ring.pairs(length) for length in row.lengths[slowest])
        hops = transfers = hidden = 0.0
        if ring.size > 1:
            work = pairs * ring.work / ring.size
            hops, transfers = 1.0, float(HOME_TRAFFIC)
            for share, hop, traffic in (
                (FORWARD_SHARE, ring.forward_hop, 1),
                (1 - FORWARD_SHARE, ring.backward_hop, BACKWARD_TRAFFIC),
            ):
                if hop > work * share:
                    hops += ring.size - 1
                    transfers += (ring.size - 1) * traffic
                    hidden += (ring.size - 1) * share / ring.size
        moved = transfers * row.tokens * self.kv_bytes_per_token
        links = (0.0, moved) if ring.crosses else (moved, 0.0)
        return np.array([pairs * (1 - hidden), row.tokens, 1.0, hops, *links])


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
