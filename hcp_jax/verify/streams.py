"""Streams that are cut over the mesh, against one device: the tables of a config without groups.

1. attention, outputs and gradients, of every comm type that the config's layers use, under the
   config's own masks, against dense attention in float64;
2. the loss and the gradient's norm of one training step, against the same step on one device;
3. the bytes that the compiled programs move, against what the algorithm must move. A program that
   moves less attends to less than it should: throughput would look splendid, and the model would
   be wrong (a fault that other systems have shipped).
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from hcp_jax.compiled import hlo
from hcp_jax.cost.traffic import SCOPES
from hcp_jax.models.config import ModelConfig
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.parallel.placing import Gathered
from hcp_jax.train import data
from hcp_jax.train.config import TrainConfig
from hcp_jax.train.step import init_state, make_eval_loss, make_optimizer, make_train_step
from hcp_jax.verify import measures
from hcp_jax.verify.measures import EXACT, Check


def checks(config: TrainConfig, cp: ContextParallel) -> Iterator[tuple[str, Iterator[Check]]]:
    """All checks of a config on a mesh, table by table, made as they are iterated over."""
    small, cp = _reduced(config, cp)
    batch = next(
        data.make_batches(
            data.open_corpus(small.data, small.model.vocab_size),
            batch_size=cp.axis_size(cp.dp),
            seq_len=small.seq_len,
            seed=small.seed,
            mask=small.model.mask,
            prefetch=1,
        )
    )
    yield (
        f"attention in float32 against dense float64, largest error over largest value\n"
        f"(T={small.seq_len}, {measures.describe(small.model)}; at most {EXACT:.0e})",
        _attention(cp, small.model, small.seq_len),
    )
    yield "one training step in float32 against one device", _one_step(small, cp, batch)
    yield (
        "bytes that each device puts into collectives, and what the algorithm needs",
        _traffic(small, cp, batch),
    )


def _reduced(config: TrainConfig, cp: ContextParallel) -> tuple[TrainConfig, ContextParallel]:
    """A config whose dense attention and single-device step fit anywhere."""
    # An odd length, so that padding is checked, too.
    length = min(config.seq_len, max(256, 6 * cp.size)) - 1
    small, cp = measures.narrowed(config, cp)
    return dataclasses.replace(small, seq_len=max(length, 2)), cp


def _attention(cp: ContextParallel, model: ModelConfig, length: int) -> Iterator[Check]:
    rows = cp.axis_size(cp.dp)
    rng = np.random.default_rng(0)
    inputs = measures.random_inputs(rng, model, (rows, length))
    cuts = np.sort(rng.integers(0, length, (rows, 7)), axis=1)
    packed = np.stack([np.searchsorted(row, np.arange(length), side="right") for row in cuts])
    for mask_name, mask in {"whole": model.mask(), "packed": model.mask(packed)}.items():
        with jax.enable_x64(True):
            exact = measures.attention(
                None, model.logits_soft_cap, "reference", inputs | {"mask": mask}
            )
        float32 = {name: x.astype(np.float32) for name, x in inputs.items()}
        for layer_cp, layers in measures.layers_by_comm_type(cp, model).items():
            placed = {name: layer_cp.shard(x) for name, x in float32.items()}
            found = measures.attention(
                layer_cp,
                model.logits_soft_cap,
                model.implementation,
                placed | {"mask": layer_cp.place(mask, length)},
            )
            errors = {}
            for part, value, of_exact in zip(found._fields, found, exact, strict=True):
                natural = np.asarray(layer_cp.unshard(value, dim=1, length=length), np.float64)
                errors[part] = measures.relative(natural, np.asarray(of_exact))
            cells = {
                "layers": layers,
                "comm type": str(layer_cp.comm_type),
                "mask": mask_name,
                **{part: f"{error:.1e}" for part, error in errors.items()},
            }
            yield Check(cells, max(errors.values()) <= EXACT)


def _one_step(config: TrainConfig, cp: ContextParallel, batch: dict) -> Iterator[Check]:
    optimizer = make_optimizer(config.optimizer, config.steps)
    metrics = []
    whole = {n: x.whole() if isinstance(x, Gathered) else x for n, x in batch.items()}
    for one, placed in ((cp, cp.shard_batch(batch)), (None, whole)):
        fsdp = config.parallel.fsdp and one is not None
        state = init_state(config.model, optimizer, config.seed, one, fsdp=fsdp)
        step = make_train_step(config.model, config.optimizer, config.steps, one, fsdp=fsdp)
        metrics.append(jax.device_get(step(state, placed)[1]))
    yield from measures.same_step(*metrics)


def _traffic(config: TrainConfig, cp: ContextParallel, batch: dict) -> Iterator[Check]:
    placed = cp.shard_batch(batch)
    optimizer = make_optimizer(config.optimizer, config.steps)
    fsdp = config.parallel.fsdp
    state = init_state(config.model, optimizer, config.seed, cp, fsdp=fsdp)
    eval_loss: Any = make_eval_loss(config.model, cp)
    forward = eval_loss.lower(state.params, placed).compile()
    step: Any = make_train_step(config.model, config.optimizer, config.steps, cp, fsdp=fsdp)
    programs = {
        # Backward moves at least as much again: dK and dV, or the exchanges' cotangents. It moves
        # K and V once more, but there the compiler may merge a move with one of the forward.
        "forward": (forward, 1),
        "step": (step.lower(state, placed).compile(), 2),
    }
    needed = _needed_bytes(config.model, cp, batch["positions"].shape)
    for program, (compiled, times) in programs.items():
        found = hlo.collectives(compiled.as_text())
        for scope in SCOPES:
            if not needed[scope]:
                continue
            of_scope = [c for c in found if scope in c.op_name]
            moved = sum(c.bytes * c.count for c in of_scope)
            exact, least = program == "forward", needed[scope] * times
            cells = measures.traffic_cells(scope, of_scope, moved, least, exact)
            yield Check({"program": program} | cells, moved == least if exact else moved >= least)


def _needed_bytes(model: ModelConfig, cp: ContextParallel, shape) -> dict[str, int]:
    """Return what one device must put into the collectives of one forward pass, in float32."""
    tokens = shape[0] // cp.axis_size(cp.dp) * cp.padded_length(shape[1]) // cp.size
    needed = dict.fromkeys(SCOPES, 0)
    for layer in range(model.num_layers):
        strategy = cp.for_layer(layer).strategy
        layer_needs = measures.needed_bytes(
            model, cp.axis_size(cp.tp), tokens, strategy, cp.mesh.shape
        )
        needed = {scope: needed[scope] + layer_needs[scope] for scope in SCOPES}
    return needed
