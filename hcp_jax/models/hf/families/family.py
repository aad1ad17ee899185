"""Define what a supported family of models says of itself, and what several families share."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from hcp_jax.base.terminal import printable
from hcp_jax.models.config import ModelConfig
from hcp_jax.models.hf import rope_json
from hcp_jax.models.hf.json_fields import Fields
from hcp_jax.models.hf.parts import Part
from hcp_jax.models.specs import AttentionSpec, LayerSpec

SLIDING, FULL = "sliding_attention", "full_attention"

EXPERTS_W123 = {
    "mlp": "block_sparse_moe",
    "gate_proj": "w1",
    "up_proj": "w3",
    "down_proj": "w2",
}
"""Names of experts in Mixtral's form."""


class Usual(NamedTuple):
    """Values of missing settings, as `transformers` has them.

    Attributes:
        kv_heads: number of kv heads; None if the setting must be there, 0 for as many as heads.
        head_dim: head size; None for hidden size over heads.
        tied: whether the output head is the embedding.
        epsilon: of RMSNorm.
    """

    kv_heads: int | None = None
    head_dim: int | None = None
    tied: bool = False
    epsilon: float = 1e-6


class ActivationKey(NamedTuple):
    """Key of the MLP's activation, and the values that mean the family's own."""

    key: str = "hidden_act"
    names: tuple[str, ...] = ("silu", "swish")


def stored_alone(spec: LayerSpec, path: tuple[str, ...], expert: int | None) -> Part | None:
    """Return None: no parameter shares a stored tensor with others."""
    return None


class Family(NamedTuple):
    """One supported family.

    Attributes:
        architecture: class in `transformers`.
        title: name for people.
        usual: values of missing settings.
        read: returns fields of `ModelConfig` from the file and the number of layers.
        write: writes the same fields into a config.json.
        fits: whether the family has parameters and layers like those of a model; of the families
            that fit, the last one in `FAMILIES` has most in common with it.
        activation: of the MLP.
        partial_rotary: whether a share of each head may be rotated; if not, such a share is
            refused.
        mixers: kinds of mixers that its layers have.
        renamed: stored name of each module or parameter that has another name there, as dotted
            parts of the whole name; applied in order.
        part: returns the part of a stored tensor that is a parameter of a layer (given by the spec
            of the layer, the path inside it and the expert), None if it is stored alone.
    """

    architecture: str
    title: str
    usual: Usual
    read: Callable[[Fields, int], dict[str, Any]]
    write: Callable[[dict[str, Any], ModelConfig], None]
    fits: Callable[[ModelConfig], bool]
    activation: ActivationKey = ActivationKey()
    partial_rotary: bool = False
    mixers: tuple[str, ...] = ("attention",)
    renamed: Mapping[str, str] = MappingProxyType({})
    part: Callable[[LayerSpec, tuple[str, ...], int | None], Part | None] = stored_alone


def attention(model: ModelConfig) -> list[AttentionSpec]:
    """Return the mixers of all layers that attend."""
    return [layer.mixer for layer in model.specs if isinstance(layer.mixer, AttentionSpec)]


def rope(fields: Fields, theta: float = 10_000.0) -> dict[str, Any]:
    """Return the rotary settings of a file; `theta` is the base if the file has none."""
    theta, scaling = rope_json.read(fields, theta)
    return {"rope_theta": theta, "rope_scaling": scaling}


def write_rope(raw: dict[str, Any], model: ModelConfig) -> None:
    """Write the rotary settings of a model."""
    rope_json.write(raw, model.rope_theta, model.rope_scaling)


def write_share(raw: dict[str, Any], model: ModelConfig) -> None:
    """Write the share of each head that is rotated, where both forms of the file are read."""
    raw["partial_rotary_factor"] = model.rotary_share


def biases(fields: Fields) -> dict[str, Any]:
    """Return the biases of attention, which one setting gives all projections."""
    bias = fields.flag("attention_bias", False)
    return {"qkv_bias": bias, "o_bias": bias}


def whole_or(key: str, usual: int, fields: Fields) -> int:
    """Return a whole number, or `usual` if the file does not have it."""
    return fields.whole(key, 2**22) if key in fields.values else usual


def balance(fields: Fields) -> float:
    """Return the weight of the load-balance loss."""
    found = fields.number_or_none("router_aux_loss_coef", 0, 1e6)
    return 1e-3 if found is None else found


def refuse_jitter(fields: Fields) -> None:
    """Refuse noise in routers.

    Raises:
        NotImplementedError: if the file has some.
    """
    if fields.number_or_none("router_jitter_noise", 0, 1):
        raise NotImplementedError(
            f"{fields.place}: router_jitter_noise={fields.values['router_jitter_noise']} is not "
            "supported; routers have no noise here. Set it to 0."
        )


def dense_layers(fields: Fields) -> int:
    """Return the number of first layers with an MLP alone, by mlp_only_layers.

    Raises:
        NotImplementedError: if other layers have one, too.
    """
    dense = fields.values.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise fields.wrong("mlp_only_layers", "a list of layers")
    if dense != list(range(len(dense))):
        raise NotImplementedError(
            f"{fields.place}: mlp_only_layers={printable(repr(dense), 80)} is not supported; only "
            "the first layers may have an MLP alone: 0, 1, 2 and so on."
        )
    return len(dense)


def kinds(fields: Fields, usual: list[str], known: Sequence[str] = (SLIDING, FULL)) -> list[str]:
    """Return the kind of each layer: by layer_types, or as usual if there is none.

    Raises:
        ValueError: if layer_types is anything but as many known kinds as there are layers.
    """
    given = fields.values.get("layer_types")
    if given is None:
        return usual
    right = isinstance(given, list) and all(kind in known for kind in given)
    if not right or len(given) != len(usual):
        raise fields.wrong("layer_types", f"a list of {len(usual)} times {' or '.join(known)}")
    return list(given)


def sliding_layers(fields: Fields, usual: list[bool]) -> list[bool]:
    """Return whether each layer has the window, as `kinds`."""
    found = kinds(fields, [SLIDING if slides else FULL for slides in usual])
    return [kind == SLIDING for kind in found]


def period(layers: Sequence[Any]) -> Any:
    """Return the shortest pattern that gives `layers` where it is repeated and cut off."""
    number = len(layers)
    return layers[: next(p for p in range(1, number + 1) if layers[p:] == layers[: number - p])]
