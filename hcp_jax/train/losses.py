"""Sum the losses of a microbatch: of the next token, of those further on, and of routers.

    total = Σ weight · loss  +  mtp_loss_weight · mean over depths of Σ weight · loss of a depth
            + Σ weight · (coefficients · mean over tokens of each router's losses)

All are sums over tokens, and every part of the total is divided by the weight of the next tokens of
the whole step, as DeepSeek-V3 does (2024, equations 24 and 25). So a step may be cut into any
microbatches, with any number of targets at each depth. The losses that are reported by depth are
means over the tokens that have a target there. The losses of routers are means over the tokens of
their microbatch that are no padding, whose counts over all devices they use.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from hcp_jax.models.config import ModelConfig
from hcp_jax.models.layers.loss import summed_cross_entropy
from hcp_jax.models.layers.moe_router import RouterSums
from hcp_jax.models.loss_terms import Mean, depth_means, router_loss, router_means
from hcp_jax.models.transformer import abstract_model
from hcp_jax.parallel import host_memory, spmd
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.train.batch import Batch


class Losses(NamedTuple):
    """Sums over the tokens of a microbatch, in nats.

    Attributes:
        total: what is trained on.
        main: Σ weight · loss of the next tokens.
        means: means for the metrics by name (`mean_names`).
    """

    total: Float[Array, ""]
    main: Float[Array, ""]
    means: dict[str, Mean]


def summed_losses(
    model: ModelConfig, cp: ContextParallel | None = None
) -> Callable[[Any, Batch], Losses]:
    """Return a function `(params, batch) -> Losses`; to be traced.

    Raises:
        NotImplementedError: if activations are offloaded and the devices do not support it.
        ValueError: when called, if the batch lacks the targets of the model's depths.
    """
    if model.offload_activations and cp is not None:
        host_memory.require(cp.mesh)
    graphdef, _ = abstract_model(model)

    def losses(params: Any, batch: Batch) -> Losses:
        transformer = nnx.merge(graphdef, params)
        mask, positions = batch["mask"], batch["positions"]

        def summed(hidden: Any, targets: Any, weights: Any) -> Float[Array, ""]:
            return summed_cross_entropy(
                hidden,
                transformer.unembedding,
                targets,
                weights,
                cp=cp,
                chunk=model.loss_chunk,
                soft_cap=model.final_soft_cap,
                z_loss=model.z_loss,
            )

        further = _further(batch, model.mtp_depths) if model.mtp_depths else None
        hidden, sums = transformer.hidden_and_sums(batch["tokens"], positions, mask=mask, cp=cp)
        main = summed(hidden, batch["targets"], batch["weights"])
        if further is None:
            return _with_routers(model, cp, Losses(main, main, {}), sums, batch)
        targets, weights = further
        # Depth d embeds the targets of the depth before.
        before = jnp.concatenate([batch["targets"][..., None], targets[..., :-1]], axis=-1)
        outputs, more = transformer.further(hidden, before, positions, mask=mask, cp=cp)
        by_depth = jnp.stack(
            [summed(x, targets[..., d], weights[..., d]) for d, x in enumerate(outputs)]
        )
        total = main + model.mtp_loss_weight * jnp.mean(by_depth)
        means = depth_means(by_depth, weights)
        sums = None if sums is None else jax.tree.map(jnp.add, sums, more)
        return _with_routers(model, cp, Losses(total, main, means), sums, batch)

    return losses


def values(means: dict[str, Mean]) -> dict[str, Float[Array, ""]]:
    """Return the means as metrics; a mean of nothing is 0."""
    return {name: mean.total / nonzero(mean.tokens) for name, mean in means.items()}


def _with_routers(
    model: ModelConfig,
    cp: ContextParallel | None,
    losses: Losses,
    sums: RouterSums | None,
    batch: Batch,
) -> Losses:
    """Add the losses and means of the routers."""
    if sums is None or model.moe is None:
        return losses
    # `sums.tokens` counts each token once per layer, so this is Σ over layers of means over tokens.
    layers = sum(model.moe.has_experts(number) for number in model.computed_layers)
    weight, tokens = (_over_devices(x, cp) for x in (jnp.sum(batch["weights"]), sums.tokens))
    total = losses.total + router_loss(model.moe, sums, layers * weight / nonzero(tokens))
    return Losses(total, losses.main, losses.means | router_means(model, sums))


def _over_devices(x: Float[Array, ""], cp: ContextParallel | None) -> Float[Array, ""]:
    """Return the sum over the devices of a `shard_map` around the model; `x` itself elsewhere."""
    if cp is None:
        return x
    manual = tuple(spmd.manual_axes(cp.mesh_in_context, cp.flat_axes))
    total: Float[Array, ""] = jax.lax.psum(x, manual) if manual else x
    return total


def make_eval_loss(
    model: ModelConfig, cp: ContextParallel | None = None
) -> Callable[[Any, Batch], dict[str, Float[Array, ""]]]:
    """Return a jitted function `(params, batch) -> {"loss", "tokens"}`: the loss without a step.

    To average over batches, weight each loss with its "tokens". The
    means of `mean_names` come with it.
    """
    losses = summed_losses(model, cp)

    def eval_loss(params: Any, batch: Batch) -> dict[str, Float[Array, ""]]:
        tokens, found = jnp.sum(batch["weights"]), losses(params, batch)
        loss = {"loss": found.main / nonzero(tokens), "tokens": tokens}
        return loss | values(found.means)

    return jax.jit(eval_loss)


def nonzero(tokens: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Return `tokens`, or 1 where it is 0, so that a mean of nothing is 0, not NaN."""
    return jnp.where(tokens > 0, tokens, 1)


def _further(batch: Batch, depths: int) -> tuple[Any, Any]:
    """Return the targets and weights of the depths; refuse a batch that has not as many."""
    targets, weights = batch.get("mtp_targets"), batch.get("mtp_weights")
    if targets is None or weights is None or targets.shape[2] != depths:
        held = "none" if targets is None or weights is None else f"those of {targets.shape[2]}"
        raise ValueError(
            f"the model has mtp_depths={depths}, so a batch needs mtp_targets and mtp_weights of "
            f"{depths} depths, but has {held}: make_batches(mtp_depths={depths}) gives them, and "
            "hcp_jax.models.mtp.look_ahead adds them to a batch of your own."
        )
    return targets, weights
