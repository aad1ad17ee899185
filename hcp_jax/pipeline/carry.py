"""Hold what lives from tick to tick: sums of gradients and losses, kept inputs, what is sent."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from hcp_jax.models.config import ModelConfig
from hcp_jax.models.loss_terms import Mean, mean_names
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.parallel.mesh import as_tuple

SHARED = ("norm", "mtp")
"""Parameters that all stages use, each for its part of the vocabulary."""


class Carry(NamedTuple):
    """Arrays that live from tick to tick; the first dim of each is cut over devices.

    Attributes:
        grads: sums of gradients of each device, like the stages' parameters behind a dim of devices
            [dp · C]; those that stages share have a dim of stages besides, [dp · C, pp].
        loss: sums of the loss of each device, [dp · C, pp]; zero but on the last stage.
        weight: sums of the weights of each device, likewise.
        means: sums of the means of each device by name, likewise (`loss_terms.mean_names`).
        kept: inputs of chunks until their backward pass, [pp, slots, B, T, D].
        arriving: what the previous stages have computed, [pp, B, T, D].
        leaving: gradients for the stages before, not sent yet, [pp, B, T, D].
    """

    grads: Any
    loss: Any
    weight: Any
    means: dict[str, Mean]
    kept: Any
    arriving: Any
    leaving: Any


class StepSums(NamedTuple):
    """Sums over the microbatches of a step, of each device as in `Carry`, or over all devices."""

    grads: Any
    loss: Any
    weight: Any
    means: dict[str, Mean]

    @classmethod
    def of(cls, carry: Carry) -> "StepSums":
        """Return those of a carry, or of its specs."""
        return cls(carry.grads, carry.loss, carry.weight, carry.means)


def zeros(
    model: ModelConfig, staged: Any, lead: tuple[int, int], slots: int, tokens: tuple[int, int]
) -> Carry:
    """Return the carry before the first tick; to be traced.

    Args:
        model: the model.
        staged: shapes of the stages' parameters.
        lead: number of devices that sum for themselves, and pp.
        slots: number of inputs that a stage keeps.
        tokens: rows and tokens of a microbatch.
    """
    devices, pp = lead
    activations, dtype = (*tokens, model.hidden_size), model.compute_dtype

    def sums(name: str, x: Any) -> Any:
        return jnp.zeros((*(lead if name in SHARED else lead[:1]), *x.shape), x.dtype)

    def scalar() -> Any:
        return jnp.zeros((devices, pp), jnp.float32)

    return Carry(
        {name: jax.tree.map(lambda x, n=name: sums(n, x), tree) for name, tree in staged.items()},
        scalar(),
        scalar(),
        {name: Mean(scalar(), scalar()) for name in mean_names(model)},
        jnp.zeros((pp, slots, *activations), dtype),
        jnp.zeros((pp, *activations), dtype),
        jnp.zeros((pp, *activations), dtype),
    )


def shardings(
    model: ModelConfig, params: Any, cp: ContextParallel, axis: str, flat: tuple[str, ...]
) -> Carry:
    """Return the shardings of a carry.

    Args:
        model: the model.
        params: shardings of the stages' parameters.
        cp: the context parallelism of a stage.
        axis: the mesh axis of the stages.
        flat: axes along which each device sums for itself.
    """
    scalar = PartitionSpec(flat, axis)
    tokens = cp.spec(3)
    moving = PartitionSpec(axis, *tokens)

    def sums(name: str, spec: PartitionSpec) -> PartitionSpec:
        return PartitionSpec(*((flat, axis) if name in SHARED else (flat,)), *spec)

    specs = Carry(
        {name: jax.tree.map(lambda x, n=name: sums(n, x.spec), p) for name, p in params.items()},
        scalar,
        scalar,
        {name: Mean(scalar, scalar) for name in mean_names(model)},
        PartitionSpec(axis, None, *tokens),
        moving,
        moving,
    )
    return jax.tree.map(lambda spec: NamedSharding(cp.mesh, spec), specs, is_leaf=_is_spec)


def specs_over(axes: tuple[str, ...], shardings: Any) -> Any:
    """Return the specs of shardings over some axes alone, such as those that are Manual."""

    def only(x: NamedSharding) -> PartitionSpec:
        dims = (tuple(a for a in as_tuple(dim) if a in axes) or None for dim in x.spec)
        return PartitionSpec(*dims)

    return jax.tree.map(only, shardings, is_leaf=lambda x: isinstance(x, NamedSharding))


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)
