"""Compute the Mamba-2 mixer (Dao and Gu, 2024), as in Nemotron-H.

z, x, B, C, Δ = projections of the input;  x, B, C = silu(short convolution)
S_i = exp(Δ_i A) S_(i-1) + B_i (Δ_i x_i)ᵀ,  y_i = S_iᵀ C_i + D x_i
output = projection of norm(y · silu(z))
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from hcp_jax.models.layers import recurrent
from hcp_jax.models.layers.embedding import live_tp
from hcp_jax.models.layers.recurrent import Tokens
from hcp_jax.models.recurrent_specs import Mamba2Spec
from hcp_jax.models.rules import Rule, Rules, bias, matrix
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.recurrence.api import state_space


class Mamba2(nnx.Module):
    """Mamba-2 mixer.

    >>> spec = Mamba2Spec(hidden_size=8, num_heads=4, head_size=4, state_size=4)
    >>> mixer = Mamba2(spec, rngs=nnx.Rngs(0))
    >>> mixer(jnp.ones((1, 6, 8)), Tokens(jnp.arange(6)[None])).shape
    (1, 6, 8)
    """

    NAME: ClassVar[str] = "mamba"
    RULES: ClassVar[Rules] = {
        ("z_proj", "kernel"): matrix(tp=1),  # [D, H, P]
        ("x_proj", "kernel"): matrix(tp=1),  # [D, H, P]
        ("dt_proj", "kernel"): matrix(tp=1),  # [D, H]
        ("x_conv",): Rule(tp=1, decay=True),  # [W, H, P]
        ("b_conv",): Rule(decay=True),  # [W, G, N]
        ("c_conv",): Rule(decay=True),  # [W, G, N]
        ("x_conv_bias",): bias(tp=0),  # [H, P]
        ("dt_bias",): Rule(tp=0),  # [H]
        ("A_log",): Rule(tp=0),  # [H]
        ("D",): Rule(tp=0),  # [H]
        ("norm", "scale"): bias(tp=0),  # [H, P]
        ("out_proj", "kernel"): matrix(tp=0, inputs=2),  # [H, P, D]
    }
    share = staticmethod(recurrent.share)

    def __init__(self, spec: Mamba2Spec, *, rngs: nnx.Rngs):
        width, heads, groups = spec.hidden_size, spec.num_heads, spec.num_groups
        inner, state = (heads, spec.head_size), (groups, spec.state_size)
        dtype = spec.dtype
        self.spec = spec
        self.z_proj = recurrent.project(width, inner, dtype, rngs)
        self.x_proj = recurrent.project(width, inner, dtype, rngs)
        self.b_proj = recurrent.project(width, state, dtype, rngs)
        self.c_proj = recurrent.project(width, state, dtype, rngs)
        self.dt_proj = recurrent.project(width, heads, dtype, rngs)
        for name, size in (("x", inner), ("b", state), ("c", state)):
            setattr(self, f"{name}_conv", recurrent.conv_weight(spec.conv_size, *size, rngs))
            setattr(self, f"{name}_conv_bias", nnx.Param(jnp.zeros(size, jnp.float32)))
        self.dt_bias = recurrent.step_biases(1e-3, 0.1, (heads,), rngs)
        self.A_log = recurrent.decay_rates(1.0, 16.0, heads, rngs)
        self.D = nnx.Param(jnp.ones(heads, jnp.float32))
        self.norm = recurrent.HeadNorm(*inner, groups=groups, eps=spec.norm_eps)
        self.out_proj = recurrent.project_out(*inner, width, 0.5 / spec.depth, dtype, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        tokens: Tokens,
        cp: ContextParallel | None = None,
    ) -> Float[Array, "B T D"]:
        """Mix the tokens of each document.

        Args:
            x: hidden states, in cp's layout.
            tokens: positions of the tokens in their documents, and with groups their order.
            cp: context; None for one device.
        """
        live_tp(cp)
        spec, z, dt = self.spec, self.z_proj(x), self.dt_proj(x)
        v, k, q = recurrent.convolved(self, ("x", "b", "c"), x, tokens, cp)
        step = jax.nn.softplus(dt.astype(jnp.float32) + self.dt_bias[...][None, None])
        if spec.step_limit is not None:
            step = jnp.clip(step, *spec.step_limit)
        log_decay = -jnp.exp(self.A_log[...])[None, None] * step
        y = state_space(
            q,
            k,
            (v * step[..., None]).astype(v.dtype),
            log_decay,
            tokens.positions,
            cp=cp,
            order=tokens.order,
            chunk=spec.chunk,
        )
        y = y.astype(jnp.float32) + self.D[...][None, None, :, None] * v
        y = self.norm(y * jax.nn.silu(z.astype(jnp.float32)))
        return self.out_proj(y.astype(spec.dtype))
