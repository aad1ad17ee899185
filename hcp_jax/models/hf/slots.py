"""Say which tensor of a Hugging Face folder belongs to which parameter.

The modules of the model have the names that most folders use: the parameter
`layers.self_attn.q_proj.kernel` holds the `model.layers.{i}.self_attn.q_proj.weight` of all layers,
stacked. A matrix is `[outputs, inputs]` in the folder and `[inputs, outputs]` here, with inputs or
outputs split into heads. Where a family has another name, or one tensor for several parameters, its
entry in `families/` says so.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from hcp_jax.models.config import ModelConfig
from hcp_jax.models.hf.config_json import refuse_depths
from hcp_jax.models.hf.families import FAMILIES, family_of
from hcp_jax.models.hf.parts import Part
from hcp_jax.models.transformer import abstract_model, inside_layer, rule


class Slot(NamedTuple):
    """Position of a tensor of a folder in the parameters.

    Attributes:
        name: name of the tensor.
        path: path of the parameter, keys from the outside in.
        layer: index among the layers that are stacked in the parameter; None if the tensor belongs
            to no layer.
        shape: shape of its part of the parameter, without the layer dim.
        inputs: number of these dims that are inputs of a matrix; None if the tensor is stored
            untransposed.
        expert: number of the expert, if the parameter has a dim of experts after that of layers;
            `shape` is without it.
        part: the part of the tensor that is the parameter's; None if it is the whole tensor.
    """

    name: str
    path: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]
    inputs: int | None
    expert: int | None = None
    part: Part | None = None

    @property
    def at(self) -> tuple[int, ...]:
        """Where the tensor lies in the parameter: its layer and its expert, if it has them."""
        return tuple(i for i in (self.layer, self.expert) if i is not None)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the tensor in the folder."""
        if self.part is not None:
            return self.part.shape
        if self.inputs is None:
            return self.shape
        inputs, outputs = self.shape[: self.inputs], self.shape[self.inputs :]
        return tuple(math.prod(dims) for dims in (outputs, inputs) if dims)


def slots(config: ModelConfig, family: str | None = None) -> list[Slot]:
    """Return the slots of all tensors of a model, by parameter, with its layers in order.

    Slots of one name are parts of one tensor.

    Args:
        config: the model.
        family: the family whose names the tensors have; None for the one most like the model.
    """
    return list(_slots(config, family or family_of(config)))


@functools.lru_cache(maxsize=4)
def _slots(config: ModelConfig, family: str) -> tuple[Slot, ...]:
    refuse_depths(config)
    renamed, part_of = FAMILIES[family].renamed, FAMILIES[family].part
    leaves, _ = jax.tree_util.tree_flatten_with_path(abstract_model(config)[1])
    found = []
    for keys, leaf in leaves:
        path = tuple(key.key for key in keys)
        stack, inside = inside_layer(path)
        *modules, kind = inside
        suffix = "weight" if kind in ("kernel", "scale", "embedding") else kind
        inputs = rule(path).inputs
        if stack is None:
            root = [] if modules[0] == "lm_head" else ["model"]
            name = _stored_name([*root, *modules, suffix], renamed)
            found.append(Slot(name, path, None, tuple(leaf.shape), inputs))
            continue
        spec, layers = config.plan.stacks[stack]
        experts: list[int | None] = list(range(leaf.shape[1])) if rule(path).stacked else [None]
        shape = tuple(leaf.shape[1:] if experts == [None] else leaf.shape[2:])
        for index, layer in enumerate(layers):
            for expert in experts:
                part = part_of(spec, inside, expert)
                parts = [*modules, suffix] if expert is None else [*modules, expert, kind, "weight"]
                parts = parts if part is None else [part.name]
                name = _stored_name(["model", "layers", layer, *parts], renamed)
                found.append(Slot(name, path, index, shape, inputs, expert, part))
    return tuple(found)


def _stored_name(parts: Sequence[Any], renamed: Mapping[str, str]) -> str:
    name = f".{'.'.join(map(str, parts))}."
    for ours, theirs in renamed.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    return name[1:-1]


def to_stored(slot: Slot, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Convert the values of a slot without a part from the parameter's form to the folder's."""
    if slot.inputs is not None:
        split = (math.prod(slot.shape[: slot.inputs]), math.prod(slot.shape[slot.inputs :]))
        values = values.reshape(split).T
    return np.ascontiguousarray(values.reshape(slot.stored_shape), dtype)
