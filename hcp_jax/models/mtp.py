"""Predict several tokens ahead, in the form of DeepSeek-V3 (2024, section 2.2).

    depth d at token i:   h_i^d = layer_d(projection([norm(embedding of t_(i+d)), norm(h_i^(d-1))]))
    predicts              t_(i+d+1), by the model's own output matrix

with h^0 the hidden states of the main model. The embedding and the output matrix are the model's;
each depth has its own norms, projection and layer. The tokens `d` places on come with the batch
(`look_ahead` on the host), or from `look_ahead` with `cp`, which sends d tokens at each border.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32

from hcp_jax.base import checks
from hcp_jax.models.layers.loss import summed_cross_entropy
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.parallel.placing import Gathered


class Ahead(NamedTuple):
    """The tokens, targets and weights `depth` places further on in each token's own document.

    Where that place is past the document's end, the weight is 0 and token and target are 0.

    Attributes:
        tokens: what depth `depth` embeds.
        targets: what it predicts.
        weights: float32 weight of its loss.
    """

    tokens: Any
    targets: Any
    weights: Any


def look_ahead(
    tokens: Int32[Array | np.ndarray, "B T"] | Gathered,
    targets: Int32[Array | np.ndarray, "B T"] | Gathered,
    weights: Float[Array | np.ndarray, "B T"],
    positions: Int32[Array | np.ndarray, "B1 T"],
    depth: int,
    *,
    cp: ContextParallel | None = None,
) -> Ahead:
    """Return what stands `depth` places further on, never over a document's end.

    Args:
        tokens: token ids.
        targets: token to predict at each position.
        weights: weight of each position.
        positions: number of tokens of the same document before each token.
        depth: number of places, 1 or more.
        cp: None for a batch in natural order, such as host arrays before `cp.shard_batch`; a
            context for arrays in its layout, which are rolled across devices.

    Raises:
        ValueError: if `depth` is less than 1.

    >>> ids = np.array([[10, 11, 12, 20, 21]])
    >>> next_ids = np.array([[11, 12, 0, 21, 0]])
    >>> ahead = look_ahead(ids, next_ids, np.ones((1, 5)), np.array([[0, 1, 2, 0, 1]]), 1)
    >>> ahead.tokens.tolist(), ahead.targets.tolist(), ahead.weights.tolist()
    ([[11, 12, 0, 21, 0]], [[12, 0, 0, 0, 0]], [[1.0, 1.0, 0.0, 1.0, 0.0]])
    """
    depth = checks.integer("depth", depth, least=1)

    def further(x: Any) -> Any:
        if cp is not None:
            return cp.roll(x, -depth, dim=1)
        return jnp.roll(x, -depth, axis=1) if isinstance(x, jax.Array) else np.roll(x, -depth, 1)

    # Positions begin at 0 in each document, so after a border, or around the end of the stream,
    # they are less than here.
    inside = further(positions) == positions + depth

    def kept(x: Any) -> Any:
        if isinstance(x, Gathered):
            return x._replace(places=kept(x.places))
        moved = further(x)
        return moved * inside.astype(moved.dtype)

    return Ahead(kept(tokens), kept(targets), kept(weights))


class MTPDepth(nnx.Module):
    """One depth: norms, projection and layer.

    Attributes:
        layer: the depth's own decoder layer, as `make_layer` of `MTP` returned it.
    """

    def __init__(
        self,
        hidden_size: int,
        layer: nnx.Module,
        *,
        norm_eps: float,
        compute_dtype: str,
        rngs: nnx.Rngs,
    ):
        def norm() -> nnx.RMSNorm:
            return nnx.RMSNorm(hidden_size, epsilon=norm_eps, dtype=compute_dtype, rngs=rngs)

        self.enorm, self.hnorm = norm(), norm()
        self.eh_proj = nnx.Linear(
            2 * hidden_size,
            hidden_size,
            use_bias=False,
            kernel_init=nnx.initializers.variance_scaling(1.0, "fan_in", "normal"),
            dtype=compute_dtype,
            rngs=rngs,
        )
        self.layer = layer
        self.norm = norm()

    def __call__(
        self,
        hidden: Float[Array, "B T D"],
        embedded: Float[Array, "B T D"],
        apply: Callable[[Any, Any], Any],
    ) -> Float[Array, "B T D"]:
        """Return this depth's hidden states, before its last norm."""
        both = jnp.concatenate([self.enorm(embedded), self.hnorm(hidden)], axis=-1)
        return apply(self.layer, self.eh_proj(both))


class MTP(nnx.Module):
    """Depths of multi-token prediction.

    >>> def make_layer(rngs):
    ...     return nnx.Linear(8, 8, rngs=rngs)
    >>> mtp = MTP(8, 2, make_layer, rngs=nnx.Rngs(0))
    >>> hidden = jnp.ones((1, 4, 8))
    >>> outputs = mtp(hidden, [hidden, hidden], lambda layer, x: layer(x))
    >>> [x.shape for x in outputs]
    [(1, 4, 8), (1, 4, 8)]
    """

    def __init__(
        self,
        hidden_size: int,
        depths: int,
        make_layer: Callable[[nnx.Rngs], nnx.Module],
        *,
        norm_eps: float = 1e-5,
        compute_dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        depths = checks.integer("depths", depths, least=1)
        self.depths = nnx.List(
            MTPDepth(
                hidden_size,
                make_layer(rngs),
                norm_eps=norm_eps,
                compute_dtype=compute_dtype,
                rngs=rngs,
            )
            for _ in range(depths)
        )

    def __call__(
        self,
        hidden: Float[Array, "B T D"],
        embedded: Sequence[Float[Array, "B T D"]],
        apply: Callable[[Any, Any], Any],
    ) -> list[Float[Array, "B T D"]]:
        """Return the hidden states of each depth after its norm, ready for the output matrix.

        Args:
            hidden: hidden states of the main model.
            embedded: for each depth, the embeddings of `Ahead.tokens`.
            apply: called as `apply(layer, x)` to apply a depth's layer, with whatever mask,
                positions and context it needs.

        Raises:
            ValueError: if there are embeddings for another number of depths.
        """
        if len(embedded) != len(self.depths):
            raise ValueError(
                f"MTP has {len(self.depths)} depths, but there are embeddings for {len(embedded)}."
            )
        outputs = []
        for depth, further in zip(self.depths, embedded, strict=True):
            hidden = depth(hidden, further, apply)
            outputs.append(depth.norm(hidden))
        return outputs


def losses_by_depth(
    outputs: Sequence[Float[Array, "B T D"]],
    unembedding: Float[Array, "V D"],
    aheads: Sequence[Ahead],
    *,
    cp: ContextParallel | None = None,
    chunk: int = 1024,
) -> tuple[Float[Array, "n"], Float[Array, "n"]]:
    """Return each depth's summed cross entropy in nats, and the sum of its weights.

    Sums of microbatches can be added. A depth's mean loss is the one divided by the other, taken
    over the whole global batch; DeepSeek-V3 adds the mean of these means, times 0.3 (later 0.1).

    Args:
        outputs: of `MTP`.
        unembedding: the model's output matrix.
        aheads: of `look_ahead`, for depths 1, 2, ….
        cp: context; None for one device.
        chunk: number of tokens per device whose logits exist at one time.
    """
    sums = [
        summed_cross_entropy(hidden, unembedding, ahead.targets, ahead.weights, cp=cp, chunk=chunk)
        for hidden, ahead in zip(outputs, aheads, strict=True)
    ]
    return jnp.stack(sums), jnp.stack([jnp.sum(ahead.weights) for ahead in aheads])
