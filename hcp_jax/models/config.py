"""What a decoder is made of. Apart from the model, so that reading a config builds nothing."""

import dataclasses
from typing import Literal, get_args

from hcp_jax import checks
from hcp_jax.mask import Mask, causal, documents
from hcp_jax.mask import sliding_window as window_mask
from hcp_jax.models.rope import RopeScaling

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
        rope_scaling: how they are stretched; None if they are not.
        qk_norm: RMSNorm of q and k, per head, before they are rotated (Qwen3).
        qkv_bias: a bias on q, k and v (Qwen2).
        tie_embeddings: the output head is the embedding.
        norm_eps: epsilon of every RMSNorm.
        sliding_window: tokens a query sees, itself included; None for all before it.
        logits_soft_cap: of the attention's logits.
        attention_sinks: one learnt logit per head that takes weight and gives none.
        remat: what a layer's backward pass recomputes: "none" of it; all but "attention", whose
            outputs are kept; or the "full" layer.
        offload_activations: whether what a layer keeps for its backward pass (its input, and what
            `remat` names) waits for it in the host's memory.
        compute_dtype: of activations and of weights in use.
        mlp_chunk: tokens per device that the MLP computes at one time, and again in backward; None
            for all of them, once.
        loss_chunk: tokens per device whose logits exist at one time.
        z_loss: weight of the squared log-partition of the output head (PaLM uses 1e-4).
        implementation: of the attention core; None for the best on the devices at hand.

    Raises:
        ValueError: for sizes that do not fit each other.
    """

    vocab_size: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int | None = None
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    qk_norm: bool = False
    qkv_bias: bool = False
    tie_embeddings: bool = False
    norm_eps: float = 1e-5
    sliding_window: int | None = None
    logits_soft_cap: float | None = None
    attention_sinks: bool = False
    remat: Remat = "attention"
    offload_activations: bool = False
    compute_dtype: ComputeDtype = "bfloat16"
    mlp_chunk: int | None = None
    loss_chunk: int = 1024
    z_loss: float = 0.0
    implementation: str | None = None

    def __post_init__(self):
        for name in ("vocab_size", "num_layers", "hidden_size", "intermediate_size"):
            checks.integer(name, getattr(self, name), least=1)
        for name in ("num_heads", "num_kv_heads", "loss_chunk"):
            checks.integer(name, getattr(self, name), least=1)
        for name in ("head_size", "sliding_window", "mlp_chunk"):
            if getattr(self, name) is not None:
                checks.integer(name, getattr(self, name), least=1)
        if self.logits_soft_cap is not None:
            checks.soft_cap("logits_soft_cap", self.logits_soft_cap)
        for name, above in (("rope_theta", 0), ("norm_eps", 0), ("z_loss", None)):
            value = checks.number(name, getattr(self, name))
            if value < 0 or value == above:
                raise ValueError(f"{name} must be positive, got {value!r}.")
        for name in ("qk_norm", "qkv_bias", "tie_embeddings", "attention_sinks"):
            checks.boolean(name, getattr(self, name))
        checks.boolean("offload_activations", self.offload_activations)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of "
                f"num_kv_heads={self.num_kv_heads}: query heads share kv heads in equal groups."
            )
        if self.head_size is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is no multiple of num_heads={self.num_heads}; "
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
                "offload_activations needs remat 'attention' or 'full', which say by name what is "
                "kept; it is 'none'."
            )

    @property
    def head_dim(self) -> int:
        """H, whether it was given or not."""
        return self.head_size or self.hidden_size // self.num_heads

    def mask(self, segment_ids=None) -> Mask:
        """The mask this model attends with, in natural order.

        Args:
            segment_ids: int32 `[B, T]`, equal for the tokens of one document; None for streams that
                are one document each.
        """
        mask = causal()
        if segment_ids is not None:
            mask = mask & documents(segment_ids)
        if self.sliding_window is not None:
            mask = mask & window_mask(self.sliding_window)
        return mask
