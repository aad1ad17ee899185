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

from hcp_jax.cost.mixers import AttentionCost, RecurrentCost, stream_pairs
from hcp_jax.cost.shape import ModelShape, step_flops
from hcp_jax.cost.split import Split, Transfer, path
from hcp_jax.cost.traffic import (
    sent_bytes,
    state_bytes,
)
from hcp_jax.hardware import NO_LINK, Cluster


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
        (kind.num_layers, AttentionCost(kind, split, cluster, seq_len, rows, implementation))
        for kind in model.by_kind
        if kind.recurrence is None
    ]
    recurrent = [
        (kind.num_layers, RecurrentCost(kind.recurrence, split, cluster, t, rows))
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


def mean_pairs(model: ModelShape, seq_len: int) -> float:
    """Return the visible pairs of a stream, as the mean over the layers that `step_flops` takes."""
    kinds = model.by_kind
    widths = [kind.num_layers * kind.query_width for kind in kinds]
    pairs = [float(stream_pairs(kind, seq_len, 1).sum()) for kind in kinds]
    if len(kinds) == 1 or not sum(widths):
        return pairs[0]
    return sum(w * p for w, p in zip(widths, pairs, strict=True)) / sum(widths)


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
