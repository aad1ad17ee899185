"""Measure errors and traffic for `hcp verify`, with their tolerances, for streams and groups."""

import collections
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hcp_jax.attention.api import dot_product_attention
from hcp_jax.compiled import hlo
from hcp_jax.models.config import ModelConfig
from hcp_jax.models.pattern import LayerConfig
from hcp_jax.models.recurrent_specs import shrunk
from hcp_jax.models.specs import Mixer
from hcp_jax.models.transformer import abstract_model
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.train.config import TrainConfig
from hcp_jax.train.sections import DataConfig

EXACT = 2e-6  # float32 attention against float64, largest error over largest value
SAME_STEP = 1e-5  # float32 loss and gradient norm, relative
_LARGE = 20_000_000  # number of parameters above which a model is narrowed


class Check(NamedTuple):
    """One row of a table: its cells by heading, and whether the check passed."""

    cells: dict[str, str]
    passed: bool


def narrowed(config: TrainConfig, cp: ContextParallel) -> tuple[TrainConfig, ContextParallel]:
    """Return a float32 config of a model small enough for any machine; mesh and heads are kept.

    A large model keeps one layer for each of its comm types and mixers, and its text is read as
    bytes.
    """
    model = dataclasses.replace(config.model, compute_dtype="float32")
    shapes = jax.tree.leaves(abstract_model(config.model)[1])
    if sum(math.prod(x.shape) for x in shapes) > _LARGE:
        kept = dict.fromkeys(
            (str(cp.for_layer(i).comm_type), layer.mixer.kind)
            for i, layer in enumerate(model.specs)
        )
        comm_types = tuple(comm_type for comm_type, _ in kept)
        kinds = [kind for _, kind in kept]
        stages, tp = config.parallel.pp, cp.axis_size(cp.tp)
        if stages == 1:
            cp = dataclasses.replace(cp, comm_type=comm_types)
        else:  # one comm type for all layers, and a period of the mixers for each chunk
            kinds *= stages * config.parallel.virtual_stages
        model = dataclasses.replace(
            model,
            num_layers=len(kinds),
            # A pattern may be longer than this model; the mixers and the widest window stay.
            mixer="attention",
            layers=tuple(_layer(kind, model.widest_window) for kind in kinds),
            sliding_window=None,
            mamba2=shrunk(model.mamba2, 32),
            gated_delta=shrunk(model.gated_delta, 32),
            kda=shrunk(model.kda, 32),
            hidden_size=64 * tp,
            intermediate_size=128 * tp,
            head_size=min(model.head_dim, 32),
            vocab_size=512 * tp * stages,
        )
        parallel = config.parallel
        if stages == 1:
            parallel = dataclasses.replace(parallel, comm_type=list(comm_types), cp_comm_type=None)
        # The ids of bytes fit a vocabulary of 512.
        return dataclasses.replace(config, model=model, parallel=parallel, data=DataConfig()), cp
    return dataclasses.replace(config, model=model), cp


def _layer(kind: Any, window: int | None) -> LayerConfig:
    return LayerConfig(mixer=kind, sliding_window=window if kind == "attention" else None)


def describe(model: ModelConfig) -> str:
    """Return a description of the model's layers and heads."""
    heads = f"{model.num_heads} query heads, {model.num_kv_heads} kv heads of {model.head_dim}"
    return f"{model.num_layers} layer{'s' * (model.num_layers > 1)}, {heads}"


def layers_by_comm_type(cp: ContextParallel, model: ModelConfig) -> dict[ContextParallel, str]:
    """Return the context of each comm type with the attention layers' numbers, such as "0, 1"."""
    layers: dict[ContextParallel, list[int]] = {}
    for layer in (i for i, x in enumerate(model.specs) if x.mixer.recurrence is None):
        layers.setdefault(cp.for_layer(layer), []).append(layer)
    return {context: ", ".join(map(str, numbers)) for context, numbers in layers.items()}


class Attended(NamedTuple):
    """Output and lse of attention, and the gradients of q, k and v."""

    out: Any
    lse: Any
    dq: Any
    dk: Any
    dv: Any


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def attention(
    cp: ContextParallel | None,
    soft_cap: float | None,
    implementation: str | None,
    arrays: Mapping[str, Any],
) -> Attended:
    """Compute attention, forward and backward.

    Args:
        cp: context; None for one device.
        soft_cap: soft cap of the logits.
        implementation: implementation of the attention core.
        arrays: "q", "k", "v", the output's cotangent "dout", and "mask".
    """

    def loss(q: Any, k: Any, v: Any) -> Any:
        out, lse = dot_product_attention(
            q,
            k,
            v,
            cp=cp,
            mask=arrays["mask"],
            logits_soft_cap=soft_cap,
            implementation=implementation,
            return_residual=True,
        )
        return jnp.sum(out * arrays["dout"]), (out, lse)

    inputs = (arrays["q"], arrays["k"], arrays["v"])
    grads, (out, lse) = jax.grad(loss, (0, 1, 2), has_aux=True)(*inputs)
    return Attended(out, lse, *grads)


def random_inputs(
    rng: np.random.Generator, model: ModelConfig, shape: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """Return random q, k, v and dout with a model's heads, in float64.

    Args:
        rng: generator.
        model: gives heads and head size.
        shape: shape of the tokens; heads and head size follow it.
    """
    heads = {"q": model.num_heads, "k": model.num_kv_heads, "v": model.num_kv_heads}
    heads["dout"] = model.num_heads
    return {name: rng.normal(size=(*shape, n, model.head_dim)) for name, n in heads.items()}


def relative(got: np.ndarray, exact: np.ndarray) -> float:
    """Return the largest error over the largest finite value.

    Return inf if the two arrays are not finite at the same positions.
    """
    finite = np.isfinite(exact)
    if not np.array_equal(finite, np.isfinite(got)):
        return math.inf
    return float(np.abs(got[finite] - exact[finite]).max() / np.abs(exact[finite]).max())


_OF_ROUTERS = ("load_balance", "sequence_balance", "router_z", "router_entropy", "max_load")


def same_step(many: Mapping[str, Any], single: Mapping[str, Any]) -> Iterator[Check]:
    """Compare the metrics of a step on all devices with those on one device."""
    beside = sorted(n for n in many if n.startswith("mtp_loss_") or n in _OF_ROUTERS)
    for name in ("loss", *beside, "grad_norm"):
        here, alone = float(many[name]), float(single[name])
        error = abs(here - alone) / abs(alone)
        cells = {
            "": name.replace("_", " "),
            "here": f"{here:.6f}",
            "on one device": f"{alone:.6f}",
            "difference": f"{error:.1e}",
            "allowed": f"{SAME_STEP:.0e}",
        }
        yield Check(cells, error <= SAME_STEP)


def needed_bytes(
    mixer: Mixer, cp: ContextParallel, rows: int, tokens: int
) -> collections.Counter[str]:
    """Return the bytes that one device puts into a layer's forward collectives, by scope.

    Args:
        mixer: spec of the layer's mixer.
        cp: context of the layer.
        rows: rows of the batch, over all dp devices.
        tokens: tokens of a row, with padding.
    """
    needed: collections.Counter[str] = collections.Counter()
    for moved in mixer.traffic(cp, rows=rows, tokens=tokens):
        if moved.direction == "forward":
            needed[moved.scope] += moved.count * moved.bytes
    return needed


def traffic_cells(
    scope: str, found: list[hlo.Collective], moved: int, needed: int, exact: bool
) -> dict[str, str]:
    """Return the table cells for the collectives of one scope."""
    count = sum(c.count for c in found)
    kinds = ", ".join(sorted({c.kind for c in found})) or "none"
    return {
        "for": scope.replace("_", " "),
        "collectives": f"{count} {kinds}",
        "bytes": f"{moved:,}",
        "needed": f"{needed:,}" if exact else f"≥ {needed:,}",
    }
