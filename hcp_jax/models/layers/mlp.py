"""Compute the decoder's MLP, on all tokens of a device at once or chunk by chunk.

Its two inner activations are F wide, 3.5 times a layer's input in Llama 3, and four of them are
live in backward: on a long sequence they are most of a layer's memory. In chunks, they exist for
one chunk at a time, and backward recomputes them. This is written per device (`shard_map`): each
device computes its own tokens, weights that FSDP has cut are gathered once and not once per chunk,
and the gradients of the chunks are summed on the device first, and over devices once.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from hcp_jax.models.config import ModelConfig
from hcp_jax.models.layers import chunks
from hcp_jax.models.layers.embedding import live_tp
from hcp_jax.parallel import spmd
from hcp_jax.parallel.context import ContextParallel


class MLP(nnx.Module):
    """SwiGLU (Shazeer, 2020): down(silu(gate(x)) · up(x))."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        inner, outer = config.intermediate_size, config.hidden_size
        self.config = config
        self.gate_proj = _linear(config, outer, inner, 1.0, rngs)
        self.up_proj = _linear(config, outer, inner, 1.0, rngs)
        self.down_proj = _linear(config, inner, outer, 0.5 / config.num_layers, rngs)

    def __call__(
        self, x: Float[Array, "B T D"], cp: ContextParallel | None = None
    ) -> Float[Array, "B T D"]:
        """Apply the MLP to each token; `cp` says how tokens and weights are cut."""
        tp = live_tp(cp)
        if self.config.mlp_chunk is None:
            return self._at_once(x)
        graph, state = nnx.split(self)
        dtype = self.config.compute_dtype
        # Cast here, so that weights travel to the devices in the compute dtype.
        params = jax.tree.map(lambda p: p.astype(dtype), nnx.to_pure_dict(state))
        local = functools.partial(_by_chunk, graph, self.config.mlp_chunk, tp)
        if cp is None:
            return local(params, x)
        columns, rows = PartitionSpec(None, tp or None), PartitionSpec(tp or None, None)
        cut = {"gate_proj": columns, "up_proj": columns, "down_proj": rows}
        param_specs = {name: {"kernel": spec} for name, spec in cut.items()}
        chunked = spmd.shard_map(cp.mesh, cp.axes, local, (param_specs, cp.spec(3)), cp.spec(3))
        return spmd.run(cp.mesh, cp.axes, chunked, cp.spec(3), params, x)

    def _at_once(self, x: Float[Array, "B t D"]) -> Float[Array, "B t D"]:
        return self.down_proj(nnx.silu(self.gate_proj(x)) * self.up_proj(x))


def _by_chunk(graph: Any, chunk: int, tp: tuple[str, ...], params: dict, x: Array) -> Array:
    # Up, and down again in each chunk (which XLA drops): so the cotangents of the chunks add up in
    # float32.
    params = jax.tree.map(lambda p: p.astype(jnp.float32), params)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one_chunk(x: Array) -> Array:
        return nnx.merge(graph, params)._at_once(x)

    y = chunks.join(jax.lax.map(one_chunk, chunks.split(x, chunk)), x.shape[1])
    return jax.lax.psum(y, tp) if tp else y


def _linear(config: ModelConfig, inputs: int, outputs: int, gain: float, rngs) -> nnx.Linear:
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=False,
        kernel_init=nnx.initializers.variance_scaling(gain, "fan_in", "normal"),
        dtype=config.compute_dtype,
        rngs=rngs,
    )
