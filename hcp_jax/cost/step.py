"""FLOPs, bytes and seconds of a training step, for a model on a cluster, without compiling it.

FLOPs are counted: attention's from the mask's intervals (`pairs.py`), the matrix products' from
their shapes. Seconds come of them by the rates in `hardware.py`. What hides behind what is what the
audit finds in compiled programs: ring hops behind attention and FSDP's gathers behind the layers,
each as far as they last; all-to-alls, gathers of K and V, tensor parallel sums and the gradients'
sum without FSDP stand alone.

A step, on one device, with t = T / C tokens of each of its rows:

    matmul        2 · parameters · t forward, twice that backward, once more where recomputed
    attention     4 · H · heads · pairs forward, 2.5 times that backward
    memory-bound  what norms, activations, merging of partials and the optimizer read and write
    transfers     each at its link's rate, and a latency
"""

import dataclasses
import functools

import numpy as np

from hcp_jax.cost.pairs import causal_chunk_pairs, pairs_by_hop
from hcp_jax.cost.shape import ModelShape, step_flops
from hcp_jax.hardware import NO_LINK, Cluster, Path

BACKWARD = 2.5  # attention's backward, in forwards: five products for two
_STRATEGY = {
    # comm type: (cp_inner exchanges heads, cp_outer exchanges heads, how K and V move)
    "p2p": (False, False, "ring"),
    "all_gather": (False, False, "gather"),
    "a2a": (True, True, "ring"),
    "a2a+p2p": (True, False, "ring"),
    "a2a+all_gather": (True, False, "gather"),
}


@dataclasses.dataclass(frozen=True)
class Split:
    """How a run is split over a cluster; the words are `ParallelConfig`'s and `ModelConfig`'s."""

    dp: int = 1
    tp: int = 1
    cp_outer: int = 1
    cp_inner: int = 1
    comm_type: str = "a2a+p2p"
    remat: str = "attention"
    fsdp: bool = True

    @property
    def cp(self) -> int:
        """C."""
        return self.cp_outer * self.cp_inner

    @property
    def exchange(self) -> int:
        """Devices that exchange heads."""
        inner, outer, _ = _STRATEGY[self.comm_type]
        return (self.cp_inner if inner else 1) * (self.cp_outer if outer else 1)

    @property
    def move(self) -> int:
        """Devices that K and V move over."""
        return self.cp // self.exchange

    @property
    def by(self) -> str:
        """How K and V move: "ring" or "gather"."""
        return _STRATEGY[self.comm_type][2]

    def __str__(self) -> str:
        cp = f"cp {self.cp} [{self.cp_inner} in, {self.cp_outer} out]"
        shard = "fsdp" if self.fsdp else "replicated"
        return f"dp {self.dp}, tp {self.tp}, {cp} {self.comm_type}, remat {self.remat}, {shard}"


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One kind of transfer in a step.

    Attributes:
        what: in words.
        axes: mesh axes it runs over.
        link: "inside a host" or "between hosts".
        bytes: that one device sends in a step.
        seconds: that they take.
        exposed: seconds of them in which the device waits.
    """

    what: str
    axes: tuple[str, ...]
    link: str
    bytes: float
    seconds: float
    exposed: float

    def times(self, n: int) -> "Transfer":
        """This transfer, n times."""
        return Transfer(
            self.what, self.axes, self.link, n * self.bytes, n * self.seconds, n * self.exposed
        )


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A step's modelled cost on the busiest device.

    Attributes:
        compute: seconds by part.
        transfers: what moves.
        flops: of the model in a step, on one device, as MFU counts them (`step_flops`).
        attention_flops: attention's part of them.
        tokens: in a step, of all devices.
        gpus: number of devices.
        peak: FLOP/s of one, by data sheet.
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
        """Seconds in which it sends, hidden or not."""
        return sum(transfer.seconds for transfer in self.transfers)

    @property
    def exposed_s(self) -> float:
        """Seconds in which it waits."""
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
        """Share of the peak that the model's own FLOPs make."""
        return self.flops / self.step_s / self.peak

    def bytes_on(self, link: str) -> float:
        """Bytes that a device sends over a kind of link in a step."""
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
    """What one optimizer step costs.

    Args:
        model: the decoder.
        split: sizes of the mesh, comm type, remat policy; must be valid for the model.
        cluster: whose GPU count is the mesh's.
        seq_len: T, tokens of a row, padding included.
        rows: streams of each data-parallel replica in a step.
        implementation: of the attention core, whose rate is taken.
    """
    t = rows * seq_len // split.cp
    attention = _Attention(model, split, cluster, seq_len, rows, implementation)
    again = 0 if split.remat == "none" else 1
    layers = model.num_layers * model.layer_params / split.tp
    head = model.head_params / split.tp
    # The output head's logits are always made again: they are never kept.
    products = 2.0 * t * (layers * (3 + again) + head * 4)
    bandwidth = cluster.gpu.memory_bandwidth
    shards = split.dp * split.cp if split.fsdp else 1
    compute = {
        "matmul": products / cluster.gpu.product_rate.value,
        "attention": model.num_layers * attention.compute_s,
        "memory-bound": model.num_layers * _elementwise_bytes(model, split, t) / bandwidth,
        "optimizer": 28 * model.params / split.tp / shards / bandwidth,
    }
    transfers = [
        *(x.times(model.num_layers) for x in attention.transfers),
        *_tensor_parallel(model, split, cluster, t),
        *_weights_and_gradients(model, split, cluster, sum(compute.values())),
    ]
    tokens = split.dp * rows * seq_len
    pairs = split.dp * rows * float(stream_pairs(model, seq_len, 1).sum())
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
    """What a collective along some mesh axes runs over: the slowest of its groups."""
    order = ("dp", "cp_outer", "cp_inner", "tp")
    mesh = np.arange(cluster.size).reshape([getattr(split, axis) for axis in order])
    along = [order.index(axis) for axis in axes]
    groups = np.moveaxis(mesh, along, range(-len(along), 0))
    groups = groups.reshape(-1, int(np.prod([mesh.shape[i] for i in along])))
    # Groups that spread over hosts alike have the same path: a large mesh has few kinds of them.
    spread = groups // cluster.domain
    kinds = {row.tobytes(): i for i, row in enumerate(spread - spread[:, :1])}
    chosen = groups[list(kinds.values())].tolist()
    return min((cluster.path(kind, tuple(group)) for group in chosen), key=lambda p: p.rate)


@functools.lru_cache(maxsize=64)
def stream_pairs(mask_of: ModelShape, seq_len: int, chunks: int) -> np.ndarray:
    """Return `chunk_pairs` of a model's mask, `[chunks, chunks]`, without touching T tokens."""
    return causal_chunk_pairs(seq_len, chunks, mask_of.sliding_window)


@functools.lru_cache(maxsize=256)
def _busiest_by_hop(mask_of: ModelShape, seq_len: int, cp: int, move: int) -> np.ndarray:
    """Return the visible pairs of the busiest ring rank at each hop, in zigzag, `[hops]`."""
    return pairs_by_hop(stream_pairs(mask_of, seq_len, 2 * cp), cp, "zigzag", move).max(axis=0)


class _Attention:
    """One layer's attention, forward and backward, with what it recomputes."""

    def __init__(self, model, split, cluster, seq_len, rows, implementation):
        self.model, self.split, self.cluster, self.rows = model, split, cluster, rows
        exchange = split.exchange
        per_tp = model.num_kv_heads // split.tp
        replicas = exchange // int(np.gcd(per_tp, exchange))
        self.heads = model.num_heads // split.tp // exchange
        self.kv_heads = per_tp * replicas // exchange
        self.t = rows * seq_len // split.cp  # tokens of a device, between the exchanges' outsides
        per_pair = 4.0 * model.head_size * self.heads * rows
        # All devices wait for the one that has most to do at a hop.
        flops = per_pair * _busiest_by_hop(model, seq_len, split.cp, split.move)
        gpu = cluster.gpu
        self.forward_hops = flops / gpu.attention_rate(implementation, "forward").value
        backward = gpu.attention_rate(implementation, "backward").value
        self.backward_hops = BACKWARD * flops / backward
        self.forwards = 2 if split.remat == "full" else 1
        # Partials are merged, and gradients added up, in float32, hop by hop.
        merged = 12.0 * self.t * exchange * self.heads * model.head_size
        self.merge_s = (split.move - 1 if split.by == "ring" else 0) * merged / gpu.memory_bandwidth

    @property
    def compute_s(self) -> float:
        return (
            self.forwards * (float(self.forward_hops.sum()) + self.merge_s)
            + float(self.backward_hops.sum())
            + self.merge_s
        )

    @property
    def transfers(self) -> list[Transfer]:
        return [*self._moves(), *self._exchanges()]

    def _moves(self) -> list[Transfer]:
        split = self.split
        if split.move == 1:
            return []
        axes = ("cp_outer", "cp_inner") if split.exchange == 1 else ("cp_outer",)
        values = 2.0 * self.t * split.exchange * self.kv_heads * self.model.head_size
        if split.by == "gather":
            link, rate, latency = path(self.cluster, split, axes, "all-gather")
            sent = (split.move - 1) * values * (2 * (self.forwards + 1) + 4)
            seconds = sent / rate + 3 * latency
            what = "K/V gathered, gradients scattered"
            return [Transfer(what, axes, link, sent, seconds, seconds)]
        link, rate, latency = path(self.cluster, split, axes, "collective-permute")
        moves = []
        for what, hops, size, passes in (
            ("K/V round the ring, forward", self.forward_hops, 2 * values, self.forwards),
            ("K/V and their gradients, backward", self.backward_hops, 6 * values, 1),
        ):
            one = size / rate + latency
            exposed = sum(max(0.0, one - hop) for hop in hops[:-1])
            count = passes * (split.move - 1)
            moves.append(Transfer(what, axes, link, count * size, count * one, passes * exposed))
        return moves

    def _exchanges(self) -> list[Transfer]:
        split, model = self.split, self.model
        if split.exchange == 1:
            return []
        axes = ("cp_inner",) if split.comm_type != "a2a" else ("cp_outer", "cp_inner")
        link, rate, latency = path(self.cluster, split, axes, "all-to-all")
        share = (split.exchange - 1) / split.exchange
        width = share * 2.0 * self.t * model.head_size * split.exchange
        inwards = width * (
            self.heads + 2 * self.kv_heads
        )  # q, k, v; or dq, dk, dv on their way back
        outwards = width * self.heads  # out, or its cotangent
        again = 0 if split.remat == "none" else 1
        sent = (2 + again) * inwards + (2 + (self.forwards - 1)) * outwards
        calls = 8 + 3 * again
        seconds = sent / rate + calls * latency
        return [Transfer("heads exchanged for sequence", axes, link, sent, seconds, seconds)]


def _elementwise_bytes(model: ModelShape, split: Split, t: int) -> float:
    """Bytes that a layer's norms, rotations, residuals and activations read and write."""
    heads = (model.num_heads + model.num_kv_heads) * model.head_size / split.tp
    forward = (
        2.0 * t * (10 * model.hidden_size + 4 * heads + 3 * model.intermediate_size / split.tp)
    )
    return forward * (3 if split.remat == "none" else 4)


def _tensor_parallel(model, split, cluster, t) -> list[Transfer]:
    link, rate, latency = path(cluster, split, ("tp",), "all-reduce")
    again = 0 if split.remat == "none" else 1
    # The second sum of a layer made again is of no use to its backward.
    sums = model.num_layers * (4 + again)
    sent = sums * 2 * (split.tp - 1) / split.tp * 2.0 * t * model.hidden_size
    seconds = sent / rate + sums * latency
    return [Transfer("activations summed over tp", ("tp",), link, sent, seconds, seconds)]


def _weights_and_gradients(model, split, cluster, compute_s: float) -> list[Transfer]:
    axes = ("dp", "cp_outer", "cp_inner")
    link, rate, latency = path(cluster, split, axes, "all-gather")
    group = split.dp * split.cp
    share = (group - 1) / group * model.params / split.tp
    if not split.fsdp:
        sent = 2 * 4.0 * share
        seconds = sent / rate + latency
        return [Transfer("gradients summed", axes, link, sent, seconds, seconds)]
    gathers = 2 if split.remat == "none" else 3
    sent = gathers * 2.0 * share + 4.0 * share
    calls = model.num_layers * (gathers + 1)
    seconds = sent / rate + calls * latency
    exposed = max(0.0, seconds - compute_s)
    what = "weights gathered, gradients scattered"
    return [Transfer(what, axes, link, sent, seconds, exposed)]


def hops_hidden(estimated: Estimate) -> bool:
    """Whether every ring hop is hidden."""
    return all(x.exposed == 0 for x in estimated.transfers if "ring" in x.what)
