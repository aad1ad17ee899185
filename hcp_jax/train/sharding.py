"""Which axes each parameter is cut over: one table for tp, one rule for FSDP.

tp cuts as Megatron does: what makes heads, MLP columns and vocabulary rows is cut along them, what
reads them likewise, so that a layer needs two sums over tp and no more. Over the cp axes parameters
are replicated, unless FSDP also cuts each matrix along its first dim that is still whole and
divisible, over dp and cp together (ZeRO-3: Rajbhandari et al., 2020); the first, because gathering
a later one makes XLA turn the array, and keep a turned copy of all layers. Optimizer state follows
the parameter it belongs to.
"""

from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from hcp_jax.models.config import ModelConfig
from hcp_jax.models.layers.embedding import live_axes
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.parallel.host_memory import on_host

# The end of a parameter's path -> the dim of it that tp cuts, layers not counted. What is not
# named here (the norms' scales, o_proj's and down_proj's outputs) is whole on every tp device.
TP_DIMS: dict[tuple[str, ...], int] = {
    ("embed_tokens", "embedding"): 0,  # [V, D]
    ("lm_head", "embedding"): 0,  # [V, D]
    ("q_proj", "kernel"): 1,  # [D, N, H]
    ("k_proj", "kernel"): 1,  # [D, K, H]
    ("v_proj", "kernel"): 1,  # [D, K, H]
    ("q_proj", "bias"): 0,  # [N, H]
    ("k_proj", "bias"): 0,  # [K, H]
    ("v_proj", "bias"): 0,  # [K, H]
    ("o_proj", "kernel"): 0,  # [N, H, D]
    ("self_attn", "sinks"): 0,  # [N]
    ("gate_proj", "kernel"): 1,  # [D, F]
    ("up_proj", "kernel"): 1,  # [D, F]
    ("down_proj", "kernel"): 0,  # [F, D]
}

# What FSDP cuts; norms, biases and sinks are too small to be worth a collective.
_MATRICES = ("kernel", "embedding")


def check_divides(config: ModelConfig, cp: ContextParallel) -> None:
    """Refuses a model that tp cannot cut.

    Raises:
        ValueError: if tp divides not all of the heads, the kv heads, the MLP and the vocabulary.
    """
    tp = cp.axis_size(cp.tp)
    if config.num_kv_heads % tp:
        raise ValueError(
            f"tp={tp} cannot cut num_kv_heads={config.num_kv_heads}: every tp device needs whole "
            f"kv heads. Use a tp that divides {config.num_kv_heads}, and context parallelism for "
            "the other devices (it replicates kv heads where it must)."
        )
    for name in ("num_heads", "intermediate_size", "vocab_size"):
        size = getattr(config, name)
        if size % tp:
            raise ValueError(
                f"tp={tp} cannot cut {name}={size}; use a tp that divides it, or round {name} up "
                f"to {-(-size // tp) * tp}."
            )


def param_specs(params: Any, cp: ContextParallel, *, fsdp: bool = False) -> Any:
    """How each parameter is cut.

    Args:
        params: the parameters, or their shapes (`abstract_model`).
        cp: the context parallelism whose mesh they are on.
        fsdp: cut matrices over dp and cp as well.

    Returns:
        A tree like `params` of PartitionSpecs.
    """
    tp = live_axes(cp, cp.tp)
    axes = live_axes(cp, cp.dp) + live_axes(cp, cp.cp_axes) if fsdp else ()

    def spec(path: tuple, shape: Any) -> PartitionSpec:
        keys = tuple(key.key for key in path)
        stacked = int(keys[0] == "layers")
        cut: list[Any] = [None] * len(shape.shape)
        tp_dim = TP_DIMS.get(keys[-2:])
        if tp_dim is not None and tp:
            cut[stacked + tp_dim] = tp
        if axes and keys[-1] in _MATRICES:
            # Not the layers' dim: a scan over it would fetch every layer from somewhere else.
            whole = [d for d in range(stacked, len(cut)) if cut[d] is None]
            fits = [d for d in whole if shape.shape[d] % cp.axis_size(axes) == 0]
            if fits:
                cut[fits[0]] = axes
        return PartitionSpec(*cut)

    return jax.tree_util.tree_map_with_path(spec, params)


def state_shardings(
    params: Any, optimizer: optax.GradientTransformation, cp: ContextParallel, *, fsdp: bool = False
) -> tuple[Any, Any]:
    """(parameters' shardings, optimizer state's shardings).

    Args:
        params: as in `param_specs`.
        optimizer: whose state for `params` is meant; what belongs to no parameter is replicated,
            and what its `init` puts into the host's memory belongs there.
        cp: as in `param_specs`.
        fsdp: as in `param_specs`.
    """
    specs = param_specs(params, cp, fsdp=fsdp)
    of_params = jax.tree.map(lambda spec: NamedSharding(cp.mesh, spec), specs)
    whole = NamedSharding(cp.mesh, PartitionSpec())
    closed, shapes = jax.make_jaxpr(optimizer.init, return_shape=True)(params)
    of_state = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        shapes,
        of_params,
        transform_non_params=lambda _: whole,
    )
    shardings, tree = jax.tree.flatten(of_state)
    placed = [
        on_host(sharding) if aval.memory_space == jax.memory.Space.Host else sharding
        for sharding, aval in zip(shardings, closed.out_avals, strict=True)
    ]
    return of_params, jax.tree.unflatten(tree, placed)
