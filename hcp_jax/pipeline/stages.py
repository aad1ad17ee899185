"""Cut a model into stages, and its parameters into those of each stage.

Every stage holds equal chunks of consecutive layers, whole periods of the model's pattern, because
one program computes all stages. The embedding, the output matrix and the loss are no stage's own:
the vocabulary is cut over the stages, so that each has an equal share of that work.

If the periods do not divide by the chunks, the last chunks are filled with layers whose parameters
are zero. Such a layer adds zero to its input, so it changes nothing; it takes no more time than
the stages with one more layer take anyhow.

Parameters of stages are a tree like the model's own, except that the dim of layers [L] becomes
[pp, v, layers of a chunk] (`stage_params`), with pp cut over the stages.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from hcp_jax.base import checks
from hcp_jax.models.config import ModelConfig
from hcp_jax.models.layers.embedding import live_axes
from hcp_jax.models.specs import AttentionSpec, Plan, Section
from hcp_jax.models.transformer import inside_layer, rule
from hcp_jax.parallel.context import ContextParallel


@dataclasses.dataclass(frozen=True)
class Stages:
    """A model that is cut into the stages of a pipeline; frozen and hashable.

    Attributes:
        model: the model.
        num_stages: pp.
        virtual_stages: v, the chunks of consecutive layers on each stage.

    Raises:
        ValueError: if a chunk would have no layer, or pp does not divide the vocabulary.
        NotImplementedError: if the model's layers do not repeat in whole periods, or recurrent ones
            do not divide by the chunks.

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
        sections = self.model.plan.sections
        if len(sections) != 1:
            period = len(sections[0].stacks)
            layers = self.model.num_layers
            hint = (
                f"use num_layers={layers // period * period} or {-(-layers // period) * period}"
                if sections[0].turns > 1
                else "use layers that repeat a period"
            )
            raise NotImplementedError(
                f"pipeline stages hold whole periods of a model's pattern of layers, but these "
                f"{layers} layers are not whole periods (of {period}): {hint}, or no pipeline."
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
        mixers = {type(stack.spec.mixer) for stack in self.model.plan.stacks}
        if self._empty and mixers != {AttentionSpec}:
            raise NotImplementedError(
                f"{self.periods} periods of layers do not divide by pp={pp} x "
                f"virtual_stages={self.virtual_stages}, and chunks are filled with layers of zeros "
                "for attention only; use a pp x virtual_stages that divides them."
            )
        if self.model.vocab_size % pp:
            raise ValueError(
                f"pp={pp} cannot cut vocab_size={self.model.vocab_size}: the vocabulary is cut "
                f"over the stages. Round vocab_size up to {-(-self.model.vocab_size // pp) * pp}, "
                "or use a pp that divides it."
            )

    @property
    def periods(self) -> int:
        """Number of periods of the model's pattern."""
        return self.model.plan.sections[0].turns

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

    @property
    def _empty(self) -> int:
        """Number of periods of zeros behind the model's own."""
        return self.num_stages * self.virtual_stages * self.turns - self.periods


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

    def cut(x: Any) -> Any:
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
        params: a tree from `stage_params`.
    """

    def join(x: Any) -> Any:
        return x.swapaxes(0, 1).reshape(-1, *x.shape[3:])[: stages.periods]

    return _map_layers(join, params)


def without_empty(stages: Stages, grads: Any) -> Any:
    """Return gradients that are zero for layers of zeros, so that an update leaves them zero.

    Args:
        stages: how the model is cut.
        grads: a tree from `stage_params`, or of its shapes.
    """
    pp, v, turns = stages.num_stages, stages.virtual_stages, stages.turns
    if stages.periods == pp * v * turns:
        return grads
    stage, chunk, turn = jnp.indices((pp, v, turns))
    live = (chunk * pp + stage) * turns + turn < stages.periods
    return _map_layers(
        lambda x: jnp.where(live.reshape(*live.shape, *[1] * (x.ndim - 3)), x, 0), grads
    )


def stage_shardings(
    stages: Stages, cp: ContextParallel, params: Any, *, axis: str = "pp", fsdp: bool = False
) -> Any:
    """Return the shardings of `stage_params`: layers and vocabulary over pp, and all over tp.

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
        layered, needs = inside_layer(keys)[0] is not None, rule(keys)
        cut = needs.tp
        dims: list[Any] = [None] * (x.ndim + (2 if layered else 0))
        if cut is not None and tp:
            dims[cut + (3 if layered else 0)] = tp
        if layered:
            dims[0] = axis
        elif keys[-1] == "embedding":
            dims[0] = (axis, *tp)
        if flat and needs.fsdp:
            sizes = [0, 0, 0, *x.shape[1:]] if layered else x.shape
            fits = [
                d for d, n in enumerate(sizes) if not dims[d] and n and n % cp.axis_size(flat) == 0
            ]
            if fits:
                dims[fits[0]] = flat
        return NamedSharding(cp.mesh, PartitionSpec(*dims))

    return jax.tree_util.tree_map_with_path(one, params)


def _map_layers(function: Any, params: Any) -> Any:
    def one(path: tuple[Any, ...], x: Any) -> Any:
        return function(x) if path[0].key == "layers" else x

    return jax.tree_util.tree_map_with_path(one, params)
