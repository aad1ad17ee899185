"""Define the config of a decoder; separate from the model, so that reading it builds nothing."""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import field
from typing import TYPE_CHECKING, Any, Literal, get_args

from hcp_jax.base.settings import MOST, check, fixed, fixed_later, free, numbers
from hcp_jax.models import layer_specs, pattern, specs
from hcp_jax.models.layers.rope_scaling import RopeScaling
from hcp_jax.models.moe_config import MoEConfig
from hcp_jax.models.pattern import LayerConfig, MixerKind
from hcp_jax.models.recurrent_specs import (
    GatedDeltaConfig,
    KDAConfig,
    Mamba2Config,
)
from hcp_jax.models.specs import (
    Activation,
    LayerSpec,
    Norms,
    NormSpec,
    QKNorm,
)

if TYPE_CHECKING:
    from hcp_jax.sequence.mask import Mask

RematSetting = Literal["auto", "none", "mlp", "projections", "attention", "full"]
ComputeDtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder: an embedding, layers of attention and MLP, and a head; parameters are float32.

    By default it is of the Llama kind. Settings of attention, MLP and norms hold for all layers,
    except where `layers` gives a layer its own.

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
        layers: a pattern of layers, repeated up to num_layers: letters, such as "WWWWWA" (W:
            attention with sliding_window, A: without), or a list with the settings of each layer
            that differ from the model's (see `LayerConfig`); None if all layers are alike.
        rotary: rotate q and k; without, attention has no positions (NoPE).
        rotary_share: share of each head's dims that are rotated, the first ones.
        attention_scale: factor of the attention logits; 1 / sqrt(head size) if None.
        qk_norm_over: what qk_norm normalises: each "head", or all "heads" together (OLMo 2).
        o_bias: a bias on the output of attention.
        output_gate: multiply the output of attention, before its last product, by a learnt sigmoid
            per entry (Qwen3-Next).
        activation: activation of the MLP: "silu" (SwiGLU), "gelu_tanh" (GeGLU) or "clamped_silu"
            (gpt-oss).
        mlp_bias: a bias on each product of the MLP.
        norms: where a layer has RMSNorm: "before" attention and MLP (Llama), "after" them (OLMo
            2), or "both" (Gemma 3).
        norm_shifted: the parameter of every RMSNorm is its scale minus 1 (Gemma).
        embedding_scale: factor of the embeddings; 1 if None (Gemma: sqrt(hidden_size)).
        final_soft_cap: soft cap of the output logits; None for no cap.
        mtp_depths: number of tokens predicted beyond the next one, each by a depth of its own
            (multi-token prediction, DeepSeek-V3: `models/mtp.py`).
        mtp_loss_weight: weight of their losses' mean, beside 1 for the main loss.
        moe: mixture of experts in place of the MLP; None for none (see `MoEConfig`).
        mixer: what mixes tokens: "attention", or a recurrence: "mamba2" (Mamba-2), "gated_delta"
            (gated delta net, as in Qwen3-Next) or "kda" (Kimi delta attention).
        mamba2: sizes of the Mamba-2 layers; None if there are none.
        gated_delta: sizes of the gated delta nets; None if there are none.
        kda: sizes of the KDA layers; None if there are none.
        remat: what a layer's backward pass recomputes, from the least to the most: "none"; "mlp"
            (norms, rotations and activations), "projections" (of the products those of the MLP
            and of experts alone), "attention" (everything except attention, whose outputs are
            kept) or "full" (the whole layer). With "auto", `hcp train` and `hcp audit` take the
            least that fits the GPU by the model of memory; elsewhere it means "attention".
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
    remat: RematSetting = field(default="attention", metadata=free())
    offload_activations: bool = field(default=False, metadata=free())
    compute_dtype: ComputeDtype = field(default="bfloat16", metadata=numbers())
    mlp_chunk: int | None = field(default=None, metadata=free(above=0, most=MOST))
    loss_chunk: int = field(default=1024, metadata=free(above=0, most=MOST))
    z_loss: float = field(default=0.0, metadata=numbers(least=0, most=1e6))
    implementation: str | None = field(default=None, metadata=free())
    layers: str | tuple[LayerConfig, ...] | None = field(default=None, metadata=fixed_later())
    rotary: bool = field(default=True, metadata=numbers())
    rotary_share: float = field(default=1.0, metadata=numbers(above=0, most=1.0))
    attention_scale: float | None = field(default=None, metadata=numbers(above=0, most=1e9))
    qk_norm_over: QKNorm = field(default="head", metadata=fixed_later())
    o_bias: bool = field(default=False, metadata=fixed_later())
    output_gate: bool = field(default=False, metadata=fixed_later())
    activation: Activation = field(default="silu", metadata=numbers())
    mlp_bias: bool = field(default=False, metadata=fixed_later())
    norms: Norms = field(default="before", metadata=fixed_later())
    norm_shifted: bool = field(default=False, metadata=numbers())
    embedding_scale: float | None = field(default=None, metadata=numbers(above=0, most=1e9))
    final_soft_cap: float | None = field(default=None, metadata=numbers(above=0, most=1e9))
    mtp_depths: int = field(default=0, metadata=fixed_later(least=0, most=64))
    mtp_loss_weight: float = field(default=0.3, metadata=numbers(least=0, most=1e6))
    moe: MoEConfig | None = field(default=None, metadata=fixed_later())
    mixer: MixerKind = field(default="attention", metadata=fixed_later())
    mamba2: Mamba2Config | None = field(default=None, metadata=numbers())
    gated_delta: GatedDeltaConfig | None = field(default=None, metadata=numbers())
    kda: KDAConfig | None = field(default=None, metadata=numbers())

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
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in get_args(choices):
                raise ValueError(
                    f"{name} must be one of {', '.join(get_args(choices))}, "
                    f"got {getattr(self, name)!r}."
                )
        _plan(self)  # reads the layers, and checks each of them
        layer_specs.check_used(self)
        if self.offload_activations and self.remat == "none":
            raise ValueError(
                "offload_activations needs remat 'attention' or 'full', which name what is kept; "
                "got 'none'."
            )
        if self.mlp_chunk is not None and self.remat == "mlp":
            raise ValueError(
                "remat='mlp' keeps the MLP's products, and mlp_chunk recomputes them; use "
                "remat='projections', or mlp_chunk=null."
            )

    @property
    def head_dim(self) -> int:
        """Head size H: `head_size`, or hidden_size / num_heads."""
        return self.head_size or self.hidden_size // self.num_heads

    @property
    def norm_spec(self) -> NormSpec:
        """Spec of every RMSNorm."""
        return NormSpec(self.norm_eps, self.norm_shifted, self.compute_dtype)

    @property
    def plan(self) -> specs.Plan:
        """How the layers are stacked."""
        return _plan(self)

    @property
    def specs(self) -> tuple[LayerSpec, ...]:
        """The spec of each layer, in order."""
        return _specs(self)

    @property
    def computed_layers(self) -> tuple[int, ...]:
        """The number of every layer that is computed; the last layer's again for each MTP depth.

        The layer of a depth has the spec and the comm type of the last layer.
        """
        return (*range(self.num_layers), *[self.num_layers - 1] * self.mtp_depths)

    @property
    def widest_window(self) -> int | None:
        """The widest window of an attention layer; None if one sees all earlier tokens."""
        windows = [layer.mixer.window for layer in self.specs if layer.mixer.pair_width]
        return None if None in windows else max((w for w in windows if w is not None), default=None)

    @property
    def window_shares(self) -> dict[int | None, float]:
        """The share of all layers' attention width (heads times head size) by window.

        Empty if no layer attends.
        """
        widths: dict[int | None, int] = {}
        for mixer in (self.specs[layer].mixer for layer in self.computed_layers):
            if mixer.pair_width:
                widths[mixer.window] = widths.get(mixer.window, 0) + mixer.pair_width
        total = sum(widths.values())
        return {window: width / total for window, width in widths.items()}

    def mask(self, segment_ids=None) -> "Mask":
        """Return the attention mask of the model's widest layer, in natural order.

        Layers with a narrower window than that join it with this mask themselves.

        Args:
            segment_ids: int32 `[B, T]`, equal for the tokens of one document; None if each stream
                is one document.
        """
        return self._mask(segment_ids, None)

    def packed_mask(self, segment_ids) -> "Mask":
        """Return the same for packed streams, where tokens with segment id 0 are padding."""
        return self._mask(segment_ids, 0)

    def _mask(self, segment_ids, padding_id: int | None) -> "Mask":
        from hcp_jax.sequence.mask import causal, documents, sliding_window

        mask = causal()
        if segment_ids is not None:
            mask = mask & documents(segment_ids, padding_id=padding_id)
        if self.widest_window is not None:
            mask = mask & sliding_window(self.widest_window)
        return mask


def from_fields(fields: Mapping[str, Any]) -> ModelConfig:
    """Return the config of fields that are plain data, such as those of a named model.

    >>> from hcp_jax.cost.models import model_fields
    >>> from_fields(model_fields("qwen3-30b-a3b")).moe.num_experts
    128
    """

    def layer(own: Mapping[str, Any]) -> LayerConfig:
        scaling = own.get("rope_scaling")
        made = {"rope_scaling": RopeScaling(**scaling)} if isinstance(scaling, Mapping) else {}
        return LayerConfig(**{**own, **made})

    made = dict(fields)
    if isinstance(made.get("moe"), Mapping):
        made["moe"] = MoEConfig(**made["moe"])
    if isinstance(made.get("layers"), list):
        made["layers"] = tuple(map(layer, made["layers"]))
    return ModelConfig(**made)


_CHOICES: dict[str, Any] = {
    "mixer": MixerKind,
    "remat": RematSetting,
    "compute_dtype": ComputeDtype,
    "qk_norm_over": QKNorm,
    "activation": Activation,
    "norms": Norms,
}


@functools.lru_cache(maxsize=64)
def _plan(config: ModelConfig) -> specs.Plan:
    return specs.plan(_specs(config))


@functools.lru_cache(maxsize=64)
def _specs(config: ModelConfig) -> tuple[LayerSpec, ...]:
    found = pattern.overrides(config.layers, config.num_layers, config.sliding_window)
    return tuple(layer_specs.layer(config, own, number) for number, own in enumerate(found))
