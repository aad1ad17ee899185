"""Compute the Mamba-2 mixer (Dao and Gu, 2024), as in Nemotron-H.

z, x, B, C, Δ = projections of the input;  x, B, C = silu(short convolution)
S_i = exp(Δ_i A) S_(i-1) + B_i (Δ_i x_i)ᵀ,  y_i = S_iᵀ C_i + D x_i
output = projection of norm(y · silu(z))
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from hcp_jax.base import checks
from hcp_jax.cost.traffic import Remat, Traffic
from hcp_jax.models.layers import recurrent
from hcp_jax.models.layers.embedding import live_tp
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.recurrence.api import state_space


@dataclasses.dataclass(frozen=True)
class Mamba2Config:
    """Sizes of a Mamba-2 mixer.

    Attributes:
        hidden_size: D.
        num_heads: H.
        head_size: P, the channels of one head.
        state_size: N; the state of a head is `[N, P]`.
        num_groups: G; H / G heads share B and C, and are normalised together.
        conv_size: tokens that the short convolution sees, the current one included.
        chunk: tokens per chunk of the recurrence.
        norm_eps: epsilon of the norm.
        step_limit: least and greatest Δ.
        out_gain: variance of the initial output projection, times its fan-in.
        compute_dtype: dtype of activations; decays and states are float32.

    Raises:
        ValueError: if sizes do not fit each other.
    """

    hidden_size: int
    num_heads: int
    head_size: int = 64
    state_size: int = 128
    num_groups: int = 1
    conv_size: int = 4
    chunk: int = 128
    norm_eps: float = 1e-5
    step_limit: tuple[float, float] = (0.0, math.inf)
    out_gain: float = 0.5
    compute_dtype: str = "bfloat16"

    def __post_init__(self):
        names = "hidden_size num_heads head_size state_size num_groups conv_size chunk"
        for name in names.split():
            checks.integer(name, getattr(self, name), least=1)
        if self.num_heads % self.num_groups:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_groups={self.num_groups}."
            )

    def traffic(
        self, cp: ContextParallel, *, rows: int, remat: Remat = "none"
    ) -> tuple[Traffic, ...]:
        """List the collectives of this mixer in one step, for `rows` rows over all dp devices."""
        group = (self.num_groups, self.state_size)
        return recurrent.mixer_traffic(
            cp,
            rows=rows,
            heads=self.num_heads,
            state=(self.state_size, self.head_size),
            matrix=False,
            convolved=((self.num_heads, self.head_size), group, group),
            conv_size=self.conv_size,
            compute_dtype=self.compute_dtype,
            remat=remat,
        )


class Mamba2(nnx.Module):
    """Mamba-2 mixer.

    >>> config = Mamba2Config(hidden_size=8, num_heads=4, head_size=4, state_size=4)
    >>> mixer = Mamba2(config, rngs=nnx.Rngs(0))
    >>> mixer(jnp.ones((1, 6, 8)), positions=jnp.arange(6)[None]).shape
    (1, 6, 8)
    """

    def __init__(self, config: Mamba2Config, *, rngs: nnx.Rngs):
        width, heads, groups = config.hidden_size, config.num_heads, config.num_groups
        inner, state = (heads, config.head_size), (groups, config.state_size)
        dtype = config.compute_dtype
        self.config = config
        self.z_proj = recurrent.project(width, inner, dtype, rngs)
        self.x_proj = recurrent.project(width, inner, dtype, rngs)
        self.b_proj = recurrent.project(width, state, dtype, rngs)
        self.c_proj = recurrent.project(width, state, dtype, rngs)
        self.dt_proj = recurrent.project(width, heads, dtype, rngs)
        for name, size in (("x", inner), ("b", state), ("c", state)):
            setattr(self, f"{name}_conv", recurrent.conv_weight(config.conv_size, *size, rngs))
            setattr(self, f"{name}_conv_bias", nnx.Param(jnp.zeros(size, jnp.float32)))
        self.dt_bias = recurrent.step_biases(1e-3, 0.1, (heads,), rngs)
        self.A_log = recurrent.decay_rates(1.0, 16.0, heads, rngs)
        self.D = nnx.Param(jnp.ones(heads, jnp.float32))
        self.norm = recurrent.HeadNorm(*inner, groups=groups, eps=config.norm_eps)
        self.out_proj = recurrent.project_out(*inner, width, config.out_gain, dtype, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int32[Array, "B1 T"],
        cp: ContextParallel | None = None,
    ) -> Float[Array, "B T D"]:
        """Mix the tokens of each document.

        Args:
            x: hidden states, in cp's layout.
            positions: number of tokens of the same document before each token.
            cp: context; None for one device.
        """
        live_tp(cp)
        config, z, dt = self.config, self.z_proj(x), self.dt_proj(x)
        v, k, q = recurrent.convolved(self, ("x", "b", "c"), x, positions, cp)
        step = jax.nn.softplus(dt.astype(jnp.float32) + self.dt_bias[...][None, None])
        step = jnp.clip(step, *config.step_limit)
        log_decay = -jnp.exp(self.A_log[...])[None, None] * step
        y = state_space(
            q,
            k,
            (v * step[..., None]).astype(v.dtype),
            log_decay,
            positions,
            cp=cp,
            chunk=config.chunk,
        )
        y = y.astype(jnp.float32) + self.D[...][None, None, :, None] * v
        y = self.norm(y * jax.nn.silu(z.astype(jnp.float32)))
        return self.out_proj(y.astype(config.compute_dtype))
