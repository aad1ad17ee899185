"""Count the weights of one device, and estimate how they and their gradients travel."""

from collections.abc import Iterator
from typing import NamedTuple

from hcp_jax.cost.shape import ModelShape
from hcp_jax.cost.split import FLAT_AXES, Split, Transfer, path
from hcp_jax.cost.traffic import state_bytes
from hcp_jax.hardware import Cluster


class Weights(NamedTuple):
    """Weights that are cut alike.

    Attributes:
        what: "weights", or "experts' weights".
        axes: mesh axes along which each device has the same ones, or with FSDP a part of them.
        params: number of weights of one device, all of these axes together.
        shards: number of parts that FSDP cuts them into; 1 without.
    """

    what: str
    axes: tuple[str, ...]
    params: float
    shards: int


def device_weights(model: ModelShape, stage: ModelShape, split: Split) -> tuple[Weights, ...]:
    """Return the weights of one device.

    Args:
        model: shape of the decoder.
        stage: shape of one of its stages (`stages.cut`); the decoder itself without a pipeline.
        split: split of the run.
    """
    experts = stage.experts_params
    embeddings = model.head_params * (1 if model.tie_embeddings else 2)
    norms = (2 * stage.num_layers + 1 + 5 * stage.mtp_depths) * model.hidden_size
    dense = stage.held_params - experts + embeddings / split.pp + norms

    def one(what: str, axes: tuple[str, ...], params: float) -> Weights:
        shards = 1
        for axis in axes:
            shards *= getattr(split, axis)
        return Weights(what, axes, params, shards if split.fsdp else 1)

    whole = one("weights", FLAT_AXES, dense / split.tp)
    if not experts:
        return (whole,)
    free = tuple(axis for axis in FLAT_AXES if axis not in split.expert_axes)
    return whole, one("experts' weights", free, experts / split.tp / split.ep)


def weight_transfers(
    weights: tuple[Weights, ...],
    layers: int,
    split: Split,
    cluster: Cluster,
    compute_s: float,
    microbatches: int,
) -> Iterator[Transfer]:
    """Yield the transfers of a step that gather weights and sum gradients over dp and cp.

    Gradients are summed once a step (for each microbatch, where a pipeline has ep). With FSDP,
    weights are gathered and gradients scattered for every microbatch, hidden behind the layers as
    long as these last.

    Args:
        weights: weights of one device.
        layers: number of layers of one device.
        split: split of the run.
        cluster: the cluster.
        compute_s: seconds of computation of all microbatches.
        microbatches: number of microbatches.
    """
    gathers = 1 + split.forwards
    # What one transfer leaves of the compute can hide the next one.
    for own in weights:
        copies = 1
        for axis in own.axes:
            copies *= getattr(split, axis)
        link, rate, latency = path(cluster, split, own.axes, "all-gather")
        sent = state_bytes(own.params, copies, 2, fsdp=split.fsdp, gathers=gathers)
        if not split.fsdp:
            times = microbatches if split.pp > 1 and split.ep > 1 else 1
            sent, seconds = times * sent, times * (sent / rate + latency)
            what = "gradients summed" if own.what == "weights" else "experts' gradients summed"
            yield Transfer(what, own.axes, link, sent, seconds, seconds)
            continue
        calls = layers * (gathers + 1)
        seconds = microbatches * (sent / rate + calls * latency)
        exposed = max(0.0, seconds - compute_s)
        compute_s = max(0.0, compute_s - seconds)
        what = f"{own.what} gathered, gradients scattered"
        yield Transfer(what, own.axes, link, microbatches * sent, seconds, exposed)


def optimizer_seconds(weights: tuple[Weights, ...], cluster: Cluster) -> float:
    """Return the seconds in which a device updates its weights.

    Parameters, gradients and two moments in float32 are read; all but the gradients are written.
    """
    held = sum(own.params / own.shards for own in weights)
    return 28 * held / cluster.gpu.memory_bandwidth
