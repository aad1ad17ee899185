"""Sum the gradients of norms and biases over the devices once, after all layers of a scan.

A norm's scale is whole on every device, and the tokens of every device add to its gradient. Left to
the compiler, that is one all-reduce of a few kilobytes in each layer, for which the backward pass
waits. Here each device of dp and cp gets its own copy before the scan (`copied`), as an array
`[L, devices, ...]` that is cut over the devices. The modules of a layer read the copy of their
device inside a `shard_map` (`use_copies`). So the gradients of the copies leave the scan unsummed,
and the transpose of the copying sums those of all layers at once.

These modules treat each token alone. What a mixer reads inside a `shard_map` of its own (sinks,
short convolutions, rates of decay), routers, and the biases of an MLP in chunks stay as they are.
"""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from hcp_jax.models.layers import decoder
from hcp_jax.models.layers.decoder import DecoderLayer
from hcp_jax.models.layers.embedding import live_axes
from hcp_jax.models.layers.mlp import MLP
from hcp_jax.models.layers.norm import ShiftedRMSNorm
from hcp_jax.models.layers.recurrent import HeadNorm
from hcp_jax.parallel import spmd
from hcp_jax.parallel.context import ContextParallel

_NORMS = (nnx.RMSNorm, ShiftedRMSNorm, HeadNorm)
_PRODUCTS = (nnx.Linear, nnx.LinearGeneral)


class OnEachDevice(nnx.Module):
    """A norm whose scale, or a product whose bias, is a copy `[devices, ...]` of each device."""

    def __init__(self, module: Any, name: str, cp: ContextParallel):
        self.module: Any = module
        self.name, self.cp = name, cp

    def __call__(self, x: Float[Array, "B T ..."]) -> Float[Array, "B T ..."]:
        """Apply the module to each token."""
        copies = getattr(self.module, self.name)[...]
        if self.name == "bias":
            self.module.bias, self.module.use_bias = None, False
            return self._map(_add, copies, self.module(x))
        graph, _ = nnx.split(self.module)
        return self._map(lambda own, x: nnx.merge(graph, {self.name: own[0]})(x), copies, x)

    def _map(self, function: Any, copies: Array, x: Array) -> Any:
        cp, axes = self.cp, live_axes(self.cp, self.cp.flat_axes)
        # Not over tp: it cuts other dims, as the compiler chooses.
        specs = PartitionSpec(axes), cp.spec(x.ndim)
        return spmd.shard_map(cp.mesh, axes, function, specs, cp.spec(x.ndim))(copies, x)


def copied(layers: DecoderLayer, params: Any, cp: ContextParallel | None) -> Any:
    """Return stacked parameters with one copy of each small one per device of dp and cp.

    Args:
        layers: the stacked layers.
        params: their parameters, `[L, ...]`; the small ones become `[L, devices, ...]`.
        cp: context; with None, or if its devices are one, `params` are returned as they are.
    """
    if cp is None or not live_axes(cp, cp.flat_axes):
        return params
    # Inside a `shard_map` over them, gradients are a device's own already, and no axis is live.
    axes, tp = live_axes(cp, cp.flat_axes), live_axes(cp, cp.tp)
    devices = cp.axis_size(axes)
    for path, _, name in _small(layers):
        inner = params
        for key in path:
            inner = inner[key]
        p = inner[name]
        own = jnp.broadcast_to(p[:, None], (p.shape[0], devices, *p.shape[1:]))
        cut = decoder.rule((*path, name)).tp
        dims = [tp if d == cut and tp else None for d in range(p.ndim - 1)]
        spec = PartitionSpec(None, axes, *dims)
        inner[name] = spmd.constrain(own, cp.mesh, cp.axes, spec)
    return params


def use_copies(layer: DecoderLayer, cp: ContextParallel | None) -> DecoderLayer:
    """Return a layer, built on parameters of `copied`, whose modules read their device's copy."""
    if cp is None or not live_axes(cp, cp.flat_axes):
        return layer
    for path, module, name in list(_small(layer)):
        parent: Any = layer
        for key in path[:-1]:
            parent = getattr(parent, key)
        setattr(parent, path[-1], OnEachDevice(module, name, cp))
    return layer


def _small(layer: DecoderLayer) -> Iterator[tuple[tuple[str, ...], Any, str]]:
    """Return path, module and parameter's name of all norms, and of all products with a bias."""
    for path, module in nnx.iter_modules(layer):
        names = tuple(str(key) for key in path)
        if isinstance(module, _NORMS):
            yield names, module, "scale"
        elif isinstance(module, _PRODUCTS) and module.bias is not None:
            parent: Any = layer
            for key in names[:-1]:
                parent = getattr(parent, key)
            if not isinstance(parent, MLP) or parent.spec.chunk is None:
                yield names, module, "bias"


def _add(own: Array, x: Array) -> Array:
    return x + own[0].astype(x.dtype).reshape((1, 1, *own.shape[1:]))
