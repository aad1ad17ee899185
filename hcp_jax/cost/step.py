"""Estimate FLOPs, bytes and seconds of a training step on a cluster, without compiling it.

FLOPs are counted: those of attention from the mask's intervals (`pairs.py`), those of the matrix
products from their shapes. The rates of `hcp_jax.hardware` turn them into seconds. The overlap
follows audits of compiled programs: ring hops hide behind attention and FSDP's gathers behind the
layers, as long as the compute lasts; all-to-alls, gathers of K and V, tensor-parallel sums, and the
sum of gradients without FSDP are fully exposed. `traffic.py` lists what attention moves.

A step on one device, with t = T / C tokens of each of its rows:

    recurrence    chunks' matrix products, and their arrays read and written
    matmul        2 · parameters · t forward, twice that backward, once more where recomputed
    attention     4 · H · heads · pairs forward, 2.5 times that backward
    memory-bound  reads and writes of norms, activations, merging of partials, optimizer
    transfers     bytes at the rate of the link, plus a latency
"""

import dataclasses
import functools
import math

import numpy as np

from hcp_jax.cost.pairs import causal_chunk_pairs, pairs_by_hop
from hcp_jax.cost.recurrence import Recurrence
from hcp_jax.cost.shape import BACKWARD, ModelShape, step_flops
from hcp_jax.cost.traffic import (
    GATHER_KV,
    HALO,
    RING_HOP,
    STATE_SCAN,
    STRATEGIES,
    CommType,
    Remat,
    Strategy,
    Traffic,
    layer_traffic,
    sent_bytes,
    state_bytes,
)
from hcp_jax.hardware import NO_LINK, Cluster, Path


@dataclasses.dataclass(frozen=True)
class Split:
    """Split of a run over a cluster; names as in `ParallelConfig` and `ModelConfig`."""

    dp: int = 1
    tp: int = 1
    cp_outer: int = 1
    cp_inner: int = 1
    comm_type: CommType = "a2a+p2p"
    remat: Remat = "attention"
    fsdp: bool = True

    @property
    def cp(self) -> int:
        """Context-parallel degree C."""
        return self.cp_outer * self.cp_inner

    @property
    def strategy(self) -> Strategy:
        """Axes that exchange heads, and axes that K and V move over."""
        return STRATEGIES[self.comm_type]

    @property
    def exchange(self) -> int:
        """Number of devices that exchange heads."""
        return self._size(self.strategy.exchange)

    @property
    def move(self) -> int:
        """Number of devices that K and V move over."""
        return self._size(self.strategy.move)

    def _size(self, axes: tuple[str, ...]) -> int:
        return math.prod(getattr(self, axis) for axis in axes)

    def __str__(self) -> str:
        cp = f"cp {self.cp} [{self.cp_inner} in, {self.cp_outer} out]"
        shard = "fsdp" if self.fsdp else "replicated"
        return f"dp {self.dp}, tp {self.tp}, {cp} {self.comm_type}, remat {self.remat}, {shard}"


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One kind of transfer in a step.

    Attributes:
        what: description in words.
        axes: mesh axes it runs over.
        link: "inside a host" or "between hosts".
        bytes: bytes that one device sends in a step.
        seconds: duration of all of them.
        exposed: seconds in which the device waits for them.
    """

    what: str
    axes: tuple[str, ...]
    link: str
    bytes: float
    seconds: float
    exposed: float

    def times(self, n: int) -> "Transfer":
        """Return this transfer, n times."""
        return Transfer(
            self.what, self.axes, self.link, n * self.bytes, n * self.seconds, n * self.exposed
        )


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Modelled cost of a step on the busiest device.

    Attributes:
        compute: seconds by part.
        transfers: all transfers.
        flops: FLOPs of a step on one device, as MFU counts them (`step_flops`).
        attention_flops: the part of these FLOPs that is attention.
        tokens: tokens in a step, over all devices.
        gpus: number of devices.
        peak: FLOP/s of one device, by data sheet.
    """

    compute: dict[str, float]
    transfers: tuple[Transfer, ...]
    flops: float
    attention_flops: float
    tokens: int
    gpus: int
    peak: float

    @property
    def compute_s(self) -> float:
        """Seconds in which the device computes."""
        return sum(self.compute.values())

    @property
    def communication_s(self) -> float:
        """Seconds in which the device sends, hidden or not."""
        return sum(transfer.seconds for transfer in self.transfers)

    @property
    def exposed_s(self) -> float:
        """Seconds in which the device waits for a transfer."""
        return sum(transfer.exposed for transfer in self.transfers)

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return self.compute_s + self.exposed_s

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second and GPU."""
        return self.tokens / self.step_s / self.gpus

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization: the model's FLOP/s over the peak FLOP/s."""
        return self.flops / self.step_s / self.peak

    def bytes_on(self, link: str) -> float:
        """Return the bytes that a device sends over one kind of link in a step."""
        return sum(transfer.bytes for transfer in self.transfers if transfer.link == link)


def estimate(
    model: ModelShape,
    split: Split,
    cluster: Cluster,
    seq_len: int,
    *,
    rows: int = 1,
    implementation: str = "triton",
) -> Estimate:
    """Return the modelled cost of one optimizer step.

    Args:
        model: shape of the decoder.
        split: mesh sizes, comm type and remat policy; must be valid for the model.
        cluster: cluster with as many GPUs as the mesh has devices.
        seq_len: T, tokens of a row, with padding.
        rows: streams of each data-parallel replica in a step.
        implementation: implementation of the attention core, whose rates are used.
    """
    t = rows * seq_len // split.cp
    attention = [
        (kind.num_layers, _Attention(kind, split, cluster, seq_len, rows, implementation))
        for kind in model.by_kind
        if kind.recurrence is None
    ]
    recurrent = [
        (kind.num_layers, _Recurrent(kind.recurrence, split, cluster, t, rows))
        for kind in model.by_kind
        if kind.recurrence is not None
    ]
    again = 0 if split.remat == "none" else 1
    layers = model.layers_params / split.tp
    head = (1 + model.mtp_depths) * model.head_params / split.tp
    # The output head is always recomputed in backward: its logits are never kept.
    products = 2.0 * t * (layers * (3 + again) + head * 4)
    bandwidth = cluster.gpu.memory_bandwidth
    shards = split.dp * split.cp if split.fsdp else 1
    compute = {
        "matmul": products / cluster.gpu.product_rate.value,
        "attention": sum(n * one.compute_s for n, one in attention),
        "memory-bound": sum(
            kind.num_layers * _elementwise_bytes(kind, split, t) / bandwidth
            for kind in model.by_kind
        ),
        **({"recurrence": sum(n * one.compute_s for n, one in recurrent)} if recurrent else {}),
        "optimizer": 28 * model.params / split.tp / shards / bandwidth,
    }
    transfers = [
        *(x.times(n) for n, one in attention for x in one.transfers),
        *(x.times(n) for n, one in recurrent for x in one.transfers),
        *_tensor_parallel(model, split, cluster, t),
        *_weights_and_gradients(model, split, cluster, sum(compute.values())),
    ]
    tokens = split.dp * rows * seq_len
    pairs = split.dp * rows * mean_pairs(model, seq_len)
    return Estimate(
        compute=compute,
        transfers=tuple(x for x in transfers if x.link != NO_LINK),
        flops=step_flops(model, tokens, pairs) / cluster.size,
        attention_flops=step_flops(model, 0, pairs) / cluster.size,
        tokens=tokens,
        gpus=cluster.size,
        peak=cluster.gpu.peak_flops,
    )


@functools.lru_cache(maxsize=4096)
def path(cluster: Cluster, split: Split, axes: tuple[str, ...], kind: str) -> Path:
    """Return the path of a collective along some mesh axes: that of its slowest group."""
    order = ("dp", "cp_outer", "cp_inner", "tp")
    mesh = np.arange(cluster.size).reshape([getattr(split, axis) for axis in order])
    along = [order.index(axis) for axis in axes]
    groups = np.moveaxis(mesh, along, range(-len(along), 0))
    groups = groups.reshape(-1, int(np.prod([mesh.shape[i] for i in along])))
    # Groups that spread over hosts in the same way have the same path; even a large mesh has only
    # a few such patterns.
    spread = groups // cluster.domain
    kinds = {row.tobytes(): i for i, row in enumerate(spread - spread[:, :1])}
    chosen = groups[list(kinds.values())].tolist()
    return min((cluster.path(kind, tuple(group)) for group in chosen), key=lambda p: p.rate)


@functools.lru_cache(maxsize=64)
def stream_pairs(model: ModelShape, seq_len: int, chunks: int) -> np.ndarray:
    """Return `chunk_pairs` of a model's mask, `[chunks, chunks]`, without arrays of length T."""
    return causal_chunk_pairs(seq_len, chunks, model.sliding_window)


def mean_pairs(model: ModelShape, seq_len: int) -> float:
    """Return the visible pairs of a stream, as the mean over the layers that `step_flops` takes."""
    kinds = model.by_kind
    widths = [kind.num_layers * kind.query_width for kind in kinds]
    pairs = [float(stream_pairs(kind, seq_len, 1).sum()) for kind in kinds]
    if len(kinds) == 1 or not sum(widths):
        return pairs[0]
    return sum(w * p for w, p in zip(widths, pairs, strict=True)) / sum(widths)


@functools.lru_cache(maxsize=256)
def _busiest_by_hop(model: ModelShape, seq_len: int, cp: int, move: int) -> np.ndarray:
    """Return the visible pairs of the busiest ring rank at each hop, in zigzag, `[hops]`."""
    by_hop = pairs_by_hop(stream_pairs(model, seq_len, 2 * cp), cp, "zigzag", move)
    busiest: np.ndarray = by_hop.max(axis=0)
    return busiest


class _Attention:
    """Cost of one layer's attention, forward and backward, with recomputation."""

    def __init__(
        self,
        model: ModelShape,
        split: Split,
        cluster: Cluster,
        seq_len: int,
        rows: int,
        implementation: str,
    ) -> None:
        self.split, self.cluster = split, cluster
        heads, kv_heads = model.num_heads // split.tp, model.num_kv_heads // split.tp
        t = rows * seq_len // split.cp  # tokens of a device, before heads are exchanged
        self.traffic = layer_traffic(
            split.strategy,
            {"cp_outer": split.cp_outer, "cp_inner": split.cp_inner},
            tokens=t,
            heads=heads,
            kv_heads=kv_heads,
            head_size=model.head_size,
            item_bytes=2,
            remat=split.remat,
        )
        per_pair = 4.0 * model.head_size * (heads // split.exchange) * rows
        # At each hop all devices wait for the busiest one.
        flops = per_pair * _busiest_by_hop(model, seq_len, split.cp, split.move)
        gpu = cluster.gpu
        self.forward_hops = flops / gpu.attention_rate(implementation, "forward").value
        backward = gpu.attention_rate(implementation, "backward").value
        self.backward_hops = BACKWARD * flops / backward
        self.forwards = 2 if split.remat == "full" else 1
        # Each hop merges partials and adds gradients in float32.
        merged = 12.0 * t * heads * model.head_size
        hops = split.move - 1 if split.strategy.by == "ring" else 0
        self.merge_s = hops * merged / gpu.memory_bandwidth

    @property
    def compute_s(self) -> float:
        return (
            self.forwards * (float(self.forward_hops.sum()) + self.merge_s)
            + float(self.backward_hops.sum())
            + self.merge_s
        )

    @property
    def transfers(self) -> list[Transfer]:
        ring = [t for t in self.traffic if t.scope == RING_HOP]
        gather = [t for t in self.traffic if t.scope == GATHER_KV]
        exchange = [t for t in self.traffic if t not in ring and t not in gather]
        forward = [t for t in ring if t.direction == "forward" or t.repeated]
        backward = [t for t in ring if t not in forward]
        passes = self._together("K/V round the ring, forward", forward[:1], self.forward_hops)
        return [
            *(one.times(len(forward)) for one in passes),
            *self._together("K/V and their gradients, backward", backward, self.backward_hops),
            *self._alone("K/V gathered, gradients scattered", gather, 1),
            *self._alone("heads exchanged for sequence", exchange, None),
        ]

    def _together(self, what: str, moves: list[Traffic], hops: np.ndarray) -> list[Transfer]:
        """Return transfers that run at the same time, hidden behind the attention of each hop."""
        if not moves:
            return []
        first = moves[0]
        link, rate, latency = path(self.cluster, self.split, first.axes, first.kind)
        size = sum(move.sent_bytes for move in moves)
        one = size / rate + latency
        exposed = sum(max(0.0, one - float(hop)) for hop in hops[:-1])
        return [Transfer(what, first.axes, link, first.count * size, first.count * one, exposed)]

    def _alone(self, what: str, moves: list[Traffic], starts: int | None) -> list[Transfer]:
        """Return transfers that nothing hides; arguments as in the function of this name."""
        if not moves:
            return []
        alone = _alone(self.cluster, self.split, moves, starts)
        return [Transfer(what, moves[0].axes, *alone)]


# Fitted to audits of 4-layer hybrids (gated delta net, Mamba-2) on 2 x 8 H200 at 128K tokens: how
# often each array of a chunk is read or written, and by how much products of float32 are slower
# than those of bfloat16 (some, of delta rules, are at the highest precision).
_PASSES = 7
_SLOWER_NUMBERS, _SLOWER_MATRICES = 4, 12


class _Recurrent:
    """Cost of one layer's recurrence, forward and backward, without its projections."""

    def __init__(
        self, recurrence: Recurrence, split: Split, cluster: Cluster, t: int, rows: int
    ) -> None:
        self.split, self.cluster = split, cluster
        again = 0 if split.remat == "none" else 1
        gpu = cluster.gpu
        each = t / split.tp * (3 + again)
        slower = _SLOWER_MATRICES if recurrence.matrix else _SLOWER_NUMBERS
        products = slower * each * recurrence.chunk_flops / gpu.product_rate.value
        moved = _PASSES * each * recurrence.chunk_bytes / gpu.memory_bandwidth
        self.compute_s = products + moved
        self.traffic = recurrence.traffic(
            ("cp_outer", "cp_inner"),
            {"cp_outer": split.cp_outer, "cp_inner": split.cp_inner},
            runs=2,
            rows=rows,
            tp=split.tp,
            item_bytes=2,
            remat=split.remat,
        )

    @property
    def transfers(self) -> list[Transfer]:
        return [
            Transfer(what, moves[0].axes, *_alone(self.cluster, self.split, moves))
            for what, scope in (("states passed on", STATE_SCAN), ("halos of convolutions", HALO))
            if (moves := [move for move in self.traffic if move.scope == scope])
        ]


def _alone(
    cluster: Cluster, split: Split, moves: list[Traffic], starts: int | None = None
) -> tuple[str, float, float, float]:
    """Return link, bytes, seconds and exposed seconds of transfers that nothing hides.

    Args:
        cluster: the cluster.
        split: its split.
        moves: traffic over the same axes.
        starts: number of latencies per execution; None for one per array.
    """
    sent = sum(move.count * move.sent_bytes for move in moves)
    seconds = 0.0
    for move in moves:
        link, rate, latency = path(cluster, split, move.axes, move.kind)
        calls = move.count * (starts or move.arrays)
        seconds += move.count * move.sent_bytes / rate + calls * latency
    return link, sent, seconds, seconds


def _elementwise_bytes(model: ModelShape, split: Split, t: int) -> float:
    """Return the bytes read and written by a layer's norms, rotations and activations."""
    heads = (model.num_heads + model.num_kv_heads) * model.head_size / split.tp
    if model.recurrence is not None:
        heads = model.recurrence.channels / split.tp
    forward = (
        2.0
        * t
        * (
            10 * model.hidden_size
            + 4 * heads
            + model.mlp_products * model.intermediate_size / split.tp
        )
    )
    return forward * (3 if split.remat == "none" else 4)


def _tensor_parallel(model: ModelShape, split: Split, cluster: Cluster, t: int) -> list[Transfer]:
    """Return the sums of activations over tp, for all layers."""
    link, rate, latency = path(cluster, split, ("tp",), "all-reduce")
    again = 0 if split.remat == "none" else 1
    # The second sum of a recomputed layer is not needed in backward.
    sums = model.computed_layers * (4 + again)
    sent = sums * sent_bytes("all-reduce", 2.0 * t * model.hidden_size, split.tp)
    seconds = sent / rate + sums * latency
    return [Transfer("activations summed over tp", ("tp",), link, sent, seconds, seconds)]


def _weights_and_gradients(
    model: ModelShape, split: Split, cluster: Cluster, compute_s: float
) -> list[Transfer]:
    """Return the transfers that gather weights and sum gradients over dp and cp."""
    axes = ("dp", "cp_outer", "cp_inner")
    link, rate, latency = path(cluster, split, axes, "all-gather")
    gathers = 2 if split.remat == "none" else 3
    sent = state_bytes(
        model.params / split.tp, split.dp * split.cp, 2, fsdp=split.fsdp, gathers=gathers
    )
    if not split.fsdp:
        seconds = sent / rate + latency
        return [Transfer("gradients summed", axes, link, sent, seconds, seconds)]
    calls = model.computed_layers * (gathers + 1)
    seconds = sent / rate + calls * latency
    exposed = max(0.0, seconds - compute_s)
    what = "weights gathered, gradients scattered"
    return [Transfer(what, axes, link, sent, seconds, exposed)]
