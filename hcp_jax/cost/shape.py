"""The arithmetic of a decoder's training step, as MFU counts it.

Counted is what the model needs, not what a run spends: nothing that remat computes again, none of
the softmax, norms and activations, and of attention the (query, key) pairs that the mask shows, as
they are in the batch: a packed stream of short documents has fewer than a long document. (Many
count T² pairs, or half of them, for any batch; then packing, or a window, would seem to raise
MFU.) Backward is twice forward (PaLM: Chowdhery et al., 2022, appendix B):

    matrix products   6 · weights · tokens           output head included, embedding lookup not
    attention         12 · heads · H · pairs         in every layer: two products of 2 FLOPs, thrice
"""

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hcp_jax.mask import Mask


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """What the cost of a decoder depends on; the words are `ModelConfig`'s."""

    vocab_size: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    tie_embeddings: bool = False
    sliding_window: int | None = None
    loss_chunk: int = 1024

    @classmethod
    def of(cls, config: Any) -> "ModelShape":
        """The shape of a `ModelConfig`."""
        named = {f.name: getattr(config, f.name) for f in dataclasses.fields(cls)}
        return cls(**named | {"head_size": config.head_dim})

    @property
    def layer_params(self) -> int:
        """Weights of one layer's matrix products."""
        heads = (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_size
        return self.hidden_size * (heads + 3 * self.intermediate_size)

    @property
    def head_params(self) -> int:
        """Weights of the output head."""
        return self.vocab_size * self.hidden_size

    @property
    def params(self) -> int:
        """All parameters, norms included."""
        embeddings = self.head_params * (1 if self.tie_embeddings else 2)
        norms = (2 * self.num_layers + 1) * self.hidden_size
        return self.num_layers * self.layer_params + embeddings + norms

    @property
    def mask(self) -> "Mask":
        """What it attends with: causal, within its window."""
        from hcp_jax.mask import causal, sliding_window

        if self.sliding_window is None:
            return causal()
        return causal() & sliding_window(self.sliding_window)


def step_flops(model: ModelShape, tokens: float, pairs: float) -> float:
    """FLOPs of a training step, of all devices together.

    Args:
        model: the decoder.
        tokens: in the step.
        pairs: visible (query, key) pairs of all its streams, of one head of one layer.

    >>> tiny = ModelShape(10, 1, 4, 8, 2, 1, 2)
    >>> step_flops(tiny, 5, 15) == 6 * (4 * (12 + 24) + 40) * 5 + 12 * 2 * 2 * 15
    True
    """
    weights = model.num_layers * model.layer_params + model.head_params
    per_pair = model.num_layers * model.num_heads * model.head_size
    return 6.0 * weights * tokens + 12.0 * per_pair * pairs
