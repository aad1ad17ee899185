"""Bamba: Mamba-2, some layers attention, an MLP in all layers."""

import math
from typing import Any

from hcp_jax.base.terminal import printable
from hcp_jax.models.config import ModelConfig
from hcp_jax.models.hf import rope_json
from hcp_jax.models.hf.families.family import (
    Family,
    Usual,
    biases,
    period,
    rope,
    whole_or,
    write_rope,
)
from hcp_jax.models.hf.json_fields import Fields
from hcp_jax.models.hf.parts import Part, rows
from hcp_jax.models.recurrent_specs import Mamba2Config, Mamba2Spec
from hcp_jax.models.specs import AttentionSpec, LayerSpec

_SHARE = 0.5  # of each head that is rotated; transformers reads no other from outside the rotation


def _read_bamba(fields: Fields, num_layers: int) -> dict[str, Any]:
    for key, only in (("mamba_conv_bias", True), ("mamba_proj_bias", False)):
        if fields.flag(key, only) != only:
            raise NotImplementedError(
                f"{fields.place}: {key}={fields.values[key]} is not supported; it is {only} here."
            )
    attends = fields.values.get("attn_layer_indices") or []
    if not isinstance(attends, list) or not all(type(i) is int for i in attends):
        raise fields.wrong("attn_layer_indices", "a list of layers")
    letters = "".join("A" if i in attends else "M" for i in range(num_layers))
    inside = {
        key: value
        for part in (fields.mapping("rope_parameters"), fields.mapping("rope_scaling"))
        for key, value in part.values.items()
    }
    return (
        rope(fields)
        | biases(fields)
        | {
            "mlp_bias": fields.flag("mlp_bias", False),
            "rotary_share": rope_json.read_share(
                Fields({"rope_parameters": inside}, fields.place), _SHARE
            ),
            "mamba2": _sizes(fields) if "M" in letters else None,
            "layers": period(letters),
        }
    )


def _sizes(fields: Fields) -> Mamba2Config:
    heads = whole_or("mamba_n_heads", 128, fields)
    inner = whole_or("mamba_expand", 2, fields) * fields.size("hidden_size")
    auto = fields.values.get("mamba_d_head", "auto") == "auto"
    size = inner // heads if auto else fields.whole("mamba_d_head")
    if heads * size != inner:
        raise ValueError(
            f"{fields.place}: mamba_n_heads={heads} heads of {size} channels must have "
            f"mamba_expand times hidden_size={inner} channels together."
        )
    return Mamba2Config(
        num_heads=heads,
        head_size=size,
        state_size=whole_or("mamba_d_state", 256, fields),
        num_groups=whole_or("mamba_n_groups", 1, fields),
        conv_size=whole_or("mamba_d_conv", 4, fields),
        step_limit=_step_limit(fields),
    )


def _step_limit(fields: Fields) -> tuple[float, float] | None:
    limit = fields.values.get("time_step_limit")
    if limit is None:
        return None
    if isinstance(limit, list):  # transformers 5 writes an infinite number as a mapping
        limit = [math.inf if x == {"__float__": "Infinity"} else x for x in limit]
    numbers = isinstance(limit, list | tuple) and len(limit) == 2
    if not numbers or not all(type(x) in (int, float) and x >= 0 for x in limit):
        raise fields.wrong("time_step_limit", "two numbers, not negative")
    if limit[0] == 0 and math.isinf(limit[1]):
        return None
    if math.isinf(limit[1]):
        raise NotImplementedError(
            f"{fields.place}: time_step_limit={printable(repr(limit))} is not supported; give it a "
            "finite end, or begin it at 0."
        )
    return float(limit[0]), float(limit[1])


def _write_bamba(raw: dict[str, Any], model: ModelConfig) -> None:
    write_rope(raw, model)
    if model.rotary_share != _SHARE:
        inside = raw["rope_scaling"] or {"rope_type": "default"}
        raw["rope_scaling"] = inside | {"partial_rotary_factor": model.rotary_share}
    raw.pop("partial_rotary_factor", None)
    raw["attention_bias"], raw["mlp_bias"] = model.o_bias, model.mlp_bias
    raw.setdefault("pad_token_id", None)  # the usual one may be past a smaller vocabulary
    attends = [isinstance(layer.mixer, AttentionSpec) for layer in model.specs]
    raw["attn_layer_indices"] = [i for i, attending in enumerate(attends) if attending]
    sizes = model.mamba2
    if sizes is None:
        return
    inner = sizes.num_heads * sizes.head_size
    if inner % model.hidden_size:
        raise NotImplementedError(
            f"no supported family computes what this model does: as bamba, heads times head size "
            f"{inner} of mamba2 must be a multiple of hidden_size={model.hidden_size}."
        )
    raw["mamba_expand"] = inner // model.hidden_size
    raw["mamba_n_heads"], raw["mamba_d_head"] = sizes.num_heads, sizes.head_size
    raw["mamba_n_groups"], raw["mamba_d_state"] = sizes.num_groups, sizes.state_size
    raw["mamba_d_conv"] = sizes.conv_size
    raw["time_step_limit"] = None if sizes.step_limit is None else list(sizes.step_limit)
    if sizes.step_limit is None:
        raw.pop("time_step_limit")


def _part(spec: LayerSpec, path: tuple[str, ...], expert: int | None) -> Part | None:
    """Return the part of in_proj (z, x, B, C, Δ one after the other) or of the convolution."""
    mixer = spec.mixer
    if not isinstance(mixer, Mamba2Spec) or path[0] != "mamba":
        return None
    inner, states = mixer.num_heads * mixer.head_size, mixer.num_groups * mixer.state_size
    projections = ("z_proj", "x_proj", "b_proj", "c_proj", "dt_proj")
    if path[1] in projections:
        sizes = [inner, inner, states, states, mixer.num_heads]
        which = projections.index(path[1])
        return rows("mamba.in_proj.weight", sizes, which, [mixer.hidden_size])
    sizes = [inner, states, states]
    convs = ("x_conv", "b_conv", "c_conv")
    if path[1] in convs:
        which = convs.index(path[1])
        return rows("mamba.conv1d.weight", sizes, which, [1, mixer.conv_size])
    if path[1].removesuffix("_bias") in convs:
        return rows("mamba.conv1d.bias", sizes, convs.index(path[1].removesuffix("_bias")))
    return None


BAMBA = Family(
    "BambaForCausalLM",
    "Bamba: Mamba-2 with some layers of attention",
    Usual(kv_heads=8, epsilon=1e-5),
    _read_bamba,
    _write_bamba,
    fits=lambda model: model.mamba2 is not None,
    partial_rotary=True,
    mixers=("attention", "mamba2"),
    renamed={
        "model.norm": "model.final_layernorm",
        "post_attention_layernorm": "pre_ff_layernorm",
        "mlp": "feed_forward",
    },
    part=_part,
)
