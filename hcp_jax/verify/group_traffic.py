"""Compare what programs for groups move with what their movers list, device by device.

A collective that leaves its block of the widest group, or its part of tp, is a *stray*.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64

from hcp_jax.attention.strategy import compose
from hcp_jax.compiled import hlo
from hcp_jax.cost.traffic import ITEM_BYTES, SCOPES, Traffic
from hcp_jax.models.config import ModelConfig
from hcp_jax.models.specs import AttentionSpec, Mixer
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.parallel.microbatch import flat_devices
from hcp_jax.train.config import TrainConfig
from hcp_jax.train.dynamic import DynamicProgram
from hcp_jax.train.losses import make_eval_loss
from hcp_jax.verify import measures
from hcp_jax.verify.measures import Check


def traffic_checks(
    config: TrainConfig,
    contexts: dict[int, ContextParallel],
    program: DynamicProgram,
    params: Any,
    batches: dict[Any, Any],
) -> Iterator[Check]:
    """Yield a check of each scope of every program of a menu, of its forward pass and its step.

    Args:
        config: config with `parallel.dynamic` enabled.
        contexts: context of each program, by its widest group.
        program: what training runs, compiled.
        params: parameters, or their shapes.
        batches: a microbatch for each program.
    """
    for widest, cp in contexts.items():
        eval_loss: Any = make_eval_loss(config.model, cp)
        forward = eval_loss.lower(params, batches[widest]).compile()
        needed = needed_bytes(config.model, cp, config.parallel.dynamic.tokens)
        # As for streams, backward moves at least as much again as forward.
        for name, compiled, times in (
            ("forward", forward, 1),
            ("step", program.menu.programs[widest], 2),
        ):
            found = hlo.collectives(compiled.as_text())
            for scope in SCOPES:
                scoped = [c for c in found if scope in c.op_name]
                if not scoped and not needed[scope]:
                    continue
                moved, least, exact = moved_bytes(scoped, cp), times * needed[scope], times == 1
                strays = count_strays(scoped, cp)
                cells = measures.traffic_cells(
                    scope, scoped, int(moved.sum()), least * cp.mesh.size, exact
                )
                enough = (moved == least).all() if exact else (moved >= least).all()
                yield Check(
                    {
                        "widest": str(widest),
                        "program": name,
                        **cells,
                        "strays": str(strays),
                    },
                    bool(enough) and strays == 0,
                )


def needed_bytes(model: ModelConfig, cp: ContextParallel, tokens: int) -> dict[str, int]:
    """Return the bytes that a device puts into each scope's collectives in a float32 forward."""
    needed = dict.fromkeys(SCOPES, 0)
    for layer in model.computed_layers:
        for moved in _listed(model.specs[layer].mixer, cp.for_layer(layer), tokens):
            if moved.direction == "forward":
                needed[moved.scope] += moved.count * moved.bytes
    return needed


def _listed(mixer: Mixer, cp: ContextParallel, tokens: int) -> Sequence[Traffic]:
    """List the collectives of a layer's mixer, of float32 values and `tokens` slots a device."""
    if not isinstance(mixer, AttentionSpec):
        return mixer.traffic(cp, rows=cp.axis_size(cp.dp), tokens=tokens * cp.size)
    tp = cp.axis_size(cp.tp)
    return compose(cp, mixer.num_heads // tp).traffic(
        tokens=tokens,
        heads=mixer.num_heads // tp,
        kv_heads=mixer.num_kv_heads // tp,
        head_size=mixer.head_size,
        item_bytes=ITEM_BYTES["float32"],
    )


def moved_bytes(found: Sequence[hlo.Collective], cp: ContextParallel) -> Int64[np.ndarray, "D"]:
    """Return the bytes that each device puts in, by its number in the compiled program."""
    moved = np.zeros(cp.mesh.size, np.int64)
    for c in found:
        members = [device for group in c.groups if len(group) > 1 for device in group]
        moved[[source for source, _ in c.pairs] or members] += c.bytes * c.count
    return moved


def count_strays(found: Sequence[hlo.Collective], cp: ContextParallel) -> int:
    """Count the collectives that join devices of several blocks, or of several parts of tp."""
    numbers = _numbers(cp)
    home = np.zeros(cp.mesh.size, np.int64)
    first = np.arange(len(numbers))[:, None] // cp.placement.reach
    home[numbers] = first * numbers.shape[1] + np.arange(numbers.shape[1])
    return sum(
        c.count for c in found if any(np.unique(home[list(group)]).size > 1 for group in c.groups)
    )


def _numbers(cp: ContextParallel) -> Int64[np.ndarray, "D lanes"]:
    """Return the numbers, in a compiled program, of each group device and its tp parts."""
    return flat_devices(cp, np.arange(cp.mesh.size).reshape(cp.mesh.devices.shape))
