"""Modelled seconds of documents on a ring of devices: what the scheduler minimises.

A microbatch is one compiled program in which every device holds one buffer of T tokens, and its
devices are cut into rings, each with its own documents. It takes

    seconds_per_microbatch                    what is there however little there is to compute
    + T · seconds_per_token                   all that is linear in tokens; padding costs the same
    + max over rings of                       the others wait for the slowest
        pairs · seconds_per_pair              attention, on each device of the ring
        + Σ over hops of max(0, transfer - attention of one hop)      what attention does not hide

Zigzag cuts a document of L tokens into 2g chunks, so each of g devices attends to L² / 2g pairs. A
kernel computes whole tiles: with a chunk of L / 2g tokens rounded up by half a tile on average, the
pairs are those of a document of L + g · tile tokens. That is why short documents want few devices
even where links are free.

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

from hcp_jax import checks

# FlashAttention counts 2 matrix products forward and 5 backward.
FORWARD_SHARE = 2 / 7
# Backward moves k and v (2 bytes an element) and dk and dv (4): three times the forward's bytes,
# and two times when only dk and dv go home.
BACKWARD_TRAFFIC, HOME_TRAFFIC = 3, 2


class ModelShape(NamedTuple):
    """What a model's cost depends on.

    Attributes:
        num_layers: attention layers.
        dense_parameters: weights that take part in a matrix product for every token.
        query_width: query heads · head size.
        kv_width: kv heads · head size.
    """

    num_layers: int
    dense_parameters: int
    query_width: int
    kv_width: int


class Hardware(NamedTuple):
    """Rates of one device and its links, as reached in training rather than as sold.

    Attributes:
        dense_flops: FLOP/s of the matrix products.
        attention_flops: FLOP/s of the attention kernel, causal counted as half.
        inside: bytes/s, one way, between two devices of a host.
        across: bytes/s, one way, between two devices of different hosts.
        latency: seconds of one transfer however small.
        fixed: seconds of one microbatch however small.
        devices_per_host: devices that reach each other at `inside`.
    """

    dense_flops: float
    attention_flops: float
    inside: float
    across: float
    latency: float
    fixed: float
    devices_per_host: int


# bf16. dense: 790 TFLOP/s measured for plain matrix products, 60 % of it modelled for layers.
# attention: 361 forward and 338 backward published for a Pallas Triton kernel on an H100, which has
# the same arithmetic. Links: NVLink 4 sells 450 GB/s each way and NDR InfiniBand 50 GB/s a device;
# 80 % and 90 % of them, 10 µs a transfer and 2 ms a microbatch are modelled.
H200 = Hardware(474e12, 345e12, 360e9, 45e9, 10e-6, 2e-3, 8)

MODELS = {
    # The model of the benchmark that docs/dynamic.md compares with: 12 · 12 · 2048² weights in the
    # layers, and an output head for a vocabulary of 50304 (modelled; the benchmark names none).
    "gpt-12x2048": ModelShape(12, 12 * 12 * 2048**2 + 2048 * 50304, 2048, 2048),
    # Llama 3 (Meta, 2024): 8.03e9 weights less the input embedding.
    "llama3-8b": ModelShape(32, 8_030_000_000 - 128256 * 4096, 4096, 1024),
}


class Ring(NamedTuple):
    """The cost of one ring of devices, ready for a scheduler's inner loop.

    Attributes:
        size: devices.
        crosses: whether it leaves its host.
        work: seconds per (query, key) pair on one device.
        forward_hop: seconds of one transfer forward.
        backward_hop: seconds of one transfer backward.
        home: seconds of the last transfer, which nothing hides.
        padding: tokens by which tiles lengthen a document here.
    """

    size: int
    crosses: bool
    work: float
    forward_hop: float
    backward_hop: float
    home: float
    padding: int

    def pairs(self, length: int) -> float:
        """Pairs that each device computes for a document of `length` tokens."""
        padded = length + self.padding
        return padded * padded / (2 * self.size)

    def seconds(self, pairs: float) -> float:
        """Seconds for documents of `pairs` pairs a device; grows with `pairs`, and is convex."""
        work = pairs * self.work
        if self.size == 1:
            return work
        forward = self.forward_hop - work * FORWARD_SHARE / self.size
        backward = self.backward_hop - work * (1 - FORWARD_SHARE) / self.size
        exposed = (forward if forward > 0 else 0.0) + (backward if backward > 0 else 0.0)
        return work + (self.size - 1) * exposed + self.home


class TimedMicrobatch(NamedTuple):
    """A microbatch that ran, for `Cost.calibrate`.

    Attributes:
        layout: group sizes in device order.
        lengths: the lengths of each group's documents.
        tokens: tokens that each device's buffer holds, padding included.
        seconds: measured, forward and backward.
    """

    layout: tuple[int, ...]
    lengths: tuple[tuple[int, ...], ...]
    tokens: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """Parameters of the model above; all seconds are of forward plus backward, over all layers.

    The defaults are a GPT of 12 layers, 2048 wide, on H200s (see `H200` and `MODELS`). Make others
    with `model_cost`, or fit them with `calibrate`.

    Attributes:
        seconds_per_pair: attention to one (query, key) pair.
        seconds_per_token: everything else for one token.
        seconds_per_microbatch: fixed.
        kv_bytes_per_token: K and V of one token, all layers.
        seconds_per_byte_inside: of a transfer inside a host.
        seconds_per_byte_across: of a transfer between hosts.
        seconds_per_hop: latency of one transfer in every layer.
        tile: tokens to whose multiples a kernel rounds a chunk.
        devices_per_host: devices that share a host; device d is on host d // devices_per_host.
    """

    seconds_per_pair: float = 14 * 12 * 2048 / H200.attention_flops
    seconds_per_token: float = 6 * MODELS["gpt-12x2048"].dense_parameters / H200.dense_flops
    seconds_per_microbatch: float = H200.fixed
    kv_bytes_per_token: float = 4 * 12 * 2048
    seconds_per_byte_inside: float = 1 / H200.inside
    seconds_per_byte_across: float = 1 / H200.across
    seconds_per_hop: float = 12 * H200.latency
    tile: int = 64
    devices_per_host: int = 8

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = checks.number(f"Cost.{field.name}", getattr(self, field.name))
            if value < 0:
                raise ValueError(f"Cost.{field.name} must be 0 or greater, got {value}.")
        checks.integer("Cost.devices_per_host", self.devices_per_host, least=1)

    def crosses(self, first: int, size: int) -> bool:
        """Whether a group of `size` devices from device `first` on leaves its host."""
        return first // self.devices_per_host != (first + size - 1) // self.devices_per_host

    def ring(self, size: int, crosses: bool, tokens: int) -> Ring:
        """The ring of `size` devices whose transfers move `tokens` tokens each."""
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
        """The rings of a layout over devices 0, 1, …; `tokens` as in `ring`."""
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
        """What a microbatch takes before any attention, with buffers of `tokens` tokens."""
        return self.seconds_per_microbatch + tokens * self.seconds_per_token

    def group_seconds(
        self, layout: Sequence[int], lengths: Sequence[Sequence[int]], tokens: int
    ) -> list[float]:
        """Seconds of attention and exposed transfers of every group.

        Args:
            layout: group sizes in device order.
            lengths: the lengths of each group's documents.
            tokens: tokens of each device's buffer.
        """
        rings = self.rings(layout, tokens)
        return [
            ring.seconds(sum(ring.pairs(length) for length in of_group))
            for ring, of_group in zip(rings, lengths, strict=True)
        ]

    def microbatch_seconds(
        self, layout: Sequence[int], lengths: Sequence[Sequence[int]], tokens: int
    ) -> float:
        """Seconds of one microbatch; arguments as in `group_seconds`."""
        return self.dense_seconds(tokens) + max(self.group_seconds(layout, lengths, tokens))

    def calibrate(self, rows: Sequence[TimedMicrobatch]) -> "Cost":
        """The cost that fits timed microbatches best, in relative least squares.

        Which ring is slowest and which hops are hidden depends on the parameters, so the fit is
        repeated until that no longer changes (or comes round again; the best fit seen is kept).
        A parameter that no row tells apart from the others keeps its value: seconds_per_token where
        all rows have buffers of one size, links where no row has a ring on them.

        Args:
            rows: timed microbatches; as many kinds as possible, and at least one.

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
        # A breath of the present values decides what the rows leave open, and nothing else.
        ridge = 1e-6 * np.eye(scale.size)
        matrix = np.concatenate([features[:, free] / scale, ridge])
        fitted, _ = nnls(matrix, np.concatenate([rest, ridge @ (now[free] * scale)]))
        now[free] = fitted / scale
        values: dict[str, Any] = dict(zip(_FITTED, now.tolist(), strict=True))
        return dataclasses.replace(self, **values)

    def _features(self, row: TimedMicrobatch) -> np.ndarray:
        """What each of `_FITTED` is multiplied by in the modelled seconds of `row`."""
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


def model_cost(model: ModelShape | str, hardware: Hardware = H200) -> Cost:
    """The cost of training a model in bfloat16, without recomputation.

    Args:
        model: its shape, or a name in `MODELS`.
        hardware: the devices and their links.

    Raises:
        ValueError: if there is no model of that name.
    """
    if isinstance(model, str):
        if model not in MODELS:
            raise ValueError(f"unknown model {model!r}: there are {', '.join(sorted(MODELS))}.")
        model = MODELS[model]
    return Cost(
        # Two matrix products of 2 · query_width FLOPs a pair forward, five backward.
        seconds_per_pair=14 * model.num_layers * model.query_width / hardware.attention_flops,
        seconds_per_token=6 * model.dense_parameters / hardware.dense_flops,
        seconds_per_microbatch=hardware.fixed,
        kv_bytes_per_token=4 * model.num_layers * model.kv_width,
        seconds_per_byte_inside=1 / hardware.inside,
        seconds_per_byte_across=1 / hardware.across,
        seconds_per_hop=model.num_layers * hardware.latency,
        devices_per_host=hardware.devices_per_host,
    )
