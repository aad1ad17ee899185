"""Predict several tokens ahead, in the form of DeepSeek-V3 (2024, section 2.2).

    depth d at token i:   h_i^d = layer_d(projection([norm(embedding of t_(i+d)), norm(h_i^(d-1))]))
    predicts              t_(i+d+1), by the model's own output matrix

with h^0 the hidden states of the model, after its last norm. The embedding and the output matrix
are the model's; each depth has its own norms, projection and layer. Its layer sees the same tokens
as the model's layers do, at the same positions.

The targets of all depths come with the batch: the host reads them from the documents, so a stream
may be cut in any layout or into groups. Depth d embeds what the depth before it predicts, so no
other array is needed. `look_ahead` is for batches that have been made without them.
"""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int32

from hcp_jax.base import checks
from hcp_jax.models import rules
from hcp_jax.models.config import ModelConfig
from hcp_jax.models.layers import decoder
from hcp_jax.models.layers.moe_documents import RoutedTokens
from hcp_jax.models.layers.moe_router import RouterSums, no_sums
from hcp_jax.models.layers.norm import make_norm
from hcp_jax.models.specs import LayerSpec
from hcp_jax.models.stacks import LAYER_INPUT, constrained, remat, routed_tokens
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.sequence.mask import Mask
from hcp_jax.sequence.placed_mask import PlacedMask


class MTPDepth(nnx.Module):
    """One depth: norms, projection and layer.

    Args:
        spec: the layer.
        rngs: of the parameters.
    """

    def __init__(self, spec: LayerSpec, *, rngs: nnx.Rngs):
        size = spec.mixer.hidden_size
        self.enorm, self.hnorm = (make_norm(spec.norm, size, rngs) for _ in range(2))
        self.eh_proj = nnx.Linear(
            2 * size,
            size,
            use_bias=False,
            kernel_init=nnx.initializers.variance_scaling(1.0, "fan_in", "normal"),
            dtype=spec.norm.dtype,
            rngs=rngs,
        )
        self.layer = decoder.DecoderLayer(spec, rngs=rngs)
        self.norm = make_norm(spec.norm, size, rngs)

    def __call__(
        self,
        hidden: Float[Array, "B T D"],
        embedded: Float[Array, "B T D"],
        shared: Any,
        tokens: RoutedTokens | None,
        cp: ContextParallel | None,
    ) -> tuple[Float[Array, "B T D"], RouterSums | None]:
        """Return this depth's hidden states, before its last norm, and the sums of its router.

        Args:
            hidden: those of the depth before.
            embedded: embeddings of the tokens that the depth before predicts.
            shared: what the mixer's `share` returned.
            tokens: needed by a router only.
            cp: context with one comm type; None for one device.
        """
        both = jnp.concatenate([self.enorm(embedded), self.hnorm(hidden)], axis=-1)
        return self.layer(self.eh_proj(both), shared, tokens, cp)


def apply_depths(
    depths: MTPDepth,
    config: ModelConfig,
    hidden: Float[Array, "B T D"],
    embedded: Callable[[int], Float[Array, "B T D"]],
    batch: tuple[Int32[Array, "B T"], Mask | PlacedMask],
    cp: ContextParallel | None,
) -> tuple[list[Float[Array, "B T D"]], RouterSums | None]:
    """Return each depth's hidden states, after its norm; inside `spmd.run`.

    The sums of the depths' routers come with them; None if the model has no experts.

    Args:
        depths: from `make_depths`.
        config: the model.
        hidden: hidden states of the model, after its last norm.
        embedded: returns the embeddings of the tokens that a depth embeds, by its number from 0.
        batch: positions and mask, as in `Transformer.__call__`.
        cp: as in `Transformer.__call__`.
    """
    positions, mask = batch
    total = None if config.moe is None else no_sums()
    tokens = routed_tokens(config, mask, positions, positions.shape, cp)
    last = config.specs[-1].mixer
    shared = decoder.MIXERS[type(last)].share(last, positions, mask, config.widest_window)
    layer_cp = None if cp is None else cp.for_layer(config.num_layers - 1)
    graphdef, params = nnx.split(depths)

    def depth(params: Any, hidden: Any, embedded: Any) -> Any:
        hidden = checkpoint_name(hidden, LAYER_INPUT)
        depth = nnx.merge(graphdef, params)
        hidden, sums = depth(hidden, embedded, shared, tokens, layer_cp)
        return constrained(hidden, cp), sums

    depth = remat(depth, config, 1)
    outputs = []
    for number in range(config.mtp_depths):
        own = jax.tree.map(operator.itemgetter(number), params)
        hidden, sums = depth(own, hidden, embedded(number))
        total = total if sums is None else jax.tree.map(jnp.add, total, sums)
        outputs.append(nnx.merge(graphdef, own).norm(hidden))
    return outputs, total


def make_depths(spec: LayerSpec, depths: int, rngs: nnx.Rngs) -> MTPDepth:
    """Return depths with stacked parameters: a leading dim of `depths`."""
    made: MTPDepth = nnx.vmap(lambda rngs: MTPDepth(spec, rngs=rngs))(rngs.split(depths))
    return made


def rule(path: tuple[str, ...]) -> rules.Rule:
    """Return the rule of a depth's parameter by its path inside the depth."""
    return decoder.rule(path[1:]) if path[0] == "layer" else rules.find({}, path)


def look_ahead(
    targets: Int32[Array | np.ndarray, "B T"],
    weights: Float[Array | np.ndarray, "B T"],
    positions: Int32[Array | np.ndarray, "B1 T"],
    depths: int,
    *,
    cp: ContextParallel | None = None,
) -> tuple[Int32[Array | np.ndarray, "B T n"], Float[Array | np.ndarray, "B T n"]]:
    """Return the targets 1 to `depths` places further on in each token's document, and weights.

    They are the batch's `mtp_targets` and `mtp_weights`. Past the end of the document, or of its
    part in this stream, both are 0.

    Args:
        targets: token to predict at each position.
        weights: weight of each position.
        positions: number of tokens of the same document before each token.
        depths: number of depths n, 1 or more.
        cp: None for a batch in natural order, such as host arrays before `cp.shard_batch`; a
            context for arrays in its layout, which `cp.roll` moves across devices.

    Raises:
        ValueError: if there is no depth.
        NotImplementedError: if `cp` has groups: their targets come with the batch.

    >>> targets, positions = np.array([[11, 12, 0, 21, 0]]), np.array([[0, 1, 2, 0, 1]])
    >>> further, weights = look_ahead(targets, np.ones((1, 5)), positions, 2)
    >>> further[..., 0].tolist(), further[..., 1].tolist()
    ([[12, 0, 0, 0, 0]], [[0, 0, 0, 0, 0]])
    >>> weights[..., 0].tolist()
    [[1.0, 1.0, 0.0, 1.0, 0.0]]
    """
    depths = checks.integer("depths", depths, least=1)
    xp: Any = jnp if isinstance(targets, jax.Array) else np

    def moved(x: Any, depth: int) -> Any:
        return xp.roll(x, -depth, 1) if cp is None else cp.roll(x, -depth, dim=1)

    def further(x: Any) -> Any:
        # Positions begin at 0 in each document, so after a border, or around the end of the
        # stream, they are less than here.
        kept = [
            moved(x, d) * (moved(positions, d) == positions + d).astype(x.dtype)
            for d in range(1, depths + 1)
        ]
        return xp.stack(kept, axis=-1)

    return further(targets), further(weights)
