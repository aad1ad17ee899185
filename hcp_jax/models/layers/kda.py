"""Compute Kimi delta attention (Kimi Linear, 2025): a delta rule with one decay per channel.

q, k, v = silu(short convolution of projections), q and k of length 1
β = sigmoid(b),  log decay [H, K] = -exp(A_log) softplus(low-rank projection + bias)
o = delta rule (recurrence/api.py);  output = projection of norm(o) · sigmoid(low-rank gate)
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from hcp_jax.models.layers import recurrent
from hcp_jax.models.layers.embedding import live_tp
from hcp_jax.models.layers.recurrent import Tokens
from hcp_jax.models.recurrent_specs import KDASpec
from hcp_jax.models.rules import Rule, Rules, matrix
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.recurrence.api import delta_rule


class KDA(nnx.Module):
    """Kimi delta attention.

    >>> spec = KDASpec(hidden_size=8, num_heads=2, head_size=4)
    >>> mixer = KDA(spec, rngs=nnx.Rngs(0))
    >>> mixer(jnp.ones((1, 6, 8)), Tokens(jnp.arange(6)[None])).shape
    (1, 6, 8)
    """

    NAME: ClassVar[str] = "kda"
    RULES: ClassVar[Rules] = {
        ("q_proj", "kernel"): matrix(tp=1),  # [D, H, K]
        ("k_proj", "kernel"): matrix(tp=1),  # [D, H, K]
        ("v_proj", "kernel"): matrix(tp=1),  # [D, H, K]
        ("b_proj", "kernel"): matrix(tp=1),  # [D, H]
        ("f_b_proj", "kernel"): matrix(tp=1),  # [K, H, K]
        ("g_b_proj", "kernel"): matrix(tp=1),  # [K, H, K]
        ("q_conv",): Rule(tp=1, decay=True),  # [W, H, K]
        ("k_conv",): Rule(tp=1, decay=True),  # [W, H, K]
        ("v_conv",): Rule(tp=1, decay=True),  # [W, H, K]
        ("dt_bias",): Rule(tp=0),  # [H, K]
        ("A_log",): Rule(tp=0),  # [H]
        ("out_proj", "kernel"): matrix(tp=0, inputs=2),  # [H, K, D]
    }
    share = staticmethod(recurrent.share)

    def __init__(self, spec: KDASpec, *, rngs: nnx.Rngs):
        width, dtype = spec.hidden_size, spec.dtype
        heads = (spec.num_heads, spec.head_size)
        self.spec = spec
        for name in ("q", "k", "v"):
            setattr(self, f"{name}_proj", recurrent.project(width, heads, dtype, rngs))
            setattr(self, f"{name}_conv", recurrent.conv_weight(spec.conv_size, *heads, rngs))
        self.b_proj = recurrent.project(width, heads[0], dtype, rngs)
        self.f_a_proj = recurrent.project(width, heads[1], dtype, rngs)  # the decay
        self.f_b_proj = recurrent.project(heads[1], heads, dtype, rngs)
        self.g_a_proj = recurrent.project(width, heads[1], dtype, rngs)  # the output's gate
        self.g_b_proj = recurrent.project(heads[1], heads, dtype, rngs)
        self.dt_bias = recurrent.step_biases(1e-3, 0.1, heads, rngs)
        self.A_log = recurrent.decay_rates(1.0, 16.0, heads[0], rngs)
        self.norm = recurrent.HeadNorm(*heads, groups=None, eps=spec.norm_eps)
        self.out_proj = recurrent.project_out(*heads, width, 0.5 / spec.depth, dtype, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        tokens: Tokens,
        cp: ContextParallel | None = None,
    ) -> Float[Array, "B T D"]:
        """Mix the tokens of each document; arguments as in `Mamba2`."""
        live_tp(cp)
        spec = self.spec
        q, k, v = recurrent.convolved(self, ("q", "k", "v"), x, tokens, cp)
        rate = self.f_b_proj(self.f_a_proj(x)).astype(jnp.float32)
        step = jax.nn.softplus(rate + self.dt_bias[...][None, None])
        out = delta_rule(
            recurrent.unit_length(q, spec.head_size**-0.5),
            recurrent.unit_length(k),
            v,
            jax.nn.sigmoid(self.b_proj(x).astype(jnp.float32)),
            -jnp.exp(self.A_log[...])[None, None, :, None] * step,
            tokens.positions,
            cp=cp,
            order=tokens.order,
            chunk=spec.chunk,
        )
        gate = self.g_b_proj(self.g_a_proj(x)).astype(jnp.float32)
        return self.out_proj((self.norm(out) * jax.nn.sigmoid(gate)).astype(spec.dtype))
