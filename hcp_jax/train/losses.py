"""Sum the losses of a microbatch: of the next token, and of those that are predicted further on.

    total = Σ weight · loss  +  mtp_loss_weight · mean over depths of Σ weight · loss of a depth

All are sums over tokens, and every part of the total is divided by the weight of the next tokens of
the whole step, as DeepSeek-V3 does (2024, equations 24 and 25). So a step may be cut into any
microbatches, with any number of targets at each depth. The losses that are reported by depth are
means over the tokens that have a target there.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from hcp_jax.models.config import ModelConfig
from hcp_jax.models.layers.loss import summed_cross_entropy
from hcp_jax.models.transformer import abstract_model
from hcp_jax.parallel import host_memory
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.train.batch import Batch


class Losses(NamedTuple):
    """Sums over the tokens of a microbatch, in nats.

    Attributes:
        total: what is trained on.
        main: Σ weight · loss of the next tokens.
        depths: float32[2, D] with Σ weight · loss and Σ weight of each depth of multi-token
            prediction; None without.
    """

    total: Float[Array, ""]
    main: Float[Array, ""]
    depths: Float[Array, "2 D"] | None


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

        hidden = transformer(batch["tokens"], positions, mask=mask, cp=cp)
        main = summed(hidden, batch["targets"], batch["weights"])
        if not model.mtp_depths:
            return Losses(main, main, None)
        targets, weights = _further(batch, model.mtp_depths)
        # Depth d embeds the targets of the depth before.
        before = jnp.concatenate([batch["targets"][..., None], targets[..., :-1]], axis=-1)
        outputs = transformer.further(hidden, before, positions, mask=mask, cp=cp)
        by_depth = jnp.stack(
            [summed(x, targets[..., d], weights[..., d]) for d, x in enumerate(outputs)]
        )
        total = main + model.mtp_loss_weight * jnp.mean(by_depth)
        return Losses(total, main, jnp.stack([by_depth, jnp.sum(weights, axis=(0, 1))]))

    return losses


def mtp_metrics(depths: Float[Array, "2 D"] | None) -> dict[str, Float[Array, ""]]:
    """Return "mtp_loss_1" and so on: each depth's loss in nats per token that has a target.

    Args:
        depths: `Losses.depths`, summed over the step; None gives no metrics.
    """
    if depths is None:
        return {}
    means = depths[0] / nonzero(depths[1])
    return {f"mtp_loss_{d + 1}": means[d] for d in range(means.size)}


def make_eval_loss(
    model: ModelConfig, cp: ContextParallel | None = None
) -> Callable[[Any, Batch], dict[str, Float[Array, ""]]]:
    """Return a jitted function `(params, batch) -> {"loss", "tokens"}`: the loss without a step.

    To average over batches, weight each loss with its "tokens". With multi-token prediction, the
    loss of each depth (`mtp_metrics`) comes with it.
    """
    losses = summed_losses(model, cp)

    def eval_loss(params: Any, batch: Batch) -> dict[str, Float[Array, ""]]:
        tokens, found = jnp.sum(batch["weights"]), losses(params, batch)
        loss = {"loss": found.main / nonzero(tokens), "tokens": tokens}
        return loss | mtp_metrics(found.depths)

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
