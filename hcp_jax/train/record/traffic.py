"""What a step moves between devices, counted from shapes; told before a run begins.

Counted is what the algorithm needs, in bytes that one device sends. What the compiler made of it is
in the compiled program (`hcp audit`, `hcp verify`). With r = A / gcd(K, A) replicas of each kv head
(A devices exchange heads, P move K and V):

    exchange   q, k, v in and out out, forward; their cotangents, backward: (A - 1) / A of each
    ring       K and V, P - 1 hops; backward K and V again, and dK and dV in float32, P - 1 each
    gather     the same bytes, in one collective
"""

import dataclasses
import math
from collections.abc import Iterator

from hcp_jax.context import ContextParallel
from hcp_jax.models.config import ModelConfig

_ITEM = {"float32": 4, "bfloat16": 2}


@dataclasses.dataclass(frozen=True)
class LayerTraffic:
    """Bytes that one device sends for one layer's attention in one step.

    Attributes:
        exchange: by all-to-alls, forward and backward each.
        forward: of K and V, by the ring or the gather.
        backward: of K, V, dK and dV, likewise.
        hops: ring hops forward; 1 for a gather, 0 where K and V stay.
    """

    exchange: int
    forward: int
    backward: int
    hops: int


def of_layer(
    cp: ContextParallel, model: ModelConfig, batch_size: int, seq_len: int
) -> LayerTraffic:
    """What one layer's attention moves, without what a remat policy repeats.

    Args:
        cp: with the layer's own comm type.
        model: the decoder.
        batch_size: streams per step, over all of dp.
        seq_len: tokens per stream.
    """
    exchange, move, by = cp.strategy
    groups, ring = cp.axis_size(exchange), cp.axis_size(move)
    tokens = batch_size // cp.axis_size(cp.dp) * cp.padded_length(seq_len) // cp.size
    tp, item = cp.axis_size(cp.tp), _ITEM[model.compute_dtype]
    heads, kv_heads = model.num_heads // tp, model.num_kv_heads // tp
    kv_heads *= groups // math.gcd(kv_heads, groups)
    kv_items = 2 * tokens * kv_heads * model.head_dim
    exchanged = (2 * tokens * heads * model.head_dim + kv_items) * item
    return LayerTraffic(
        exchange=exchanged * (groups - 1) // groups,
        forward=kv_items * item * (ring - 1),
        backward=kv_items * (item + 4) * (ring - 1),
        hops=0 if ring == 1 else 1 if by == "gather" else ring - 1,
    )


def describe(
    cp: ContextParallel,
    model: ModelConfig,
    batch_size: int,
    seq_len: int,
    num_params: int,
    *,
    fsdp: bool = False,
) -> Iterator[str]:
    """Lines that tell what each device sends in a step.

    Args:
        cp: the context parallelism, with one comm type or one per layer.
        model: the decoder.
        batch_size: streams per step, over all of dp.
        seq_len: tokens per stream.
        num_params: parameters of the model.
        fsdp: parameters and optimizer state are cut over dp and cp.
    """
    layers: dict[ContextParallel, list[int]] = {}
    for layer in range(model.num_layers):
        layers.setdefault(cp.for_layer(layer), []).append(layer)
    for of_layers, numbers in layers.items():
        sent = of_layer(of_layers, model, batch_size, seq_len)
        parts = []
        if sent.exchange:
            parts.append(f"heads {_bytes(sent.exchange)} forward, {_bytes(sent.exchange)} backward")
        if sent.forward:
            hops = "1 hop" if sent.hops == 1 else f"{sent.hops} hops"
            over = "in one gather" if of_layers.strategy.by == "gather" else f"in {hops}"
            parts.append(
                f"K/V {_bytes(sent.forward)} forward, {_bytes(sent.backward)} backward {over}"
            )
        what = "; ".join(parts) or "nothing"
        yield f"{_ranges(numbers)} ({of_layers.comm_type}), each: {what}"
    copies = cp.size * cp.axis_size(cp.dp)
    if copies == 1:
        return
    # Float32 of each parameter: an all-reduce sends it twice (to be summed, and summed); FSDP sends
    # it to gather it, forward and backward, and its gradient to be summed.
    times = 3 if fsdp else 2
    sent_bytes = times * 4 * (copies - 1) * num_params // (copies * cp.axis_size(cp.tp))
    what = "parameters, gathered twice, and gradients, summed" if fsdp else "gradients, summed"
    yield f"{what} over {copies} devices: {_bytes(sent_bytes)}"


def _ranges(numbers: list[int]) -> str:
    """`[0, 1, 2, 5]` as "layers 0-2, 5"."""
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
