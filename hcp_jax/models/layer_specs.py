"""Build the spec of each layer from a model's config and the layer's own settings.

Functions take the `ModelConfig` as `Any`, because `config.py` imports this module.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from hcp_jax.models import pattern
from hcp_jax.models.pattern import MixerKind
from hcp_jax.models.recurrent_specs import GatedDeltaSpec, KDASpec, Mamba2Spec
from hcp_jax.models.specs import (
    AttentionSpec,
    FeedForward,
    LayerSpec,
    Mixer,
    MLPSpec,
    MoESpec,
    Rotary,
)


def layer(config: Any, own: Mapping[str, Any], number: int) -> LayerSpec:
    """Return the spec of a layer with settings of its own."""

    def get(name: str) -> Any:
        return own.get(name, getattr(config, name))

    kind = get("mixer")
    unused = sorted(pattern.ATTENTION_SETTINGS & set(own)) if kind != "attention" else []
    if unused:
        raise ValueError(
            f"model.layers: a layer with mixer={kind!r} has no {', '.join(unused)}, which only "
            "attention has; leave it out, or give it to another layer."
        )
    return LayerSpec(
        mixer=_MIXERS[kind](config, get),
        ffn=_feed_forward(config, get, number),
        norms=get("norms"),
        norm=config.norm_spec,
    )


def _feed_forward(config: Any, get: Callable[[str], Any], number: int) -> FeedForward:
    def mlp(size: int) -> MLPSpec:
        return MLPSpec(
            hidden_size=config.hidden_size,
            intermediate_size=size,
            activation=get("activation"),
            bias=get("mlp_bias"),
            depth=config.num_layers,
            dtype=config.compute_dtype,
            chunk=config.mlp_chunk,
        )

    moe = config.moe
    if moe is None or not moe.has_experts(number):
        return mlp(get("intermediate_size"))
    if get("mlp_bias"):
        raise NotImplementedError(
            "mlp_bias with model.moe is not supported: the biases of experts are model.moe.bias."
        )
    shared = moe.shared_expert_intermediate_size
    return MoESpec(
        hidden_size=config.hidden_size,
        num_experts=moe.num_experts,
        top_k=moe.num_experts_per_tok,
        intermediate_size=moe.moe_intermediate_size,
        router=moe.router,
        norm_topk=moe.norm_topk_prob,
        scaling=moe.routed_scaling_factor,
        groups=moe.n_group,
        topk_groups=moe.topk_group,
        correction=moe.score_correction,
        bias=moe.bias,
        shared=mlp(shared) if shared else None,
        shared_gate=moe.shared_expert_gate,
        activation=get("activation"),
        depth=config.num_layers,
        dtype=config.compute_dtype,
        product=moe.product,
        dispatch_parts=moe.dispatch_parts,
    )


def _attention(config: Any, get: Callable[[str], Any]) -> AttentionSpec:
    head_size = get("head_size") or config.head_dim
    return AttentionSpec(
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_size=head_size,
        window=get("sliding_window"),
        rotary=_rotary(get, head_size),
        scale=get("attention_scale"),
        soft_cap=get("logits_soft_cap"),
        sinks=get("attention_sinks"),
        qk_norm=config.qk_norm_over if get("qk_norm") else None,
        qkv_bias=get("qkv_bias"),
        o_bias=get("o_bias"),
        gate=config.output_gate,
        norm=config.norm_spec,
        depth=config.num_layers,
        dtype=config.compute_dtype,
        implementation=config.implementation,
    )


def _recurrent(name: str, spec: type, config: Any, get: Callable[[str], Any]) -> Mixer:
    sizes = getattr(config, name)
    if sizes is None:
        raise ValueError(
            f"a layer has mixer={name!r}, but model.{name} is null; give its sizes there, such as "
            f"{_EXAMPLES[name]}."
        )
    made: Mixer = spec(
        **vars(sizes),
        hidden_size=config.hidden_size,
        norm_eps=config.norm_eps,
        depth=config.num_layers,
        dtype=config.compute_dtype,
    )
    return made


_MIXERS: dict[MixerKind, Callable[[Any, Callable[[str], Any]], Mixer]] = {
    "attention": _attention,
    "mamba2": functools.partial(_recurrent, "mamba2", Mamba2Spec),
    "gated_delta": functools.partial(_recurrent, "gated_delta", GatedDeltaSpec),
    "kda": functools.partial(_recurrent, "kda", KDASpec),
}
"""What makes the spec of each kind of mixer."""

_EXAMPLES = {
    "mamba2": "{num_heads: 8, head_size: 64}",
    "gated_delta": "{num_key_heads: 4, num_value_heads: 8}",
    "kda": "{num_heads: 8}",
}


def check_used(config: Any) -> None:
    """Refuse sizes and windows that no layer uses: the pattern is not what the user means."""
    kinds = {type(layer.mixer) for layer in config.specs}
    sections = {"mamba2": Mamba2Spec, "gated_delta": GatedDeltaSpec, "kda": KDASpec}
    for name, spec in sections.items():
        if getattr(config, name) is not None and spec not in kinds:
            raise ValueError(
                f"model.{name} is given, but no layer has mixer={name!r}; write it in "
                f"model.layers or model.mixer, or leave model.{name} out."
            )
    if config.sliding_window is not None and AttentionSpec not in kinds:
        raise ValueError(
            f"model.sliding_window={config.sliding_window} is given, but no layer attends; leave "
            "it out."
        )


def _rotary(get: Callable[[str], Any], head_size: int) -> Rotary | None:
    if not get("rotary"):
        return None
    dims = int(head_size * get("rotary_share"))
    if dims % 2 or not dims:
        share = "" if dims == head_size else f" times rotary_share={get('rotary_share')}"
        raise ValueError(f"the head size is {head_size}{share}; rotary embeddings need it even.")
    scaling = get("rope_scaling")
    if scaling is not None and scaling.kind == "longrope":
        for name in ("short_factor", "long_factor"):
            number = len(getattr(scaling, name))
            if number != dims // 2:
                raise ValueError(
                    f"rope_scaling.{name} must have {dims // 2} numbers, one for each pair of "
                    f"rotated dims, got {number}."
                )
    return Rotary(get("rope_theta"), dims, scaling)
