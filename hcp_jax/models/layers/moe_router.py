"""Choose the experts of each token, and sum what the losses and metrics of a router need."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int32

from hcp_jax.models.specs import MoESpec


class Routing(NamedTuple):
    """The experts of n tokens.

    Attributes:
        expert: the k experts of each token.
        weight: factor of each of their outputs.
        share: scores of all experts, which add up to 1.
        log_z: log-partition of the router's logits.
    """

    expert: Int32[Array, "n k"]
    weight: Float[Array, "n k"]
    share: Float[Array, "n E"]
    log_z: Float[Array, "n"]


class RouterSums(NamedTuple):
    """Sums over the tokens that are no padding, in float32; for several layers they add up.

    Attributes:
        balance: of the load-balance loss.
        by_document: of the load-balance loss of each token's document; 0 if it has no weight.
        z: of the squared log-partition.
        entropy: of the entropy of the shares, in nats.
        max_load: of the load of the fullest expert, in multiples of the mean load.
        signal: always 0; its gradient is the load of each expert above the mean, as the gradient
            of the bias that corrects scores.
        tokens: number of tokens, times layers.
    """

    balance: Float[Array, ""]
    by_document: Float[Array, ""]
    z: Float[Array, ""]
    entropy: Float[Array, ""]
    max_load: Float[Array, ""]
    signal: Float[Array, ""]
    tokens: Float[Array, ""]


WHOLE: Any = RouterSums(*[PartitionSpec()] * len(RouterSums._fields))  # type: ignore[arg-type]
"""The PartitionSpec of each sum."""


def no_sums() -> RouterSums:
    """Return the sums over no layers."""
    return RouterSums(*(jnp.zeros((), jnp.float32) for _ in RouterSums._fields))


def route(
    spec: MoESpec,
    x: Float[Array, "n D"],
    kernel: Float[Array, "D E"],
    correction: Float[Array, "E"] | None = None,
    bias: Float[Array, "E"] | None = None,
) -> Routing:
    """Choose the experts of each token; all in float32.

    Args:
        spec: of the layer.
        x: activations.
        kernel: weights of the router.
        correction: added to the scores that choose experts; no gradient.
        bias: added to the logits.
    """
    logits = jnp.dot(x.astype(jnp.float32), kernel.astype(jnp.float32))
    if bias is not None:
        logits = logits + bias[None]
    if spec.router == "softmax":
        scores = share = jax.nn.softmax(logits, axis=-1)
    else:
        scores = jax.nn.sigmoid(logits)
        share = scores / jnp.sum(scores, axis=-1, keepdims=True)
    ranked = jax.lax.stop_gradient(scores)
    if correction is not None:
        ranked = ranked + jax.lax.stop_gradient(correction)[None]
    expert = jax.lax.top_k(_in_best_groups(spec, ranked), spec.top_k)[1]
    weight = jnp.take_along_axis(scores, expert, axis=-1)
    if spec.norm_topk:
        weight = weight / jnp.sum(weight, axis=-1, keepdims=True)
    log_z = jax.scipy.special.logsumexp(logits, axis=-1)
    return Routing(expert.astype(jnp.int32), weight * spec.scaling, share, log_z)


def router_sums(
    spec: MoESpec,
    routing: Routing,
    real: Bool[Array, "n"],
    load: Float[Array, "E"],
    correction: Float[Array, "E"] | None = None,
    document_load: Float[Array, "n E"] | None = None,
) -> RouterSums:
    """Return the sums over the tokens given here.

    With f the share of all tokens' choices that went to an expert, the load-balance loss is
    E Σ f · (mean share of the expert) over experts, which is at least about 1. f has no gradient,
    so the loss is a sum over tokens, as the cross entropy is, once f is known.

    Args:
        spec: of the layer.
        routing: from `route`.
        real: False for padding.
        load: f · E, the load of each expert in multiples of the mean load, over *all* devices.
        correction: as in `route`.
        document_load: `load` of each token's document; None if its loss has no weight.
    """
    here = real.astype(jnp.float32)
    share = jnp.where(real[:, None], routing.share, 0)
    log_share = jnp.log(jnp.where(share > 0, share, 1))
    tokens = jnp.sum(here)
    signal = jnp.zeros((), jnp.float32)
    if correction is not None:
        moved = correction - jax.lax.stop_gradient(correction)
        signal = tokens * jnp.sum(moved * (load - 1))
    by_document = jnp.zeros((), jnp.float32)
    if document_load is not None:
        by_document = jnp.sum(share * document_load)
    return RouterSums(
        balance=jnp.sum(share * load[None]),
        by_document=by_document,
        z=jnp.sum(here * jnp.square(routing.log_z)),
        entropy=-jnp.sum(share * log_share),
        signal=signal,
        max_load=tokens * jnp.max(load),
        tokens=tokens,
    )


def _in_best_groups(spec: MoESpec, scores: Float[Array, "n E"]) -> Float[Array, "n E"]:
    """Return -inf for experts outside the groups whose two best scores have the greatest sum."""
    if spec.groups == spec.topk_groups:
        return scores
    grouped = scores.reshape(scores.shape[0], spec.groups, -1)
    rank = jnp.sum(jax.lax.top_k(grouped, 2)[0], axis=-1)
    best = jax.lax.top_k(rank, spec.topk_groups)[1]
    inside = jnp.any(best[:, :, None] == jnp.arange(spec.groups)[None, None], axis=1)
    return jnp.where(inside[:, :, None], grouped, -jnp.inf).reshape(scores.shape)
