"""Model the stages of a pipeline: their layers, and the ticks in which they wait for each other.

Stages run in lockstep (`dynamic/pipeline.py`), and hold whole periods of a model's pattern of
layers (`pipeline/stages.py`); if the layers do not divide, the last chunks are filled with layers
of zeros, which take time.
"""

import dataclasses

from hcp_jax.cost.shape import ModelShape
from hcp_jax.cost.traffic import Traffic


def refusal(model: ModelShape) -> str | None:
    """Return why a model has no pipeline, in words; None if it has one."""
    if not model.period:
        return "its layers repeat no pattern"
    if model.mtp_depths:
        return "the planner does not model multi-token prediction in a pipeline"
    if any(kind.recurrence for kind in model.by_kind):
        return "the planner does not model recurrent layers in a pipeline"
    return None


def cut(model: ModelShape, num_stages: int, virtual_stages: int = 1) -> ModelShape | None:
    """Return the shape of one stage, with its layers of zeros; None if it cannot be cut so.

    Its vocabulary is the whole one.

    Args:
        model: shape of the decoder.
        num_stages: pp.
        virtual_stages: v, the chunks of a stage.

    >>> tiny = ModelShape(64, 7, 16, 32, 4, 2, 4)
    >>> cut(tiny, 4).num_layers, cut(tiny, 4, 2)  # a chunk of the latter would have no layer
    (2, None)
    """
    if num_stages == 1:
        return model if virtual_stages == 1 else None
    if refusal(model) is not None or model.vocab_size % num_stages:
        return None
    chunks, periods = num_stages * virtual_stages, -(-model.num_layers // model.period)
    turns = -(-periods // chunks)
    if chunks * turns - periods >= turns:
        return None
    if any(k.experts for k in model.by_kind) and chunks * turns * model.period != model.num_layers:
        return None  # routers of layers of zeros would count in the losses
    kinds = (
        dataclasses.replace(kind, count=kind.in_period * turns * virtual_stages)
        for kind in model.kinds
    )
    layers = turns * virtual_stages * model.period
    return dataclasses.replace(model, num_layers=layers, kinds=tuple(kinds))


def lockstep(microbatches: int, num_stages: int, virtual_stages: int = 1) -> tuple[float, float]:
    """Return how long the ticks of equal microbatches last, and how many have both passes.

    Args:
        microbatches: m.
        num_stages: pp.
        virtual_stages: v.

    Returns:
        The first in times of one microbatch on one stage, m + (pp - 1) / v if pp divides m or v is
        1; the second in numbers of ticks, each of which computes the loss.

    >>> lockstep(6, 4), lockstep(8, 4, 2)
    ((9.0, 6), (9.5, 12))
    """
    pp, v = num_stages, virtual_stages
    groups = -(-microbatches // pp)
    last = microbatches - (groups - 1) * pp
    return groups * pp + (last - 1) / v, (groups - 1) * v * pp + last


def kept_inputs(num_stages: int, virtual_stages: int = 1) -> int:
    """Return how many inputs of chunks a stage keeps at most, for many microbatches.

    >>> kept_inputs(4), kept_inputs(4, 2)
    (7, 11)
    """
    return virtual_stages * num_stages + num_stages - 1


def with_recomputed_chunks(traffic: tuple[Traffic, ...]) -> tuple[Traffic, ...]:
    """Return a layer's traffic in a pipeline, whose backward pass computes each chunk again."""
    again = (
        dataclasses.replace(one, direction="backward", repeated=True)
        for one in traffic
        if one.direction == "forward"
    )
    return (*traffic, *again)
