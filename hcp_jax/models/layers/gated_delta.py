"""Compute the gated delta net (Yang et al., 2024), as in Qwen3-Next.

q, k, v = silu(short convolution of projections), q and k of length 1
β = sigmoid(b),  log decay = -exp(A_log) softplus(a + bias)
o = delta rule (recurrence/api.py);  output = projection of norm(o) · silu(z)
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from hcp_jax.base import checks
from hcp_jax.cost.traffic import Remat, Traffic
from hcp_jax.models.layers import recurrent
from hcp_jax.models.layers.embedding import live_tp
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.recurrence.api import delta_rule


@dataclasses.dataclass(frozen=True)
class GatedDeltaConfig:
    """Sizes of a gated delta net.

    Attributes:
        hidden_size: D.
        num_key_heads: G, heads of queries and keys.
        num_value_heads: H; H / G of them share a query and key head.
        key_size: K.
        value_size: V; the state of a head is `[K, V]`.
        conv_size: tokens that the short convolution sees, the current one included.
        chunk: tokens per chunk of the recurrence, a power of two.
        norm_eps: epsilon of the norm.
        out_gain: variance of the initial output projection, times its fan-in.
        compute_dtype: dtype of activations; decays and states are float32.

    Raises:
        ValueError: if sizes do not fit each other.
    """

    hidden_size: int
    num_key_heads: int
    num_value_heads: int
    key_size: int = 128
    value_size: int = 128
    conv_size: int = 4
    chunk: int = 64
    norm_eps: float = 1e-6
    out_gain: float = 0.5
    compute_dtype: str = "bfloat16"

    def __post_init__(self):
        names = "hidden_size num_key_heads num_value_heads key_size value_size conv_size chunk"
        for name in names.split():
            checks.integer(name, getattr(self, name), least=1)
        if self.num_value_heads % self.num_key_heads:
            raise ValueError(
                f"num_value_heads={self.num_value_heads} must be a multiple of "
                f"num_key_heads={self.num_key_heads}."
            )

    def traffic(
        self, cp: ContextParallel, *, rows: int, remat: Remat = "none"
    ) -> tuple[Traffic, ...]:
        """List the collectives of this mixer in one step, for `rows` rows over all dp devices."""
        keys = (self.num_key_heads, self.key_size)
        return recurrent.mixer_traffic(
            cp,
            rows=rows,
            heads=self.num_value_heads,
            state=(self.key_size, self.value_size),
            matrix=True,
            convolved=(keys, keys, (self.num_value_heads, self.value_size)),
            conv_size=self.conv_size,
            compute_dtype=self.compute_dtype,
            remat=remat,
        )


class GatedDeltaNet(nnx.Module):
    """Gated delta net.

    >>> config = GatedDeltaConfig(hidden_size=8, num_key_heads=1, num_value_heads=2, key_size=4,
    ...                           value_size=4)
    >>> mixer = GatedDeltaNet(config, rngs=nnx.Rngs(0))
    >>> mixer(jnp.ones((1, 6, 8)), positions=jnp.arange(6)[None]).shape
    (1, 6, 8)
    """

    def __init__(self, config: GatedDeltaConfig, *, rngs: nnx.Rngs):
        width, dtype = config.hidden_size, config.compute_dtype
        keys = (config.num_key_heads, config.key_size)
        values = (config.num_value_heads, config.value_size)
        self.config = config
        for name, size in (("q", keys), ("k", keys), ("v", values)):
            setattr(self, f"{name}_proj", recurrent.project(width, size, dtype, rngs))
            setattr(self, f"{name}_conv", recurrent.conv_weight(config.conv_size, *size, rngs))
        self.z_proj = recurrent.project(width, values, dtype, rngs)
        self.a_proj = recurrent.project(width, values[0], dtype, rngs)
        self.b_proj = recurrent.project(width, values[0], dtype, rngs)
        self.dt_bias = recurrent.step_biases(1e-3, 0.1, values[:1], rngs)
        self.A_log = recurrent.decay_rates(0.01, 16.0, values[0], rngs)
        self.norm = recurrent.HeadNorm(*values, groups=None, eps=config.norm_eps)
        self.out_proj = recurrent.project_out(*values, width, config.out_gain, dtype, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int32[Array, "B1 T"],
        cp: ContextParallel | None = None,
    ) -> Float[Array, "B T D"]:
        """Mix the tokens of each document; arguments as in `Mamba2`."""
        live_tp(cp)
        config = self.config
        z, a, b = self.z_proj(x), self.a_proj(x), self.b_proj(x)
        q, k, v = recurrent.convolved(self, ("q", "k", "v"), x, positions, cp)
        step = jax.nn.softplus(a.astype(jnp.float32) + self.dt_bias[...][None, None])
        out = delta_rule(
            recurrent.unit_length(q, config.key_size**-0.5),
            recurrent.unit_length(k),
            v,
            jax.nn.sigmoid(b.astype(jnp.float32)),
            -jnp.exp(self.A_log[...])[None, None] * step,
            positions,
            cp=cp,
            chunk=config.chunk,
        )
        out = self.norm(out) * jax.nn.silu(z.astype(jnp.float32))
        return self.out_proj(out.astype(config.compute_dtype))
