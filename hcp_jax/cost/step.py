"""Estimate FLOPs, bytes and seconds of a training step on a cluster, without compiling it.

FLOPs are counted: those of attention from the mask's intervals (`pairs.py`), those of the matrix
products from their shapes. The rates of `hcp_jax.hardware` turn them into seconds. The overlap
follows audits of compiled programs: ring hops hide behind attention and FSDP's gathers behind the
layers, as long as the compute lasts; all-to-alls of heads and of experts' rows, gathers of K and V,
tensor-parallel sums, and the sum of gradients without FSDP are fully exposed. `traffic.py` lists
what attention moves, `experts.py` what experts move.

In a pipeline (`stages.py`), a device computes the layers of its stage and its part of the
vocabulary for every microbatch, computes its layers once more in backward, and waits in the ticks
that fill and drain the pipeline (the bubble). Sends between stages hide behind a tick; sums over
the stages, of embeddings and outputs, do not.

A step on one device, with t = T / C tokens of each of its rows:

    recurrence    chunks' matrix products, and their arrays read and written
    matmul        2 · parameters · t forward, twice that backward, once more where recomputed
    attention     4 · H · heads · pairs forward, 2.5 times that backward
    memory-bound  reads and writes of norms, activations, merging of partials, optimizer
    transfers     bytes at the rate of the link, plus a latency
"""

import dataclasses
from collections.abc import Iterator

from hcp_jax.cost import stages
from hcp_jax.cost.experts import dispatch_traffic
from hcp_jax.cost.mixers import AttentionCost, RecurrentCost, alone_cost, stream_pairs
from hcp_jax.cost.shape import ModelShape, step_flops
from hcp_jax.cost.split import Split, Transfer, path
from hcp_jax.cost.traffic import sent_bytes
from hcp_jax.cost.weights import device_weights, optimizer_seconds, weight_transfers
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
        bubble_s: seconds in which the device waits for other stages of a pipeline.
    """

    compute: dict[str, float]
    transfers: tuple[Transfer, ...]
    flops: float
    attention_flops: float
    tokens: int
    gpus: int
    peak: float
    bubble_s: float = 0.0

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
        return self.compute_s + self.exposed_s + self.bubble_s

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
    microbatches: int = 1,
    implementation: str = "triton",
) -> Estimate:
    """Return the modelled cost of one optimizer step.

    Args:
        model: shape of the decoder.
        split: mesh sizes, comm type and remat policy; must be valid for the model.
        cluster: cluster with as many GPUs as the mesh has devices.
        seq_len: T, tokens of a row, with padding.
        rows: streams of each data-parallel replica in a microbatch.
        microbatches: number of microbatches in a step.
        implementation: implementation of the attention core, whose rates are used.

    Raises:
        ValueError: if the model cannot be cut into these stages.
    """
    stage = stages.cut(model, split.pp, split.virtual_stages)
    if stage is None:
        why = stages.refusal(model) or "its layers or its vocabulary do not divide"
        raise ValueError(f"{split} is no split of this model: {why}.")
    t = rows * seq_len // split.cp
    attention = [
        (kind.num_layers, AttentionCost(kind, split, cluster, seq_len, rows, implementation))
        for kind in stage.by_kind
        if kind.recurrence is None
    ]
    recurrent = [
        (kind.num_layers, RecurrentCost(kind.recurrence, split, cluster, t, rows))
        for kind in stage.by_kind
        if kind.recurrence is not None
    ]
    bandwidth, rate = cluster.gpu.memory_bandwidth, cluster.gpu.product_rate.value
    again = sum(k.num_layers * k.repeated_params(split.remat) for k in stage.by_kind)
    # Stages of a pipeline run the forward pass once more.
    products = stage.layers_params * (3 + (split.pp > 1)) + again
    layers_s = 2.0 * t * products / split.tp / rate
    # The output head is always recomputed in backward: its logits are never kept.
    head = (1 + model.mtp_depths) * model.head_params / split.tp / split.pp
    head_s = 2.0 * t * head * 4 / rate
    elementwise = (kind.num_layers * _elementwise_bytes(kind, split, t) for kind in stage.by_kind)
    parts = {  # of one microbatch
        "matmul": layers_s + head_s,
        "attention": sum(n * one.compute_s for n, one in attention),
        "memory-bound": sum(elementwise) / bandwidth,
        **({"recurrence": sum(n * one.compute_s for n, one in recurrent)} if recurrent else {}),
    }
    each = [
        *(x.times(n) for n, one in attention for x in one.transfers),
        *(x.times(n) for n, one in recurrent for x in one.transfers),
        *_tensor_parallel(stage, split, cluster, t),
        *_experts(stage, split, cluster, t),
        *_between_stages(model, split, cluster, t, sum(parts.values())),
    ]
    duration, ticks = stages.lockstep(microbatches, split.pp, split.virtual_stages)
    of_layers = sum(parts.values()) - head_s + sum(x.exposed for x in each)
    weights = device_weights(model, stage, split)
    compute = {part: microbatches * seconds for part, seconds in parts.items()}
    compute["optimizer"] = optimizer_seconds(weights, cluster)
    transfers = [
        *(x.times(microbatches) for x in each),
        *weight_transfers(
            weights, stage.computed_layers, split, cluster, sum(compute.values()), microbatches
        ),
    ]
    tokens = split.dp * rows * microbatches * seq_len
    pairs = split.dp * rows * microbatches * mean_pairs(model, seq_len)
    return Estimate(
        compute=compute,
        transfers=tuple(x for x in transfers if x.link != NO_LINK),
        flops=step_flops(model, tokens, pairs) / cluster.size,
        attention_flops=step_flops(model, 0, pairs) / cluster.size,
        tokens=tokens,
        gpus=cluster.size,
        peak=cluster.gpu.peak_flops,
        bubble_s=(duration - microbatches) * of_layers + (ticks - microbatches) * head_s,
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
    return forward * (2 + split.forwards)


def _tensor_parallel(model: ModelShape, split: Split, cluster: Cluster, t: int) -> list[Transfer]:
    """Return the sums of activations over tp, for all layers."""
    link, rate, latency = path(cluster, split, ("tp",), "all-reduce")
    # The second sum of a layer that is computed again is not needed, except by the next layers of a
    # pipeline's chunk; some policies keep the first.
    again = split.remat in ("attention", "full")
    sums = model.computed_layers * (4 + again + 2 * (split.pp > 1))
    sent = sums * sent_bytes("all-reduce", 2.0 * t * model.hidden_size, split.tp)
    seconds = sent / rate + sums * latency
    return [Transfer("activations summed over tp", ("tp",), link, sent, seconds, seconds)]


def _experts(stage: ModelShape, split: Split, cluster: Cluster, t: int) -> Iterator[Transfer]:
    """Yield the transfers of rows to their experts and back, which nothing hides."""
    for kind in stage.by_kind:
        if kind.experts is None:
            continue
        moves = dispatch_traffic(
            split.expert_axes,
            split.ep,
            rows=t * kind.experts.per_token,
            width=kind.hidden_size,
            item_bytes=2,
            remat=split.remat,
        )
        if moves:
            what = "rows sent to their experts and back"
            alone = alone_cost(cluster, split, list(moves))
            yield Transfer(what, split.expert_axes, *alone).times(kind.num_layers)


def _between_stages(
    model: ModelShape, split: Split, cluster: Cluster, t: int, compute_s: float
) -> Iterator[Transfer]:
    """Yield the transfers between stages for one microbatch, whose compute lasts `compute_s`."""
    if split.pp == 1:
        return
    ticks, size = split.virtual_stages, 2.0 * t * model.hidden_size
    link, rate, latency = path(cluster, split, ("pp",), "collective-permute")
    one = size / rate + latency
    exposed = ticks * max(0.0, 2 * one - compute_s / ticks)
    what = "activations and gradients sent to the next stage"
    yield Transfer(what, ("pp",), link, 2 * ticks * size, 2 * ticks * one, exposed)
    # The embedding, the last stage's output, and the gradients of both.
    link, rate, latency = path(cluster, split, ("pp",), "all-reduce")
    sent = 4 * ticks * sent_bytes("all-reduce", size, split.pp)
    seconds = sent / rate + 4 * ticks * latency
    yield Transfer("embeddings and outputs summed over pp", ("pp",), link, sent, seconds, seconds)
