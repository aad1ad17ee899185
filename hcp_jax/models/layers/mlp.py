"""Compute a gated MLP, on all tokens of a device at once or chunk by chunk.

Its two inner activations are F wide, 3.5 times a layer's input in Llama 3, and four of them are
live in backward: on a long sequence they are most of a layer's memory. In chunks, they exist for
one chunk at a time, and backward recomputes them. This is written per device (`shard_map`): each
device computes its own tokens, weights that FSDP has cut are gathered once and not once per chunk,
and the gradients of the chunks are summed on the device first, and over devices once.
"""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from hcp_jax.models.layers import chunks
from hcp_jax.models.layers.embedding import live_tp
from hcp_jax.models.rules import Rules, bias, find, matrix
from hcp_jax.models.specs import Activation, MLPSpec
from hcp_jax.parallel import spmd
from hcp_jax.parallel.context import ContextParallel

PRODUCTS = ("hcp_gate", "hcp_up")
"""Names of the outputs of the first two products, for remat policies."""


def _clamped_silu(gate: Array, up: Array) -> Array:
    """Gate as gpt-oss does: steeper than SiLU, of clamped inputs, and with 1 added to `up`."""
    gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0)
    return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)


GATED: dict[Activation, Callable[[Array, Array], Array]] = {
    "silu": lambda gate, up: nnx.silu(gate) * up,
    "gelu_tanh": lambda gate, up: nnx.gelu(gate, approximate=True) * up,
    "clamped_silu": _clamped_silu,
}
"""Function of gate and up for each activation."""


class MLP(nnx.Module):
    """Gated MLP, as `MLPSpec` describes it: down(activation(gate(x)) · up(x))."""

    NAME: ClassVar[str] = "mlp"
    RULES: ClassVar[Rules] = {
        ("gate_proj", "kernel"): matrix(tp=1),  # [D, F]
        ("up_proj", "kernel"): matrix(tp=1),  # [D, F]
        ("gate_proj", "bias"): bias(tp=0),  # [F]
        ("up_proj", "bias"): bias(tp=0),  # [F]
        ("down_proj", "kernel"): matrix(tp=0),  # [F, D]
    }

    def __init__(self, spec: MLPSpec, *, rngs: nnx.Rngs):
        inner, outer = spec.intermediate_size, spec.hidden_size
        self.spec = spec
        self.gate_proj = _linear(spec, outer, inner, 1.0, rngs)
        self.up_proj = _linear(spec, outer, inner, 1.0, rngs)
        self.down_proj = _linear(spec, inner, outer, 0.5 / spec.depth, rngs)

    def __call__(
        self, x: Float[Array, "B T D"], cp: ContextParallel | None = None
    ) -> Float[Array, "B T D"]:
        """Apply the MLP to each token; `cp` says how tokens and weights are cut."""
        tp = live_tp(cp)
        if self.spec.chunk is None:
            return self._at_once(x)
        graph, state = nnx.split(self)
        # Cast here, so that weights travel to the devices in the compute dtype.
        params = jax.tree.map(lambda p: p.astype(self.spec.dtype), nnx.to_pure_dict(state))
        local = functools.partial(_by_chunk, graph, self.spec.chunk, tp)
        if cp is None:
            return local(params, x)
        param_specs = {
            name: {kind: _cut(name, kind, p.ndim, tp) for kind, p in own.items()}
            for name, own in params.items()
        }
        chunked = spmd.shard_map(cp.mesh, cp.axes, local, (param_specs, cp.spec(3)), cp.spec(3))
        return spmd.run(cp.mesh, cp.axes, chunked, cp.spec(3), params, x)

    def treat(
        self, x: Float[Array, "B T D"], tokens: Any, cp: ContextParallel | None
    ) -> tuple[Float[Array, "B T D"], None]:
        """Apply the MLP to all tokens, padding included; there are no sums of a router."""
        return self(x, cp), None

    def _at_once(self, x: Float[Array, "B t D"]) -> Float[Array, "B t D"]:
        gate, up = self.gate_proj(x), self.up_proj(x)
        gate, up = (checkpoint_name(y, n) for y, n in zip((gate, up), PRODUCTS, strict=True))
        return self.down_proj(GATED[self.spec.activation](gate, up))


def _cut(name: str, kind: str, ndim: int, tp: tuple[str, ...]) -> PartitionSpec:
    dim = find(MLP.RULES, (name, kind)).tp
    return PartitionSpec(*(tp or None if d == dim else None for d in range(ndim)))


def _by_chunk(graph: Any, chunk: int, tp: tuple[str, ...], params: dict, x: Array) -> Array:
    # Up, and down again in each chunk (which XLA drops): so the cotangents of the chunks add up in
    # float32.
    params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    # The bias of the output is added once, after the sum over tp.
    out_bias = params["down_proj"].pop("bias", None)
    if out_bias is not None:
        params["down_proj"]["bias"] = jnp.zeros_like(out_bias)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one_chunk(x: Array) -> Array:
        return nnx.merge(graph, params)._at_once(x)

    y = chunks.join(jax.lax.map(one_chunk, chunks.split(x, chunk)), x.shape[1])
    y = jax.lax.psum(y, tp) if tp else y
    return y if out_bias is None else y + out_bias.astype(y.dtype)[None, None]


def _linear(spec: MLPSpec, inputs: int, outputs: int, gain: float, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=spec.bias,
        kernel_init=nnx.initializers.variance_scaling(gain, "fan_in", "normal"),
        dtype=spec.dtype,
        rngs=rngs,
    )
