"""Compute the gated delta net (Yang et al., 2024), as in Qwen3-Next.

q, k, v = silu(short convolution of projections), q and k of length 1
β = sigmoid(b),  log decay = -exp(A_log) softplus(a + bias)
o = delta rule (recurrence/api.py);  output = projection of norm(o) · silu(z)
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from hcp_jax.models.layers import recurrent
from hcp_jax.models.layers.embedding import live_tp
from hcp_jax.models.layers.recurrent import Tokens
from hcp_jax.models.recurrent_specs import GatedDeltaSpec
from hcp_jax.models.rules import Rule, Rules, matrix
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.recurrence.api import delta_rule


class GatedDeltaNet(nnx.Module):
    """Gated delta net.

    >>> spec = GatedDeltaSpec(hidden_size=8, num_key_heads=1, num_value_heads=2, key_size=4,
    ...                       value_size=4)
    >>> mixer = GatedDeltaNet(spec, rngs=nnx.Rngs(0))
    >>> mixer(jnp.ones((1, 6, 8)), Tokens(jnp.arange(6)[None])).shape
    (1, 6, 8)
    """

    NAME: ClassVar[str] = "linear_attn"
    RULES: ClassVar[Rules] = {
        ("q_proj", "kernel"): matrix(tp=1),  # [D, G, K]
        ("k_proj", "kernel"): matrix(tp=1),  # [D, G, K]
        ("v_proj", "kernel"): matrix(tp=1),  # [D, H, V]
        ("z_proj", "kernel"): matrix(tp=1),  # [D, H, V]
        ("a_proj", "kernel"): matrix(tp=1),  # [D, H]
        ("b_proj", "kernel"): matrix(tp=1),  # [D, H]
        ("q_conv",): Rule(tp=1, decay=True),  # [W, G, K]
        ("k_conv",): Rule(tp=1, decay=True),  # [W, G, K]
        ("v_conv",): Rule(tp=1, decay=True),  # [W, H, V]
        ("dt_bias",): Rule(tp=0),  # [H]
        ("A_log",): Rule(tp=0),  # [H]
        ("out_proj", "kernel"): matrix(tp=0, inputs=2),  # [H, V, D]
    }
    share = staticmethod(recurrent.share)

    def __init__(self, spec: GatedDeltaSpec, *, rngs: nnx.Rngs):
        width, dtype = spec.hidden_size, spec.dtype
        keys = (spec.num_key_heads, spec.key_size)
        values = (spec.num_value_heads, spec.value_size)
        self.spec = spec
        for name, size in (("q", keys), ("k", keys), ("v", values)):
            setattr(self, f"{name}_proj", recurrent.project(width, size, dtype, rngs))
            setattr(self, f"{name}_conv", recurrent.conv_weight(spec.conv_size, *size, rngs))
        self.z_proj = recurrent.project(width, values, dtype, rngs)
        self.a_proj = recurrent.project(width, values[0], dtype, rngs)
        self.b_proj = recurrent.project(width, values[0], dtype, rngs)
        self.dt_bias = recurrent.step_biases(1e-3, 0.1, values[:1], rngs)
        self.A_log = recurrent.decay_rates(0.01, 16.0, values[0], rngs)
        self.norm = recurrent.HeadNorm(*values, groups=None, eps=spec.norm_eps)
        self.out_proj = recurrent.project_out(*values, width, 0.5 / spec.depth, dtype, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        tokens: Tokens,
        cp: ContextParallel | None = None,
    ) -> Float[Array, "B T D"]:
        """Mix the tokens of each document; arguments as in `Mamba2`."""
        live_tp(cp)
        spec = self.spec
        z, a, b = self.z_proj(x), self.a_proj(x), self.b_proj(x)
        q, k, v = recurrent.convolved(self, ("q", "k", "v"), x, tokens, cp)
        step = jax.nn.softplus(a.astype(jnp.float32) + self.dt_bias[...][None, None])
        out = delta_rule(
            recurrent.unit_length(q, spec.key_size**-0.5),
            recurrent.unit_length(k),
            v,
            jax.nn.sigmoid(b.astype(jnp.float32)),
            -jnp.exp(self.A_log[...])[None, None] * step,
            tokens.positions,
            cp=cp,
            order=tokens.order,
            chunk=spec.chunk,
        )
        out = self.norm(out) * jax.nn.silu(z.astype(jnp.float32))
        return self.out_proj(out.astype(spec.dtype))
