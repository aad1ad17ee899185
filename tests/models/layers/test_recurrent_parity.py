"""Recurrent mixers are those of the transformers package, with its own random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hcp_jax.models.layers.gated_delta import GatedDeltaNet
from hcp_jax.models.layers.kda import KDA
from hcp_jax.models.layers.mamba2 import Mamba2
from hcp_jax.models.layers.recurrent import Tokens
from hcp_jax.models.recurrent_specs import GatedDeltaSpec, KDASpec, Mamba2Spec

NEEDED = "compares with transformers on torch; pip install 'hcp_jax[parity]'"
torch = pytest.importorskip("torch", reason=NEEDED)
transformers = pytest.importorskip("transformers", reason=NEEDED)

B, T, D = 2, 37, 24


def randomised(layer):
    """Give every parameter of a torch layer random values, also those born as ones or zeros."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape))
    return layer.eval(), {n: p.detach().numpy() for n, p in layer.named_parameters()}


def heads(weight, *size):
    """A torch matrix [out, in] as a kernel [in, *size]."""
    return weight.T.reshape(weight.shape[1], *size)


def taps(weight, *size):
    """A torch convolution [channels, 1, W] as weights [W, *size]."""
    return weight[:, 0].T.reshape(weight.shape[2], *size)


def check(mixer, params, layer):
    graph, state = nnx.split(mixer)
    shapes = jax.tree.map(np.shape, nnx.to_pure_dict(state))
    assert jax.tree.map(np.shape, params) == shapes
    x = np.random.default_rng(0).standard_normal((B, T, D), np.float32)
    with torch.no_grad():
        expected = layer(torch.from_numpy(x)).numpy()
    positions = jnp.arange(T)[None]
    got = jax.jit(lambda params, x: nnx.merge(graph, params)(x, Tokens(positions)))(params, x)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-5 * np.abs(expected).max())


def test_mamba2_is_that_of_nemotron_h():
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

    H, P, N, G = 4, 6, 5, 2
    config = transformers.NemotronHConfig(
        hidden_size=D,
        mamba_num_heads=H,
        mamba_head_dim=P,
        ssm_state_size=N,
        n_groups=G,
        conv_kernel=4,
        chunk_size=8,
        use_conv_bias=True,
        layers_block_type=["mamba"],
        time_step_min=0.0,
    )
    layer, w = randomised(NemotronHMamba2Mixer(config, layer_idx=0))
    sizes = [H * P, H * P, G * N, G * N, H]
    z, x, b, c, dt = np.split(w["in_proj.weight"], np.cumsum(sizes)[:-1])
    inner, state = (H, P), (G, N)
    params = {
        "z_proj": {"kernel": heads(z, *inner)},
        "x_proj": {"kernel": heads(x, *inner)},
        "b_proj": {"kernel": heads(b, *state)},
        "c_proj": {"kernel": heads(c, *state)},
        "dt_proj": {"kernel": heads(dt, H)},
        "dt_bias": w["dt_bias"],
        "A_log": w["A_log"],
        "D": w["D"],
        "norm": {"scale": w["norm.weight"].reshape(inner)},
        "out_proj": {"kernel": w["out_proj.weight"].T.reshape(*inner, D)},
    }
    borders = np.cumsum(sizes[1:3])
    parts = zip(
        "xbc",
        (inner, state, state),
        np.split(w["conv1d.weight"], borders),
        np.split(w["conv1d.bias"], borders),
        strict=True,
    )
    for name, size, weight, bias in parts:
        params |= {f"{name}_conv": taps(weight, *size), f"{name}_conv_bias": bias.reshape(size)}
    mixer = Mamba2(
        Mamba2Spec(
            hidden_size=D,
            num_heads=H,
            head_size=P,
            state_size=N,
            num_groups=G,
            chunk=8,
            dtype="float32",
            norm_eps=config.layer_norm_epsilon,
        ),
        rngs=nnx.Rngs(0),
    )
    check(mixer, params, layer)


def test_the_gated_delta_net_is_that_of_qwen3_next():
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    G, H, K, V = 2, 4, 6, 5
    config = transformers.Qwen3NextConfig(
        hidden_size=D,
        linear_num_key_heads=G,
        linear_num_value_heads=H,
        linear_key_head_dim=K,
        linear_value_head_dim=V,
        linear_conv_kernel_dim=4,
        num_hidden_layers=4,
    )
    layer, w = randomised(Qwen3NextGatedDeltaNet(config, layer_idx=0))
    keys, values, share = (G, K), (H, V), H // G * V
    # q, k, v and z of one key head after the other.
    mixed = w["in_proj_qkvz.weight"].reshape(G, 2 * K + 2 * share, D)
    q, k, v, z = (x.reshape(-1, D) for x in np.split(mixed, np.cumsum([K, K, share]), axis=1))
    b, a = (x.reshape(-1, D) for x in np.split(w["in_proj_ba.weight"].reshape(G, -1, D), 2, axis=1))
    cq, ck, cv = np.split(w["conv1d.weight"], np.cumsum([G * K, G * K]))
    params = {
        "q_proj": {"kernel": heads(q, *keys)},
        "k_proj": {"kernel": heads(k, *keys)},
        "v_proj": {"kernel": heads(v, *values)},
        "z_proj": {"kernel": heads(z, *values)},
        "a_proj": {"kernel": heads(a, H)},
        "b_proj": {"kernel": heads(b, H)},
        "q_conv": taps(cq, *keys),
        "k_conv": taps(ck, *keys),
        "v_conv": taps(cv, *values),
        "dt_bias": w["dt_bias"],
        "A_log": w["A_log"],
        "norm": {"scale": w["norm.weight"]},
        "out_proj": {"kernel": w["out_proj.weight"].T.reshape(*values, D)},
    }
    mixer = GatedDeltaNet(
        GatedDeltaSpec(
            hidden_size=D,
            num_key_heads=G,
            num_value_heads=H,
            key_size=K,
            value_size=V,
            chunk=8,
            dtype="float32",
            norm_eps=config.rms_norm_eps,
        ),
        rngs=nnx.Rngs(0),
    )
    check(mixer, params, layer)


def test_kda_is_that_of_kimi_linear():
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

    H, K = 4, 6
    config = transformers.KimiLinearConfig(
        hidden_size=D,
        linear_num_heads=H,
        linear_head_dim=K,
        linear_conv_kernel_dim=4,
        num_hidden_layers=2,
    )
    layer, w = randomised(KimiLinearDeltaAttention(config, layer_idx=0))
    params = {
        name: {"kernel": heads(w[f"{name}.weight"], H, K)}
        for name in ("q_proj", "k_proj", "v_proj")
    }
    for name, weight in zip("qkv", np.split(w["conv1d.weight"], 3), strict=True):
        params[f"{name}_conv"] = taps(weight, H, K)
    for ours, theirs in (("f", "forget_gate.f"), ("g", "g")):
        params[f"{ours}_a_proj"] = {"kernel": heads(w[f"{theirs}_a_proj.weight"], K)}
        params[f"{ours}_b_proj"] = {"kernel": heads(w[f"{theirs}_b_proj.weight"], H, K)}
    params |= {
        "b_proj": {"kernel": heads(w["b_proj.weight"], H)},
        "dt_bias": w["forget_gate.dt_bias"].reshape(H, K),
        "A_log": w["forget_gate.A_log"].reshape(H),
        "norm": {"scale": w["o_norm.weight"]},
        "out_proj": {"kernel": w["o_proj.weight"].T.reshape(H, K, D)},
    }
    mixer = KDA(
        KDASpec(
            hidden_size=D,
            num_heads=H,
            head_size=K,
            chunk=8,
            dtype="float32",
            norm_eps=config.rms_norm_eps,
        ),
        rngs=nnx.Rngs(0),
    )
    check(mixer, params, layer)
