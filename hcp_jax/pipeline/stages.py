"""Cut a model into stages, and its parameters into those of each stage.

Every stage holds equal chunks of consecutive layers, whole periods of the model's pattern, because
one program computes all stages. The embedding, the output matrix and the loss are no stage's own:
the vocabulary is cut over the stages, so that each has an equal share of that work.

If the layers do not divide by the chunks, or end with a part of a period, the last chunks are
filled with layers whose parameters are zero. Such a layer adds zero to its input, so it changes
nothing; it takes no more time than the stages with one more layer take anyhow.

Parameters of stages are a tree like the model's own, except that the dim of layers [L] becomes
[pp, v, layers of a chunk] (`stage_params`), with pp cut over the stages.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from hcp_jax.base import checks
from hcp_jax.models.config import ModelConfig
from hcp_jax.models.layers.embedding import live_axes
from hcp_jax.models.specs import MoESpec, Plan, Section
from hcp_jax.models.transformer import inside_layer, is_stacked, rule
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.pipeline.meshes import on_auto_axes


@dataclasses.dataclass(frozen=True)
class Stages:
    """A model that is cut into the stages of a pipeline; frozen and hashable.

    Attributes:
        model: the model.
        num_stages: pp.
        virtual_stages: v, the chunks of consecutive layers on each stage.

    Raises:
        ValueError: if a chunk would have no layer, or pp does not divide the vocabulary.
        NotImplementedError: if the model's layers do not repeat a period, or layers with experts do
            not divide by the chunks.

    >>> model = ModelConfig(vocab_size=64, num_layers=7, hidden_size=16, intermediate_size=32,
    ...                     num_heads=4, num_kv_heads=2)
    >>> Stages(model, 4).turns  # 2, 2, 2 and 1 layers; the last stage is filled with one of zeros
    2
    """

    model: ModelConfig
    num_stages: int
    virtual_stages: int = 1

    def __post_init__(self) -> None:
        pp = checks.integer("num_stages", self.num_stages, least=1)
        checks.integer("virtual_stages", self.virtual_stages, least=1)
        first, *rest = self.model.plan.sections
        if any(not set(section.stacks) <= set(first.stacks) for section in rest):
            raise NotImplementedError(
                f"all stages of a pipeline run one program, so the {self.model.num_layers} layers "
                f"must repeat a period, but they are runs of {len(rest) + 1} kinds, such as dense "
                "layers before layers with experts: give all layers one kind or a repeating "
                "pattern (model.layers; model.moe.first_k_dense_replace: 0), or use no pipeline."
            )
        if self._empty >= self.turns:
            chunks = pp * self.virtual_stages
            filled = -(-self.periods // self.turns)
            raise ValueError(
                f"{self.model.num_layers} layers ({self.periods} periods) do not fill pp={pp} x "
                f"virtual_stages={self.virtual_stages}: {chunks - filled} of {chunks} chunks would "
                f"have no layer. {filled} chunks take no more time: use a pp x virtual_stages of "
                f"at most {filled}."
            )
        routed = any(isinstance(stack.spec.ffn, MoESpec) for stack in self.model.plan.stacks)
        if routed and self._empty_layers:
            layers, whole = self.model.num_layers, self._empty_layers + self.model.num_layers
            fewer = whole - pp * self.virtual_stages * len(first.stacks)
            raise NotImplementedError(
                f"{layers} layers with experts do not divide by pp={pp} x virtual_stages="
                f"{self.virtual_stages}, and routers of layers of zeros would count in the losses: "
                f"use num_layers={f'{fewer} or ' if fewer else ''}{whole}, or a pp x "
                f"virtual_stages that divides the layers."
            )
        if self.model.vocab_size % pp:
            raise ValueError(
                f"pp={pp} cannot cut vocab_size={self.model.vocab_size}: the vocabulary is cut "
                f"over the stages. Round vocab_size up to {-(-self.model.vocab_size // pp) * pp}, "
                "or use a pp that divides it."
            )

    @property
    def periods(self) -> int:
        """Number of periods of the model's pattern, the last of which may be a part of one."""
        return len(self.model.plan.stacks[0].layers)

    @property
    def turns(self) -> int:
        """Number of periods of a chunk."""
        return -(-self.periods // (self.num_stages * self.virtual_stages))

    @property
    def chunk(self) -> Plan:
        """How the layers of one chunk are stacked."""
        plan, width = self.model.plan, len(self.model.plan.stacks)
        stacks = [
            stack._replace(layers=tuple(range(i, self.turns * width, width)))
            for i, stack in enumerate(plan.stacks)
        ]
        return Plan(tuple(stacks), (Section(plan.sections[0].stacks, 0, self.turns, 0),))

    def chunk_context(self, cp: ContextParallel) -> ContextParallel:
        """Return the context of the layers of a chunk, whose comm types all chunks have.

        Args:
            cp: with one comm type, or one for each layer of the model.

        Raises:
            ValueError: if there are comm types for another number of layers.
            NotImplementedError: if the comm types of two chunks differ.
        """
        one = self.chunk_comm_types(cp.comm_type)
        return cp if isinstance(one, str) else dataclasses.replace(cp, comm_type=one)

    def chunk_comm_types(self, given: str | Sequence[str]) -> str | tuple[str, ...]:
        """Return the comm types of the layers of a chunk; see `chunk_context`.

        Args:
            given: one comm type, or one for each layer of the model.

        Raises:
            ValueError: as `chunk_context`.
            NotImplementedError: as `chunk_context`.
        """
        if isinstance(given, str):
            return given
        width = len(self.model.plan.stacks)
        if len(given) != self.model.num_layers:
            raise ValueError(
                f"comm_type names {len(given)} layers, but the model has {self.model.num_layers}; "
                "give one per layer, or one string for all."
            )
        layers = self.turns * width
        one = (*given, *[given[-1]] * layers)[:layers]
        if any(comm_type != one[i % layers] for i, comm_type in enumerate(given)):
            raise NotImplementedError(
                f"all chunks of a pipeline run one program, so comm_type must repeat every "
                f"{layers} layers, those of one chunk; got {given}."
            )
        return one

    def own_layers(self, stack: int) -> int:
        """Number of layers of a stack that are the model's own, not of zeros."""
        return len(self.model.plan.stacks[stack].layers)

    @property
    def _empty(self) -> int:
        """Number of periods of zeros behind the model's own."""
        return self.num_stages * self.virtual_stages * self.turns - self.periods

    @property
    def _empty_layers(self) -> int:
        """Number of layers of zeros."""
        width = len(self.model.plan.stacks)
        chunks = self.num_stages * self.virtual_stages
        return chunks * self.turns * width - self.model.num_layers


def stage_params(stages: Stages, params: Any) -> Any:
    """Return the parameters with dims [pp, v, layers of a chunk] in place of [L].

    Args:
        stages: how the model is cut.
        params: the model's parameters, or a tree like them (gradients, moments), on the host or on
            devices.

    >>> model = ModelConfig(vocab_size=64, num_layers=4, hidden_size=16, intermediate_size=32,
    ...                     num_heads=4, num_kv_heads=2)
    >>> layers = {"layers": {"scale": jnp.arange(4)}}
    >>> stage_params(Stages(model, 2, 2), layers)["layers"]["scale"].tolist()
    [[[0], [2]], [[1], [3]]]
    """
    pp, v, turns = stages.num_stages, stages.virtual_stages, stages.turns

    def cut(stack: int, x: Any) -> Any:
        fill = pp * v * turns - x.shape[0]
        if fill:
            # Arrays of the host stay there: no device needs room for all layers.
            xp: Any = np if isinstance(x, np.ndarray) else jnp
            x = xp.concatenate([x, xp.zeros((fill, *x.shape[1:]), x.dtype)])
        return x.reshape(v, pp, turns, *x.shape[1:]).swapaxes(0, 1)

    return _map_layers(cut, params)


def whole_params(stages: Stages, params: Any) -> Any:
    """Return the parameters with the model's own dim [L], without layers of zeros.

    Args:
        stages: how the model is cut.
        params: a tree from `stage_params`; arrays on a mesh with Explicit axes come back on one of
            Auto axes.
    """

    def join(stack: int, x: Any) -> Any:
        return x.swapaxes(0, 1).reshape(-1, *x.shape[3:])[: stages.own_layers(stack)]

    return on_auto_axes(functools.partial(_map_layers, join), params)


def without_empty(stages: Stages, grads: Any) -> Any:
    """Return gradients that are zero for layers of zeros, so that an update leaves them zero.

    Args:
        stages: how the model is cut.
        grads: a tree from `stage_params`, or of its shapes.
    """
    pp, v, turns = stages.num_stages, stages.virtual_stages, stages.turns
    stage, chunk, turn = jnp.indices((pp, v, turns))
    number = (chunk * pp + stage) * turns + turn

    def clear(stack: int, x: Any) -> Any:
        own = stages.own_layers(stack)
        live = (number < own).reshape(*number.shape, *[1] * (x.ndim - 3))
        return x if own == number.size else jnp.where(live, x, 0)

    return _map_layers(clear, grads)


def stage_shardings(
    stages: Stages, cp: ContextParallel, params: Any, *, axis: str = "pp", fsdp: bool = False
) -> Any:
    """Return the shardings of `stage_params`: layers and vocabulary over pp, and all over tp.

    Experts are cut over the axes that `cp` names for them.

    Args:
        stages: how the model is cut.
        cp: the context parallelism inside a stage.
        params: the model's parameters, or their shapes.
        axis: the mesh axis of the stages.
        fsdp: whether to cut matrices over dp and cp as well, along their first dim that fits.
    """
    tp, flat = live_axes(cp, cp.tp), live_axes(cp, cp.flat_axes) if fsdp else ()

    def one(path: tuple[Any, ...], x: Any) -> NamedSharding:
        keys = tuple(key.key for key in path)
        layered, needs = keys[0] == "layers", rule(keys)
        # Dims before those that rules count: [pp, v, layers of a chunk], or depths.
        lead = 3 if layered else int(is_stacked(keys))
        sizes = [0] * lead + list(x.shape[1 if lead else 0 :])
        dims: list[Any] = [None] * len(sizes)
        free = flat
        if needs.stacked and cp.ep > 1:
            dims[lead] = cp.expert_axes
            free = tuple(axis for axis in flat if axis not in cp.expert_axes)
        if needs.tp is not None and tp:
            dims[lead + needs.tp] = tp
        if layered:
            dims[0] = axis
        elif keys[-1] == "embedding":
            dims[0] = (axis, *tp)
        if free and needs.fsdp:
            fits = [
                d for d, n in enumerate(sizes) if not dims[d] and n and n % cp.axis_size(free) == 0
            ]
            if fits:
                dims[fits[0]] = free
        return NamedSharding(cp.mesh, PartitionSpec(*dims))

    return jax.tree_util.tree_map_with_path(one, params)


def _map_layers(function: Any, params: Any) -> Any:
    """Apply `function(stack, x)` to the parameters of layers."""

    def one(path: tuple[Any, ...], x: Any) -> Any:
        stack = inside_layer(tuple(key.key for key in path))[0]
        return x if stack is None else function(stack, x)

    return jax.tree_util.tree_map_with_path(one, params)
