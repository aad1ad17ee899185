"""Describe what a step moves between devices, counted from shapes, before a run begins.

The counts are the bytes that one device sends for the algorithm (`cost/traffic.py`), without the
repetitions of a remat policy. `hcp audit` and `hcp verify` read the compiled program instead.
"""

from collections.abc import Iterator

from hcp_jax.cost import traffic
from hcp_jax.cost.shape import ModelShape
from hcp_jax.cost.traffic import (
    EXCHANGE_HEADS,
    EXPERT_DISPATCH,
    GATHER_KV,
    HALO,
    ITEM_BYTES,
    RING_HOP,
    STATE_SCAN,
    Traffic,
)
from hcp_jax.models.config import ModelConfig
from hcp_jax.models.layers.moe_dispatch import Dispatch
from hcp_jax.models.specs import Mixer
from hcp_jax.parallel.context import ContextParallel


def layer_traffic(
    cp: ContextParallel, mixer: Mixer, batch_size: int, seq_len: int
) -> tuple[Traffic, ...]:
    """List what one layer's mixer moves, without what a remat policy repeats.

    Args:
        cp: the context parallelism, with the layer's own comm type.
        mixer: spec of the layer's mixer.
        batch_size: streams per step, over all of dp.
        seq_len: tokens per stream.
    """
    return mixer.traffic(cp, rows=batch_size, tokens=cp.padded_length(seq_len))


def describe(
    cp: ContextParallel,
    model: ModelConfig,
    batch_size: int,
    seq_len: int,
    num_params: int,
    *,
    fsdp: bool = False,
) -> Iterator[str]:
    """Yield lines that say what each device sends in a step.

    Args:
        cp: the context parallelism, with one comm type or one per layer.
        model: the decoder.
        batch_size: streams per step, over all of dp.
        seq_len: tokens per stream.
        num_params: number of parameters of the model.
        fsdp: whether parameters and optimizer state are cut over dp and cp.
    """
    layers: dict[tuple[str, tuple[Traffic, ...]], list[int]] = {}
    for layer, spec in enumerate(model.specs):
        layer_cp = cp.for_layer(layer)
        moved = layer_traffic(layer_cp, spec.mixer, batch_size, seq_len)
        attends = spec.mixer.recurrence is None
        how = str(layer_cp.comm_type) if attends else spec.mixer.kind
        layers.setdefault((how, moved), []).append(layer)
    for (how, moved), numbers in layers.items():
        yield f"{_ranges(numbers)} ({how}), each: {_moved(moved)}"
    if model.mtp_depths:
        yield f"each depth of multi-token prediction: as layer {model.num_layers - 1}"
    if model.moe is not None and cp.ep > 1:
        yield f"layers with experts, each: {_experts(cp, model, batch_size, seq_len)}"
    copies = cp.size * cp.axis_size(cp.dp)
    if copies == 1:
        return
    share = num_params // cp.axis_size(cp.tp)
    # Each expert is on as many devices as there are of them over ep.
    experts = ModelShape.from_config(model).experts_params // cp.axis_size(cp.tp)
    sent = sum(
        traffic.state_bytes(part, over, ITEM_BYTES[model.compute_dtype], fsdp=fsdp)
        for part, over in ((share - experts, copies), (experts // cp.ep, copies // cp.ep))
    )
    what = "parameters, gathered twice, and gradients, summed" if fsdp else "gradients, summed"
    yield f"{what} over {copies} devices: {_bytes(sent)}"


def expert_traffic(
    cp: ContextParallel, model: ModelConfig, batch_size: int, seq_len: int
) -> tuple[Traffic, ...]:
    """List what one layer's experts move if the load is about even, as `layer_traffic` does."""
    if model.moe is None or cp.ep == 1:
        return ()
    tokens = batch_size // cp.axis_size(cp.dp) * cp.padded_length(seq_len) // cp.size
    rows = tokens * model.moe.num_experts_per_tok
    dispatch = Dispatch(cp.expert_axes, cp.ep, rows, model.moe.dispatch_parts)
    return dispatch.traffic(model.hidden_size, ITEM_BYTES[model.compute_dtype])


def _experts(cp: ContextParallel, model: ModelConfig, batch_size: int, seq_len: int) -> str:
    moved = expert_traffic(cp, model, batch_size, seq_len)
    forward, backward = (
        _bytes(traffic.total(moved, (EXPERT_DISPATCH,), direction))
        for direction in ("forward", "backward")
    )
    return f"rows {forward} forward, {backward} backward to {cp.ep} devices, if the load is even"


_WHAT = (
    ((EXCHANGE_HEADS,), "heads"),
    ((RING_HOP, GATHER_KV), "K/V"),
    ((HALO,), "halos"),
    ((STATE_SCAN,), "states"),
)


def _moved(moved: tuple[Traffic, ...]) -> str:
    """Return a phrase that says what a layer's mixer sends."""
    parts = []
    for scopes, name in _WHAT:
        found = [t for t in moved if t.scope in scopes]
        if not found:
            continue
        forward, backward = (
            _bytes(traffic.total(moved, scopes, direction)) for direction in ("forward", "backward")
        )
        parts.append(f"{name} {forward} forward, {backward} backward{_how(found[0])}")
    return "; ".join(parts) or "nothing"


def _how(first: Traffic) -> str:
    if first.scope in (EXCHANGE_HEADS, STATE_SCAN, HALO):
        return ""
    if first.scope == GATHER_KV:
        return " in one gather"
    return f" in {first.count} hop{'s' * (first.count > 1)}"


def _ranges(numbers: list[int]) -> str:
    """Return layer numbers as text: "layers 0-2, 5" for [0, 1, 2, 5]."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    shown = ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
    return f"layer {shown}" if len(numbers) == 1 else f"layers {shown}"


def _bytes(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:.4g} GiB"
