"""Compute Kimi delta attention (Kimi Linear, 2025): a delta rule with one decay per channel.

q, k, v = silu(short convolution of projections), q and k of length 1
β = sigmoid(b),  log decay [H, K] = -exp(A_log) softplus(low-rank projection + bias)
o = delta rule (recurrence/api.py);  output = projection of norm(o) · sigmoid(low-rank gate)
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
class KDAConfig:
    """Sizes of a KDA mixer.

    Attributes:
        hidden_size: D.
        num_heads: H.
        head_size: K = V; the state of a head is `[K, K]`. It is also the rank of the gates.
        conv_size: tokens that the short convolution sees, the current one included.
        chunk: tokens per chunk of the recurrence, a power of two.
        norm_eps: epsilon of the norm.
        out_gain: variance of the initial output projection, times its fan-in.
        compute_dtype: dtype of activations; decays and states are float32.

    Raises:
        ValueError: if a size is less than 1.
    """

    hidden_size: int
    num_heads: int
    head_size: int = 128
    conv_size: int = 4
    chunk: int = 64
    norm_eps: float = 1e-5
    out_gain: float = 0.5
    compute_dtype: str = "bfloat16"

    def __post_init__(self):
        for name in ("hidden_size", "num_heads", "head_size", "conv_size", "chunk"):
            checks.integer(name, getattr(self, name), least=1)

    def traffic(
        self, cp: ContextParallel, *, rows: int, remat: Remat = "none"
    ) -> tuple[Traffic, ...]:
        """List the collectives of this mixer in one step, for `rows` rows over all dp devices."""
        heads = (self.num_heads, self.head_size)
        return recurrent.mixer_traffic(
            cp,
            rows=rows,
            heads=self.num_heads,
            state=(self.head_size, self.head_size),
            matrix=True,
            convolved=(heads,) * 3,
            conv_size=self.conv_size,
            compute_dtype=self.compute_dtype,
            remat=remat,
        )


class KDA(nnx.Module):
    """Kimi delta attention.

    >>> config = KDAConfig(hidden_size=8, num_heads=2, head_size=4)
    >>> mixer = KDA(config, rngs=nnx.Rngs(0))
    >>> mixer(jnp.ones((1, 6, 8)), positions=jnp.arange(6)[None]).shape
    (1, 6, 8)
    """

    def __init__(self, config: KDAConfig, *, rngs: nnx.Rngs):
        width, dtype = config.hidden_size, config.compute_dtype
        heads = (config.num_heads, config.head_size)
        self.config = config
        for name in ("q", "k", "v"):
            setattr(self, f"{name}_proj", recurrent.project(width, heads, dtype, rngs))
            setattr(self, f"{name}_conv", recurrent.conv_weight(config.conv_size, *heads, rngs))
        self.b_proj = recurrent.project(width, heads[0], dtype, rngs)
        self.f_a_proj = recurrent.project(width, heads[1], dtype, rngs)  # the decay
        self.f_b_proj = recurrent.project(heads[1], heads, dtype, rngs)
        self.g_a_proj = recurrent.project(width, heads[1], dtype, rngs)  # the output's gate
        self.g_b_proj = recurrent.project(heads[1], heads, dtype, rngs)
        self.dt_bias = recurrent.step_biases(1e-3, 0.1, heads, rngs)
        self.A_log = recurrent.decay_rates(1.0, 16.0, heads[0], rngs)
        self.norm = recurrent.HeadNorm(*heads, groups=None, eps=config.norm_eps)
        self.out_proj = recurrent.project_out(*heads, width, config.out_gain, dtype, rngs)

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
        q, k, v = recurrent.convolved(self, ("q", "k", "v"), x, positions, cp)
        rate = self.f_b_proj(self.f_a_proj(x)).astype(jnp.float32)
        step = jax.nn.softplus(rate + self.dt_bias[...][None, None])
        out = delta_rule(
            recurrent.unit_length(q, config.head_size**-0.5),
            recurrent.unit_length(k),
            v,
            jax.nn.sigmoid(self.b_proj(x).astype(jnp.float32)),
            -jnp.exp(self.A_log[...])[None, None, :, None] * step,
            positions,
            cp=cp,
            chunk=config.chunk,
        )
        gate = self.g_b_proj(self.g_a_proj(x)).astype(jnp.float32)
        return self.out_proj((self.norm(out) * jax.nn.sigmoid(gate)).astype(config.compute_dtype))
