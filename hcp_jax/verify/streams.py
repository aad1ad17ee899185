"""Check streams that are cut over the mesh against one device, for a config without groups.

1. outputs and gradients of attention, for every comm type of the config's layers and with the
   config's own masks, against dense attention in float64; and of recurrent layers, for every kind,
   against one token after the other in float64;
2. loss and gradient norm of one training step, against the same step on one device; in a pipeline,
   loss and every gradient;
3. bytes that the compiled programs move, against the bytes that the algorithm must move. A program
   that moves less attends to less than it should: throughput looks better, but the model is wrong
   (a fault that other systems have shipped).
"""

import collections
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from hcp_jax.compiled import hlo
from hcp_jax.cost.traffic import RECURRENT_SCOPES, SCOPES
from hcp_jax.models.config import ModelConfig
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.train import data
from hcp_jax.train.config import TrainConfig
from hcp_jax.train.data.batches import read
from hcp_jax.train.losses import make_eval_loss
from hcp_jax.train.optimizer import make_optimizer
from hcp_jax.train.step import init_state, make_train_step
from hcp_jax.verify import measures, pipelines, recurrences
from hcp_jax.verify.measures import EXACT, Check


def checks(config: TrainConfig, cp: ContextParallel) -> Iterator[tuple[str, Iterator[Check]]]:
    """Yield the title and rows of each table of checks; rows are computed during iteration."""
    small, cp = _reduced(config, cp)
    pipelined = small.parallel.pp > 1
    number = pipelines.num_microbatches(small) if pipelined else 1
    batch = next(
        data.make_batches(
            data.open_corpus(small.data, small.model.vocab_size),
            batch_size=cp.axis_size(cp.dp)
            * (pipelines.num_microbatches(small) if pipelined else 1),
            seq_len=small.seq_len,
            seed=small.seed,
            mask=small.model.packed_mask,
            prefetch=1,
            mtp_depths=small.model.mtp_depths,
        )
    )
    yield (
        f"attention in float32 against dense float64, largest error over largest value\n"
        f"(T={small.seq_len}, {measures.describe(small.model)}; at most {EXACT:.0e})",
        _attention(cp, small.model, small.seq_len),
    )
    if any(layer.mixer.recurrence for layer in small.model.specs):
        yield (
            "recurrent layers in float32 against one token after the other in float64, largest "
            "error over largest value\n"
            f"(T={small.seq_len}, packed; at most {recurrences.EXACT:.0e})",
            recurrences.checks(cp, small.model, small.seq_len),
        )
    if pipelined:
        yield (
            f"loss and gradients of {number} microbatches through "
            f"{small.parallel.pp} stages\nin float32 against one device, largest error over "
            "largest value\n(what a pipeline moves is not checked)",
            pipelines.one_step(small, cp, batch),
        )
        return
    yield "one training step in float32 against one device", _one_step(small, cp, batch)
    yield (
        "bytes that each device puts into collectives, and what the algorithm needs",
        _traffic(small, cp, batch),
    )


def _reduced(config: TrainConfig, cp: ContextParallel) -> tuple[TrainConfig, ContextParallel]:
    """Return a config whose dense attention and single-device step fit on any machine."""
    # An odd length also checks padding.
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
            for part, value, want in zip(found._fields, found, exact, strict=True):
                natural = np.asarray(layer_cp.unshard(value, dim=1, length=length), np.float64)
                errors[part] = measures.relative(natural, np.asarray(want))
            cells = {
                "layers": layers,
                "comm type": str(layer_cp.comm_type),
                "mask": mask_name,
                **{part: f"{error:.1e}" for part, error in errors.items()},
            }
            yield Check(cells, max(errors.values()) <= EXACT)


def _one_step(config: TrainConfig, cp: ContextParallel, batch: dict[str, Any]) -> Iterator[Check]:
    optimizer = make_optimizer(config.optimizer, config.steps)
    metrics = []
    whole = read(batch)
    for one, placed in ((cp, cp.shard_batch(batch)), (None, whole)):
        fsdp = config.parallel.fsdp and one is not None
        state = init_state(config.model, optimizer, config.seed, one, fsdp=fsdp)
        step = make_train_step(config.model, config.optimizer, config.steps, one, fsdp=fsdp)
        metrics.append(jax.device_get(step(state, placed)[1]))
    yield from measures.same_step(*metrics)


def _traffic(config: TrainConfig, cp: ContextParallel, batch: dict[str, Any]) -> Iterator[Check]:
    placed = cp.shard_batch(batch)
    optimizer = make_optimizer(config.optimizer, config.steps)
    fsdp = config.parallel.fsdp
    state = init_state(config.model, optimizer, config.seed, cp, fsdp=fsdp)
    eval_loss: Any = make_eval_loss(config.model, cp)
    forward = eval_loss.lower(state.params, placed).compile()
    step: Any = make_train_step(config.model, config.optimizer, config.steps, cp, fsdp=fsdp)
    programs = {
        # Backward moves at least as much again: dK and dV, or the cotangents of the exchanges. It
        # also moves K and V again, but the compiler may merge such a move with one of the forward.
        "forward": (forward, 1),
        "step": (step.lower(state, placed).compile(), 2),
    }
    needed = _needed_bytes(config.model, cp, batch["positions"].shape)
    for program, (compiled, times) in programs.items():
        found = hlo.collectives(compiled.as_text())
        for scope in (*SCOPES, *RECURRENT_SCOPES):
            if not needed[scope]:
                continue
            scoped = [c for c in found if scope in c.op_name]
            moved = sum(c.bytes * c.count for c in scoped)
            exact, least = program == "forward", needed[scope] * times
            cells = measures.traffic_cells(scope, scoped, moved, least, exact)
            yield Check({"program": program} | cells, moved == least if exact else moved >= least)


def _needed_bytes(
    model: ModelConfig, cp: ContextParallel, shape: tuple[int, ...]
) -> collections.Counter[str]:
    """Return the bytes that one device puts into each scope's collectives in a float32 forward."""
    needed: collections.Counter[str] = collections.Counter()
    for layer in model.computed_layers:
        layer_cp, tokens = cp.for_layer(layer), cp.padded_length(shape[1])
        needed += measures.needed_bytes(model.specs[layer].mixer, layer_cp, shape[0], tokens)
    return needed
