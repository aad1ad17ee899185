"""Phi-3 and Phi-4-mini: q, k and v are one tensor, gate and up another; LongRoPE."""

from typing import Any

from hcp_jax.models.config import ModelConfig
from hcp_jax.models.hf import rope_json
from hcp_jax.models.hf.families.family import Family, Usual, attention, write_share
from hcp_jax.models.hf.families.llama import write_mistral
from hcp_jax.models.hf.json_fields import Fields
from hcp_jax.models.hf.parts import Part, rows
from hcp_jax.models.specs import AttentionSpec, LayerSpec, MLPSpec


def _read_phi3(fields: Fields, num_layers: int) -> dict[str, Any]:
    values = dict(fields.values)
    for key in ("resid_pdrop", "embd_pdrop"):
        if fields.number_or_none(key, 0, 1):
            raise NotImplementedError(
                f"{fields.place}: {key}={values[key]} is not supported; there is no dropout here."
            )
    for key in ("rope_scaling", "rope_parameters"):
        part = dict(fields.mapping(key).values)
        if "su" in (part.get("rope_type"), part.get("type")):  # an older name
            values[key] = part | {"rope_type": "longrope"}
    values.setdefault("original_max_position_embeddings", 4096)
    fields = Fields(values, fields.place)
    theta, scaling = rope_json.read(fields, kinds=("default", "longrope"))
    return {
        "rope_theta": theta,
        "rope_scaling": scaling,
        "sliding_window": fields.whole_or_none("sliding_window"),
        "rotary_share": rope_json.read_share(fields, 1.0),
    }


def _write_phi3(raw: dict[str, Any], model: ModelConfig) -> None:
    write_mistral(raw, model)
    write_share(raw, model)
    raw.setdefault("pad_token_id", None)  # the usual one may be past a smaller vocabulary
    if model.rope_scaling is not None:
        # transformers reads it here, and not in rope_scaling.
        original = model.rope_scaling.original_max_position_embeddings
        raw["original_max_position_embeddings"] = original


def _part(spec: LayerSpec, path: tuple[str, ...], expert: int | None) -> Part | None:
    mixer, ffn = spec.mixer, spec.ffn
    if not isinstance(mixer, AttentionSpec) or not isinstance(ffn, MLPSpec):
        return None
    qkv, gate_up = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
    if path[0] == "self_attn" and path[1] in qkv:
        heads = (mixer.num_heads, mixer.num_kv_heads, mixer.num_kv_heads)
        sizes = [number * mixer.head_size for number in heads]
        name = "self_attn.qkv_proj.weight"
        return rows(name, sizes, qkv.index(path[1]), [mixer.hidden_size])
    if path[0] == "mlp" and path[1] in gate_up:
        sizes = [ffn.intermediate_size] * 2
        return rows("mlp.gate_up_proj.weight", sizes, gate_up.index(path[1]), [ffn.hidden_size])
    return None


def _fits(model: ModelConfig) -> bool:
    scaling = model.rope_scaling
    long = scaling is not None and scaling.kind == "longrope"
    shares = {mixer.rotary.dims != mixer.head_size for mixer in attention(model) if mixer.rotary}
    return long or True in shares


PHI3 = Family(
    "Phi3ForCausalLM",
    "Phi-3, Phi-3.5-mini, Phi-4 and others of their shape",
    Usual(kv_heads=0, epsilon=1e-5),
    _read_phi3,
    _write_phi3,
    fits=_fits,
    partial_rotary=True,
    part=_part,
)
