"""Model the memory of a training step: permanent buffers plus those of the peak moment.

Parameters, gradients and the optimizer's moments are float32; activations have the compute dtype.
Memory peaks in the loss or in the backward pass of a layer, whichever needs more:

    state         parameters and two moments, cut over tp (and over dp and cp by FSDP)
    kept          what each layer keeps for its backward pass, by remat policy
    hidden        the hidden states between the layers and the loss, and their gradients
    vocabulary    the loss: the gathered head, its gradient before it is scattered, logits
    gradients     of the layers, as the scan stacks them
    layer         one layer's weights and gradients, whole, and its activations in backward
    stages        of a pipeline: inputs of chunks until their backward pass, and sums of gradients

A stage of a pipeline computes a chunk again before its backward pass, so it keeps what the layers
of one chunk keep, for one microbatch. Experts are cut over ep: a device has rows for a quarter more
than its even share.

Offloading and computing in chunks (docs/memory.md) are not modelled; `hcp audit` shows their
effect. `hcp plan --verify` replaces these figures by those of the compiled program.
"""

import dataclasses
from typing import get_args

from hcp_jax.cost import stages
from hcp_jax.cost.experts import ROOM
from hcp_jax.cost.shape import ModelShape
from hcp_jax.cost.split import Split
from hcp_jax.cost.traffic import Remat
from hcp_jax.cost.weights import device_weights

USABLE = 0.9  # share of the memory; the rest is left for CUDA, NCCL and fragmentation


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one device, by purpose."""

    state: float
    kept: float
    hidden: float
    vocabulary: float
    gradients: float
    layer: float
    stages: float = 0.0

    @property
    def peak(self) -> float:
        """Bytes of the permanent buffers and of the larger of the two moments."""
        moments = self.vocabulary, self.gradients + self.layer
        # In a tick, the loss of one microbatch and layers' backward of another lie side by side.
        moment = sum(moments) if self.stages else max(moments)
        return self.state + self.kept + self.hidden + self.stages + moment


def estimate_memory(model: ModelShape, split: Split, seq_len: int, rows: int = 1) -> MemoryEstimate:
    """Return the modelled memory of one device.

    Args:
        model: shape of the decoder.
        split: split of the run over the cluster.
        seq_len: T.
        rows: streams of each data-parallel replica in a microbatch.
    """
    t = rows * seq_len / split.cp
    stage = stages.cut(model, split.pp, split.virtual_stages)
    assert stage is not None, split
    kinds = stage.by_kind
    # One number for each of these weights; with FSDP, of the device's part.
    held = sum(own.params / own.shards for own in device_weights(model, stage, split))
    chunk = sum(kind.num_layers * _kept(kind, split, t) for kind in kinds) / split.virtual_stages
    return MemoryEstimate(
        state=12.0 * held,
        kept=chunk,
        # Those of each depth of multi-token prediction live beside the model's own.
        hidden=(1 + model.mtp_depths) * 4 * 2.0 * t * model.hidden_size,
        vocabulary=_vocabulary(model, split, t),
        gradients=4.0 * _layer_weights(stage, split) / split.virtual_stages,
        layer=max(_layer(kind, split, t) for kind in kinds),
        stages=_stages(model, split, t, held),
    )


def _layer_weights(stage: ModelShape, split: Split) -> float:
    """Return the weights of the layers of a device; with FSDP, of its part."""
    experts = stage.experts_params / split.ep
    shards = split.dp * split.cp if split.fsdp else 1
    rest = (stage.held_params - stage.experts_params) / shards
    return (rest + experts / max(1, shards // split.ep)) / split.tp


def _stages(model: ModelShape, split: Split, t: float, held: float) -> float:
    """Return the bytes that live from tick to tick: inputs, what is sent, sums of gradients."""
    if split.pp == 1:
        return 0.0
    inputs = stages.kept_inputs(split.pp, split.virtual_stages) + 2
    return inputs * 2.0 * t * model.hidden_size + 4.0 * held


def remat_that_fits(
    model: ModelShape,
    split: Split,
    seq_len: int,
    rows: int,
    memory_bytes: float,
    among: tuple[Remat, ...] = get_args(Remat),
) -> Remat:
    """Return the policy that recomputes the least and fits by the model of memory.

    Args:
        model: shape of the decoder.
        split: split of the run over the cluster; its policy is not used.
        seq_len: T.
        rows: streams of each data-parallel replica in a microbatch.
        memory_bytes: memory of a GPU, of which nine tenths are used.
        among: the policies to choose from, those that recompute less first; the last one is taken
            if none fits.

    >>> from hcp_jax.cost.models import model_shape
    >>> one, split = model_shape("llama3-8b"), Split(cp_outer=8, cp_inner=8)
    >>> [remat_that_fits(one, split, 2**20, 1, gib * 2**30) for gib in (141, 80, 40, 12)]
    ['mlp', 'mlp', 'projections', 'full']
    """
    for remat in among:
        tried = dataclasses.replace(split, remat=remat)
        if estimate_memory(model, tried, seq_len, rows).peak <= USABLE * memory_bytes:
            return remat
    return among[-1]


def _kept(model: ModelShape, split: Split, t: float) -> float:
    """Return the bytes that a layer keeps for its backward pass over t tokens."""
    heads = model.query_width / split.tp
    inputs = 2.0 * t * model.hidden_size
    outputs = t * (2.0 * heads + 4.0 * _lse_heads(model) / split.tp)
    if split.remat == "full":
        return inputs
    if split.remat == "attention":
        return inputs + outputs
    projected = 2.0 * t * heads + 2.0 * t * 2 * _kv_width(model, split) + inputs
    if split.remat == "projections":
        return inputs + outputs + projected
    if split.remat == "mlp":
        products = 2.0 * t * (model.mlp_products - 1) * model.intermediate_size / split.tp
        return inputs + outputs + projected + products
    # These counts come from compiled programs: norms and rotations also keep float32 copies.
    kv_heads = 2.0 * t * 2 * _kv_width(model, split)
    mlp = 2.0 * t * (model.mlp_products + 1) * model.intermediate_size / split.tp
    return 14 * inputs + 2.0 * t * 10 * heads + kv_heads + mlp + _recurrent(model, split, t)


def _lse_heads(model: ModelShape) -> int:
    """Return the heads that keep a log-sum-exp: none in layers that do not attend."""
    return model.num_heads if model.head_size else 0


def _recurrent(model: ModelShape, split: Split, t: float) -> float:
    """Return the bytes of a recurrent layer's chunks and of its convolved arrays."""
    if model.recurrence is None:
        return 0.0
    convolved = 3 * 2.0 * model.recurrence.channels
    return t * (model.recurrence.chunk_bytes + convolved) / split.tp


def _kv_width(model: ModelShape, split: Split) -> float:
    """Return a device's kv heads times the head size, with the replicas for the exchange."""
    return max(model.num_kv_heads / split.tp, split.exchange) * model.head_size


def _vocabulary(model: ModelShape, split: Split, t: float) -> float:
    matrix = model.head_params / split.tp / split.pp
    logits = 12.0 * min(model.loss_chunk, t) * model.vocab_size / split.tp / split.pp
    gathered = 4.0 * matrix if split.fsdp else 2.0 * matrix
    return logits + gathered + 4.0 * matrix


def _layer(model: ModelShape, split: Split, t: float) -> float:
    heads = model.query_width / split.tp
    kv = _kv_width(model, split)
    ring = 4 if split.strategy.by == "ring" and split.move > 1 else split.move
    attention = t * (heads * (4 * 2 + 2 * 4) + kv * ring * (2 * 2 + 4 * 2))
    width = (model.mlp_products + 1) * model.intermediate_size / split.tp
    mlp = 2.0 * t * (width + 4 * model.hidden_size)
    weights = float(model.layer_params + model.idle_params)
    if (experts := model.experts) is not None:
        weights -= (1 - 1 / split.ep) * experts.params(model.hidden_size)
        mlp += _expert_rows(model, split, t)
    return max(attention, mlp, 2 * _recurrent(model, split, t)) + 6.0 * weights / split.tp


def _expert_rows(model: ModelShape, split: Split, t: float) -> float:
    """Return the bytes of the rows of a layer's experts, in backward."""
    assert model.experts is not None
    rows = t * model.experts.per_token
    # In order of experts, sent and received, each with its gradient; in bfloat16.
    copies = 4 * ROOM + 2 if split.ep > 1 else 2
    return 2.0 * rows * model.hidden_size * copies
