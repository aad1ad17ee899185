"""`hcp verify`: proof, on the devices at hand, that context parallelism computes what one does.

Three things are measured, and a table tells them:

1. attention, outputs and gradients, of every comm type that the config's layers use, under the
   config's own masks, against dense attention in float64;
2. the loss and the gradient's norm of one training step, against the same step on one device;
3. the bytes that the compiled programs move, against what the algorithm must move. A program that
   moves less attends to less than it should: throughput would look splendid, and the model would
   be wrong (a fault that other systems have shipped).

The sequences are short and large models are made narrow, with their heads, masks, comm types and
mesh kept: the mathematics does not depend on the rest.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.box
import rich.console
import rich.table

from hcp_jax.attention.api import dot_product_attention
from hcp_jax.context import ContextParallel
from hcp_jax.mask import Mask
from hcp_jax.models.config import ModelConfig
from hcp_jax.models.transformer import abstract_model
from hcp_jax.placing import Gathered
from hcp_jax.plan import hlo
from hcp_jax.train import config as configuration
from hcp_jax.train import data
from hcp_jax.train.config import TrainConfig
from hcp_jax.train.step import init_state, make_eval_loss, make_optimizer, make_train_step

EXACT = 2e-6  # float32 attention against float64, largest error over largest value
SAME_STEP = 1e-5  # float32 loss and gradient norm, relative
_LARGE = 20_000_000  # parameters; models above are made narrow
_SCOPES = ("ring_hop", "gather_kv", "exchange_heads")


class Check(NamedTuple):
    """One row of a table: the figures by their headings, and whether they are what they must be."""

    cells: dict[str, str]
    passed: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hcp verify`."""
    configuration.add_arguments(parser)


def num_devices(args: argparse.Namespace) -> int:
    """How many devices to simulate where there is no GPU."""
    return configuration.from_arguments(args).parallel.num_devices


def run(args: argparse.Namespace) -> int:
    """Runs `hcp verify`; returns 0, or 1 if a check failed.

    Raises:
        NotImplementedError: for a config with dynamic context parallelism.
    """
    config = configuration.from_arguments(args)
    if config.parallel.dynamic.enabled:
        raise NotImplementedError(
            "hcp verify knows no groups of devices: give --parallel.dynamic.enabled false to check "
            "the config's mesh and comm types without them."
        )
    width = None if sys.stdout.isatty() else 100  # a file has room
    console = rich.console.Console(highlight=False, width=width)
    cp = config.parallel.context_parallel(config.model.num_layers)
    console.print(cp.describe(), markup=False, soft_wrap=True)
    total = failed = 0
    for title, rows in checks(config, cp):
        table = rich.table.Table(
            title=title, title_justify="left", box=rich.box.SIMPLE_HEAD, pad_edge=False
        )
        for check in rows:
            if not table.columns:
                for heading in (*check.cells, ""):
                    table.add_column(heading, no_wrap=True)
            table.add_row(*check.cells.values(), "ok" if check.passed else "FAILED")
            total, failed = total + 1, failed + (not check.passed)
        if table.row_count:
            console.print(table)
    if failed:
        console.print(f"{failed} of {total} checks FAILED")
        return 1
    console.print(f"all {total} checks passed: this computes what one device computes")
    return 0


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
        f"(T={small.seq_len}, {_describe(small.model)}; at most {EXACT:.0e})",
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
    model = dataclasses.replace(config.model, compute_dtype="float32")
    shapes = jax.tree.leaves(abstract_model(config.model)[1])
    if sum(math.prod(x.shape) for x in shapes) > _LARGE:
        comm_types = tuple(
            dict.fromkeys(str(cp.for_layer(i).comm_type) for i in range(model.num_layers))
        )
        cp = dataclasses.replace(cp, comm_type=comm_types)
        tp = cp.axis_size(cp.tp)
        model = dataclasses.replace(
            model,
            num_layers=len(comm_types),
            hidden_size=64 * tp,
            intermediate_size=128 * tp,
            head_size=min(model.head_dim, 32),
            vocab_size=512 * tp,
        )
        config = dataclasses.replace(config, data=data.DataConfig())  # bytes fit 512 ids
    return dataclasses.replace(config, model=model, seq_len=max(length, 2)), cp


def _describe(model: ModelConfig) -> str:
    heads = f"{model.num_heads} query heads, {model.num_kv_heads} kv heads of {model.head_dim}"
    return f"{model.num_layers} layers, {heads}"


def _attention(cp: ContextParallel, model: ModelConfig, length: int) -> Iterator[Check]:
    rows = cp.axis_size(cp.dp)
    rng = np.random.default_rng(0)
    heads = (model.num_heads, model.num_kv_heads, model.num_kv_heads, model.num_heads)
    inputs = [rng.normal(size=(rows, length, n, model.head_dim)) for n in heads]
    cuts = np.sort(rng.integers(0, length, (rows, 7)), axis=1)
    packed = np.stack([np.searchsorted(row, np.arange(length), side="right") for row in cuts])
    for mask_name, mask in {"whole": model.mask(), "packed": model.mask(packed)}.items():
        with jax.enable_x64(True):
            exact = _gradients(inputs, mask, None, model, "reference")
        float32 = [x.astype(np.float32) for x in inputs]
        for layer_cp, layers in _layers(cp, model).items():
            placed = [layer_cp.shard(x) for x in float32]
            mask_here = layer_cp.place(mask, length)
            found = _gradients(placed, mask_here, layer_cp, model, model.implementation)
            errors = {}
            for part, value in found.items():
                natural = np.asarray(layer_cp.unshard(value, dim=1, length=length), np.float64)
                errors[part] = _relative(natural, np.asarray(exact[part]))
            cells = {
                "layers": ", ".join(map(str, layers)),
                "comm type": str(layer_cp.comm_type),
                "mask": mask_name,
                **{part: f"{error:.1e}" for part, error in errors.items()},
            }
            yield Check(cells, max(errors.values()) <= EXACT)


def _layers(cp: ContextParallel, model: ModelConfig) -> dict[ContextParallel, list[int]]:
    """The layers of each comm type."""
    layers: dict[ContextParallel, list[int]] = {}
    for layer in range(model.num_layers):
        layers.setdefault(cp.for_layer(layer), []).append(layer)
    return layers


def _gradients(
    inputs, mask: Mask, cp: ContextParallel | None, model: ModelConfig, implementation: str | None
) -> dict[str, Any]:
    """Output, lse and gradients of attention under the cotangent that stands last."""

    @jax.jit
    def compute(q, k, v, dout):
        def loss(q, k, v):
            out, lse = dot_product_attention(
                q,
                k,
                v,
                cp=cp,
                mask=mask,
                logits_soft_cap=model.logits_soft_cap,
                implementation=implementation,
                return_residual=True,
            )
            return jnp.sum(out * dout), (out, lse)

        grads, (out, lse) = jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
        return out, lse, *grads

    found = compute(*(jnp.asarray(x) for x in inputs))
    return dict(zip(("out", "lse", "dq", "dk", "dv"), found, strict=True))


def _one_step(config: TrainConfig, cp: ContextParallel, batch: dict) -> Iterator[Check]:
    optimizer = make_optimizer(config.optimizer, config.steps)
    metrics = []
    whole = {n: x.whole() if isinstance(x, Gathered) else x for n, x in batch.items()}
    for one, placed in ((cp, cp.shard_batch(batch)), (None, whole)):
        fsdp = config.parallel.fsdp and one is not None
        state = init_state(config.model, optimizer, config.seed, one, fsdp=fsdp)
        step = make_train_step(config.model, config.optimizer, config.steps, one, fsdp=fsdp)
        metrics.append(jax.device_get(step(state, placed)[1]))
    for name in ("loss", "grad_norm"):
        many, single = (float(m[name]) for m in metrics)
        error = abs(many - single) / abs(single)
        cells = {
            "": name.replace("_", " "),
            "here": f"{many:.6f}",
            "on one device": f"{single:.6f}",
            "difference": f"{error:.1e}",
            "allowed": f"{SAME_STEP:.0e}",
        }
        yield Check(cells, error <= SAME_STEP)


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
        for scope in _SCOPES:
            if not needed[scope]:
                continue
            of_scope = [c for c in found if scope in c.op_name]
            moved = sum(c.bytes * c.count for c in of_scope)
            count = sum(c.count for c in of_scope)
            kinds = ", ".join(sorted({c.kind for c in of_scope})) or "none"
            exact = program == "forward"
            least = needed[scope] * times
            cells = {
                "program": program,
                "for": scope.replace("_", " "),
                "collectives": f"{count} {kinds}",
                "bytes": f"{moved:,}",
                "needed": f"{least:,}" if exact else f"≥ {least:,}",
            }
            yield Check(cells, moved == least if exact else moved >= least)


def _needed_bytes(model: ModelConfig, cp: ContextParallel, shape) -> dict[str, int]:
    """What one device must put into the collectives of one forward pass, in float32."""
    rows, length = shape[0] // cp.axis_size(cp.dp), cp.padded_length(shape[1])
    needed = dict.fromkeys(_SCOPES, 0)
    tp = cp.axis_size(cp.tp)
    for layer in range(model.num_layers):
        exchange, move, by = cp.for_layer(layer).strategy
        groups, ring = cp.axis_size(exchange), cp.axis_size(move)
        kv_heads = math.lcm(model.num_kv_heads // tp, groups)
        token = 4 * rows * (length // cp.size) * model.head_dim
        if groups > 1:
            needed["exchange_heads"] += token * 2 * (model.num_heads // tp + kv_heads)
        if ring > 1:
            kv = token * 2 * kv_heads
            needed["ring_hop" if by == "ring" else "gather_kv"] += kv * (
                ring - 1 if by == "ring" else 1
            )
    return needed


def _relative(got: np.ndarray, exact: np.ndarray) -> float:
    finite = np.isfinite(exact)
    if not np.array_equal(finite, np.isfinite(got)):
        return math.inf
    return float(np.abs(got - exact)[finite].max() / np.abs(exact[finite]).max())
