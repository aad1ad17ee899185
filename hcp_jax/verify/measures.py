"""Measure errors and traffic for `hcp verify`, with their tolerances, for streams and groups."""

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
from hcp_jax.cost.traffic import ITEM_BYTES, SCOPES, Strategy, layer_traffic
from hcp_jax.models.config import ModelConfig
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

    A large model keeps one layer for each of its comm types, and its text is read as bytes.
    """
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
            layers=None,  # a pattern may be longer than this model; its widest window stays
            sliding_window=model.widest_window,
            hidden_size=64 * tp,
            intermediate_size=128 * tp,
            head_size=min(model.head_dim, 32),
            vocab_size=512 * tp,
        )
        parallel = dataclasses.replace(
            config.parallel, comm_type=list(comm_types), cp_comm_type=None
        )
        # The ids of bytes fit a vocabulary of 512.
        return dataclasses.replace(config, model=model, parallel=parallel, data=DataConfig()), cp
    return dataclasses.replace(config, model=model), cp


def describe(model: ModelConfig) -> str:
    """Return a description of the model's layers and heads."""
    heads = f"{model.num_heads} query heads, {model.num_kv_heads} kv heads of {model.head_dim}"
    return f"{model.num_layers} layer{'s' * (model.num_layers > 1)}, {heads}"


def layers_by_comm_type(cp: ContextParallel, model: ModelConfig) -> dict[ContextParallel, str]:
    """Return the context of each comm type with its layer numbers, such as "0, 1"."""
    layers: dict[ContextParallel, list[int]] = {}
    for layer in range(model.num_layers):
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


_OF_ROUTERS = ("load_balance", "router_z", "router_entropy", "max_load")


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
    model: ModelConfig, tp: int, tokens: int, strategy: Strategy, sizes: Mapping[str, int]
) -> dict[str, int]:
    """Return the bytes that one device puts into a layer's forward collectives, by scope.

    Args:
        model: gives the heads; values are float32.
        tp: number of devices that the heads are cut over.
        tokens: tokens of the device, over all its rows.
        strategy: which axes exchange heads and which move K and V.
        sizes: number of devices along each axis.
    """
    needed = dict.fromkeys(SCOPES, 0)
    for moved in layer_traffic(
        strategy,
        sizes,
        tokens=tokens,
        heads=model.num_heads // tp,
        kv_heads=model.num_kv_heads // tp,
        head_size=model.head_dim,
        item_bytes=ITEM_BYTES["float32"],
    ):
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
