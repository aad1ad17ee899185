"""Choose the axes that each parameter is cut over: tp as the layers declare, FSDP by one rule.

tp cuts as Megatron does: matrices that produce heads, MLP columns or vocabulary rows are cut along
them, and so are the matrices that read them, so that a layer needs only two sums over tp. Over the
cp axes parameters are replicated. FSDP also cuts each matrix over dp and cp together, along its
first dim that is not cut yet and divisible (ZeRO-3: Rajbhandari et al., 2020). It is the first dim
because gathering a later one makes XLA transpose the array, and keep a transposed copy of all
layers. Optimizer state is cut like its parameter.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from hcp_jax.models.config import ModelConfig
from hcp_jax.models.layers.embedding import live_axes
from hcp_jax.models.transformer import is_stacked, rule
from hcp_jax.parallel import spmd
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.parallel.host_memory import on_host


def check_divides(config: ModelConfig, cp: ContextParallel) -> None:
    """Check that tp can cut a model.

    Raises:
        ValueError: if tp does not divide the heads, the kv heads, the MLP and the vocabulary.
    """
    tp = cp.axis_size(cp.tp)
    sizes = [size for stack in config.plan.stacks for size in stack.spec.tp_sizes.items()]
    for name, size in [*sizes, ("vocab_size", config.vocab_size)]:
        if size % tp and name == "num_kv_heads":
            raise ValueError(
                f"tp={tp} cannot cut num_kv_heads={size}: every tp device needs whole kv heads. "
                f"Use a tp that divides {size}, and context parallelism for the other devices (it "
                "replicates kv heads where it must)."
            )
        if size % tp:
            raise ValueError(
                f"tp={tp} cannot cut {name}={size}; use a tp that divides it, or round {name} up "
                f"to {-(-size // tp) * tp}."
            )


def param_specs(params: Any, cp: ContextParallel, *, fsdp: bool = False) -> Any:
    """Return a tree like `params` with the PartitionSpec of each parameter.

    Args:
        params: the parameters, or their shapes (`abstract_model`).
        cp: the context parallelism whose mesh they are on.
        fsdp: whether to cut matrices over dp and cp as well.
    """
    tp = live_axes(cp, cp.tp)
    axes = live_axes(cp, cp.dp) + live_axes(cp, cp.cp_axes) if fsdp else ()

    def spec(path: tuple[Any, ...], shape: Any) -> PartitionSpec:
        keys = tuple(key.key for key in path)
        stacked, needs = int(is_stacked(keys)), rule(keys)
        cut: list[Any] = [None] * len(shape.shape)
        free = axes
        if needs.stacked and cp.ep > 1:
            cut[stacked] = cp.expert_axes
            free = tuple(axis for axis in axes if axis not in cp.expert_axes)
        if needs.tp is not None and tp:
            cut[stacked + needs.tp] = tp
        if free and needs.fsdp:
            # Not the dim of layers: a scan over it would fetch each layer from another device.
            whole = [d for d in range(stacked, len(cut)) if cut[d] is None]
            fits = [d for d in whole if shape.shape[d] % cp.axis_size(free) == 0]
            if fits:
                cut[fits[0]] = free
        return PartitionSpec(*cut)

    return jax.tree_util.tree_map_with_path(spec, params)


def state_shardings(
    params: Any, optimizer: optax.GradientTransformation, cp: ContextParallel, *, fsdp: bool = False
) -> tuple[Any, Any]:
    """Return the shardings of the parameters, and those of the optimizer state.

    Args:
        params: as in `param_specs`.
        optimizer: the optimizer. State that belongs to no parameter is replicated; state that its
            `init` makes in host memory stays there.
        cp: as in `param_specs`.
        fsdp: as in `param_specs`.
    """
    specs = param_specs(params, cp, fsdp=fsdp)
    param_shardings = jax.tree.map(lambda spec: NamedSharding(cp.mesh, spec), specs)
    return param_shardings, optimizer_shardings(params, optimizer, param_shardings)


def optimizer_shardings(
    params: Any, optimizer: optax.GradientTransformation, param_shardings: Any
) -> Any:
    """Return the shardings of the optimizer state; see `state_shardings`.

    Args:
        params: the parameters, or their shapes.
        optimizer: as in `state_shardings`.
        param_shardings: a tree like `params`.
    """
    whole = NamedSharding(jax.tree.leaves(param_shardings)[0].mesh, PartitionSpec())
    closed, shapes = jax.make_jaxpr(optimizer.init, return_shape=True)(params)
    opt_shardings = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        shapes,
        param_shardings,
        transform_non_params=lambda _: whole,
    )
    shardings, tree = jax.tree.flatten(opt_shardings)
    placed = [
        on_host(sharding) if aval.memory_space == jax.memory.Space.Host else sharding
        for sharding, aval in zip(shardings, closed.out_avals, strict=True)
    ]
    return jax.tree.unflatten(tree, placed)


def jit_on_mesh(
    function: Callable[..., Any],
    cp: ContextParallel | None,
    takes: tuple[Any, ...],
    gives: Any,
    donate: int | tuple[int, ...] = (),
) -> jax.stages.Wrapped:
    """Return a jitted function whose arguments and results have the given shardings.

    Args:
        function: the function; it may assume that no mesh axis is Explicit.
        cp: the context parallelism of its mesh; None for one device, without shardings.
        takes: for each argument a tree of abstract arrays with shardings; None leaves it open.
        gives: the same for the result: a tree, in which None leaves a part open.
        donate: numbers of the arguments that are donated.
    """
    if cp is None:
        return jax.jit(function, donate_argnums=donate)
    specs = jax.tree.map(
        lambda x: PartitionSpec() if x is None else x.sharding.spec, gives, is_leaf=_is_open
    )

    @functools.wraps(function)
    def on_mesh(*args: Any) -> Any:
        return spmd.run(cp.mesh, cp.axes, function, specs, *args)

    return jax.jit(
        on_mesh,
        donate_argnums=donate,
        in_shardings=_shardings(takes),
        out_shardings=_shardings(gives),
    )


def _is_open(x: Any) -> bool:
    return x is None


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)
