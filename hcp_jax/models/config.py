"""Define the config of a decoder; separate from the model, so that reading it builds nothing."""

import dataclasses
from dataclasses import field
from typing import TYPE_CHECKING, Literal, get_args

from hcp_jax.base.settings import MOST, check, fixed, free, numbers
from hcp_jax.models.layers.rope_scaling import RopeScaling

if TYPE_CHECKING:
    from hcp_jax.sequence.mask import Mask

Remat = Literal["none", "attention", "full"]
ComputeDtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Llama kind; parameters are float32.

    Attributes:
        vocab_size: V.
        num_layers: L.
        hidden_size: D.
        intermediate_size: F, of the MLP.
        num_heads: N, query heads.
        num_kv_heads: K, key and value heads; N / K query heads share one.
        head_size: H; hidden_size / num_heads if None.
        rope_theta: base of the rotary frequencies.
        rope_scaling: how the frequencies are stretched; None if they are not.
        qk_norm: RMSNorm of q and k, per head, before the rotation (Qwen3).
        qkv_bias: a bias on q, k and v (Qwen2).
        tie_embeddings: the output head is the embedding.
        norm_eps: epsilon of every RMSNorm.
        sliding_window: number of tokens that a query sees, itself included; None for all earlier
            tokens.
        logits_soft_cap: soft cap of the attention logits; None for no cap.
        attention_sinks: a learnt logit per head that takes part in the softmax but adds no value.
        remat: what a layer's backward pass recomputes: "none", "attention" (everything except
            attention, whose outputs are kept) or "full" (the whole layer).
        offload_activations: keep what a layer needs for its backward pass (its input, and what
            `remat` keeps) in the host's memory.
        compute_dtype: dtype of activations, and of weights when they are used.
        mlp_chunk: number of tokens per device in one chunk of the MLP, which is recomputed in
            backward; None computes all tokens at once.
        loss_chunk: number of tokens per device whose logits exist at one time.
        z_loss: weight of the squared log-partition of the output head (PaLM uses 1e-4).
        implementation: implementation of the attention core; None for the best on the mesh's
            devices.

    Raises:
        ValueError: if sizes do not fit each other.
    """

    vocab_size: int = field(metadata=fixed(above=0, most=MOST))
    num_layers: int = field(metadata=fixed(above=0, most=100_000))
    hidden_size: int = field(metadata=fixed(above=0, most=MOST))
    intermediate_size: int = field(metadata=fixed(above=0, most=MOST))
    num_heads: int = field(metadata=fixed(above=0, most=MOST))
    num_kv_heads: int = field(metadata=fixed(above=0, most=MOST))
    head_size: int | None = field(default=None, metadata=fixed(above=0, most=MOST))
    rope_theta: float = field(default=10_000.0, metadata=numbers(above=1, most=1e15))
    rope_scaling: RopeScaling | None = field(default=None, metadata=numbers())
    qk_norm: bool = field(default=False, metadata=fixed())
    qkv_bias: bool = field(default=False, metadata=fixed())
    tie_embeddings: bool = field(default=False, metadata=fixed())
    norm_eps: float = field(default=1e-5, metadata=numbers(least=1e-30, most=1.0))
    sliding_window: int | None = field(default=None, metadata=numbers(above=0, most=MOST))
    logits_soft_cap: float | None = field(default=None, metadata=numbers(above=0, most=1e9))
    attention_sinks: bool = field(default=False, metadata=fixed())
    remat: Remat = field(default="attention", metadata=free())
    offload_activations: bool = field(default=False, metadata=free())
    compute_dtype: ComputeDtype = field(default="bfloat16", metadata=numbers())
    mlp_chunk: int | None = field(default=None, metadata=free(above=0, most=MOST))
    loss_chunk: int = field(default=1024, metadata=free(above=0, most=MOST))
    z_loss: float = field(default=0.0, metadata=numbers(least=0, most=1e6))
    implementation: str | None = field(default=None, metadata=free())

    def __post_init__(self):
        check(self, "model.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of "
                f"num_kv_heads={self.num_kv_heads}: query heads share kv heads in equal groups."
            )
        if self.head_size is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}; "
                "change one of them or give head_size."
            )
        if self.head_dim % 2:
            raise ValueError(f"the head size is {self.head_dim}; rotary embeddings need it even.")
        for name, choices in (("remat", Remat), ("compute_dtype", ComputeDtype)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(
                    f"{name} must be one of {', '.join(get_args(choices))}, "
                    f"got {getattr(self, name)!r}."
                )

        if self.offload_activations and self.remat == "none":
            raise ValueError(
                "offload_activations needs remat 'attention' or 'full', which name what is kept; "
                "got 'none'."
            )

    @property
    def head_dim(self) -> int:
        """Head size H: `head_size`, or hidden_size / num_heads."""
        return self.head_size or self.hidden_size // self.num_heads

    def mask(self, segment_ids=None) -> "Mask":
        """Return the attention mask of this model, in natural order.

        Args:
            segment_ids: int32 `[B, T]`, equal for the tokens of one document; None if each stream
                is one document.
        """
        from hcp_jax.sequence.mask import causal, documents, sliding_window

        mask = causal()
        if segment_ids is not None:
            mask = mask & documents(segment_ids)
        if self.sliding_window is not None:
            mask = mask & sliding_window(self.sliding_window)
        return mask
