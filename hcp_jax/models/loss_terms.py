"""Say what a model's loss has beside that of the next token, and which means are reported.

The parts are sums over tokens, so microbatches, devices and stages of a pipeline add them up.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from hcp_jax.models.config import ModelConfig
from hcp_jax.models.layers.moe_router import RouterSums
from hcp_jax.models.moe_config import MoEConfig


class Mean(NamedTuple):
    """A mean, as sums that microbatches and devices add up.

    Attributes:
        total: Σ of what is averaged.
        tokens: over how many.
    """

    total: Any
    tokens: Any


_ROUTERS = {
    "load_balance": "balance",
    "sequence_balance": "by_document",
    "router_z": "z",
    "router_entropy": "entropy",
    "max_load": "max_load",
}
"""Metric of each of a router's sums."""


def mean_names(model: ModelConfig) -> tuple[str, ...]:
    """Return the names of the means that come with a model's losses.

    They are "mtp_loss_1" and so on: each depth's loss in nats per token that has a target; and of
    the routers, as means over tokens and layers, "load_balance" (the loss, about 1 at best),
    "sequence_balance" (that of documents, if it has a weight), "router_z", "router_entropy" in
    nats, and "max_load", the load of the fullest expert in multiples of the mean load.
    """
    depths = tuple(f"mtp_loss_{d + 1}" for d in range(model.mtp_depths))
    return depths + _router_names(model)


def depth_means(losses: Float[Array, "n"], weights: Float[Array, "B T n"]) -> dict[str, Mean]:
    """Return the means of the depths of multi-token prediction, by name.

    Args:
        losses: Σ weight · loss of each depth.
        weights: weight of each token's target at each depth.
    """
    counts = jnp.sum(weights, axis=(0, 1))
    return {f"mtp_loss_{d + 1}": Mean(losses[d], counts[d]) for d in range(losses.shape[0])}


def router_means(model: ModelConfig, sums: RouterSums) -> dict[str, Mean]:
    """Return the means of the routers by name."""
    return {name: Mean(getattr(sums, _ROUTERS[name]), sums.tokens) for name in _router_names(model)}


def _router_names(model: ModelConfig) -> tuple[str, ...]:
    if model.moe is None:
        return ()
    left_out = () if model.moe.sequence_aux_loss_coef else ("sequence_balance",)
    return tuple(name for name in _ROUTERS if name not in left_out)


def router_loss(moe: MoEConfig, sums: RouterSums, scale: Float[Array, ""]) -> Float[Array, ""]:
    """Return the losses of the routers, and what moves the biases that correct their scores.

    Args:
        moe: of the model.
        sums: of some layers' routers, over the tokens of a microbatch.
        scale: factor of the losses: Σ weight over the microbatch's number of tokens that are no
            padding, so that each router's mean weighs as much as the loss of the next tokens.
    """
    added = moe.router_aux_loss_coef * sums.balance + moe.router_z_loss_coef * sums.z
    added += moe.sequence_aux_loss_coef * sums.by_document
    loss: Float[Array, ""] = added * scale + sums.signal
    return loss
