"""Mixtures of experts against all experts of all tokens, computed in float64."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hcp_jax as hcp
from hcp_jax.models.layers.moe import MoE
from hcp_jax.models.layers.moe_documents import RoutedTokens
from hcp_jax.models.layers.moe_order import by_expert
from hcp_jax.models.moe_config import MoEConfig
from hcp_jax.models.specs import MLPSpec, MoESpec

ROWS, T, D, F = 2, 16, 12, 8


def spec_of(num_experts, top_k, **own):
    shared = MLPSpec(D, F, "silu", False, 2, "float32", None) if own.pop("shared", False) else None
    usual = {
        "router": "softmax",
        "norm_topk": True,
        "scaling": 1.0,
        "groups": 1,
        "topk_groups": 1,
        "correction": False,
        "shared_gate": shared is not None,
        "activation": "silu",
    }
    sizes = (D, num_experts, top_k, F)
    return MoESpec(*sizes, **usual | own, shared=shared, depth=2, dtype="float32")


@functools.cache
def inputs(spec, skew):
    """Return parameters, activations, which are real, and a cotangent."""
    graph, state = nnx.split(MoE(spec, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(state)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(ROWS, T, D)).astype(np.float32)
    if skew == "one expert":  # every token's first choices are the same
        x[..., 0] = 5
        params["gate"]["kernel"] = (
            params["gate"]["kernel"].at[0].set(-9.0 * jnp.arange(spec.num_experts))
        )
    if "correction" in params["gate"]:
        params["gate"]["correction"] = jnp.asarray(rng.normal(size=spec.num_experts), jnp.float32)
    if spec.bias:  # and inputs that the clamps change
        experts = params["experts"]
        experts["gate_proj"], experts["up_proj"] = (
            4 * experts[n] for n in ("gate_proj", "up_proj")
        )
        for part in (params["gate"], experts):
            for name in [name for name in part if name.endswith("bias")]:
                part[name] = jnp.asarray(rng.normal(size=part[name].shape), jnp.float32)
    real = np.ones((ROWS, T), bool)
    real[1, 11:] = False
    return graph, params, x, real, rng.normal(size=x.shape).astype(np.float32)


def dense(spec, params, x, real):
    """Return the output and the sums of the router, with every expert computed for every token."""
    logits = x @ params["gate"]["kernel"] + params["gate"].get("bias", 0.0)
    share = jax.nn.softmax(logits, -1)
    scores = share if spec.router == "softmax" else jax.nn.sigmoid(logits)
    if spec.router == "sigmoid":
        share = scores / scores.sum(-1, keepdims=True)
    ranked = scores + params["gate"].get("correction", jnp.zeros(()))
    if spec.groups > 1:
        grouped = ranked.reshape(*ranked.shape[:-1], spec.groups, -1)
        rank = jnp.sort(grouped, -1)[..., -2:].sum(-1)
        least = jnp.sort(rank, -1)[..., -spec.topk_groups, None]
        ranked = jnp.where((rank >= least)[..., None], grouped, -jnp.inf).reshape(ranked.shape)
    chosen = ranked >= jnp.sort(ranked, -1)[..., -spec.top_k, None]
    weight = jnp.where(chosen & real[..., None], scores, 0)
    if spec.norm_topk:
        weight = weight / jnp.maximum(weight.sum(-1, keepdims=True), 1e-30)
    weight = weight * spec.scaling
    gate, up, down = (params["experts"][f"{n}_proj"] for n in ("gate", "up", "down"))
    biases = (params["experts"].get(f"{n}_bias", 0.0) for n in ("gate", "up", "down"))
    gate_bias, up_bias, down_bias = biases
    gate = jnp.einsum("btd,edf->btef", x, gate) + gate_bias
    up = jnp.einsum("btd,edf->btef", x, up) + up_bias
    if spec.activation == "silu":
        inner = jax.nn.silu(gate) * up
    else:
        gate, up = jnp.minimum(gate, 7), jnp.clip(up, -7, 7)
        inner = gate / (1 + jnp.exp(-1.702 * gate)) * (1 + up)
    every = jnp.einsum("btef,efd->bted", inner, down) + down_bias
    out = jnp.einsum("bted,bte->btd", every, weight)
    if spec.shared is not None:
        own = {name: p["kernel"] for name, p in params["shared_experts"].items()}
        inner = jax.nn.silu(x @ own["gate_proj"]) * (x @ own["up_proj"])
        gate = jax.nn.sigmoid(x @ params["shared_expert_gate"]["kernel"])
        out = out + gate * (inner @ own["down_proj"])
    tokens = real.sum()
    share, went = share[real], jax.lax.stop_gradient(chosen[real].astype(x.dtype))
    load = went.sum(0) * spec.num_experts / (tokens * spec.top_k)
    balance = (share * load).sum()
    z = jnp.square(jax.scipy.special.logsumexp(logits[real], -1)).sum()
    bias = params["gate"].get("correction", jnp.zeros(spec.num_experts))
    signal = tokens * ((bias - jax.lax.stop_gradient(bias)) * (load - 1)).sum()
    entropy = -(share * jnp.log(share)).sum()
    return out, (balance, jnp.zeros(()), z, entropy, load.max() * tokens, signal, tokens)


def weighted(out, sums, cotangent):
    return (out * cotangent).sum() + 0.7 * sums[0] + 0.1 * sums[2] + sums[5]


@functools.cache
def exact(spec, skew):
    _, params, x, real, cotangent = inputs(spec, skew)
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        params, x, cotangent = jax.tree.map(
            lambda p: jnp.asarray(np.asarray(p), jnp.float64), (params, x, cotangent)
        )

        def loss(params, x):
            out, sums = dense(spec, params, x, real)
            return weighted(out, sums, cotangent), (out, sums)

        return jax.device_get(jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x))


def found(spec, skew, cp=None):
    graph, params, x, real, cotangent = inputs(spec, skew)

    def loss(params, x):
        out, sums = nnx.merge(graph, params).treat(x, RoutedTokens(real), cp)
        return weighted(out, sums, cotangent), (out, sums)

    if cp is not None:
        x, real, cotangent = (cp.shard(y, dim=1) for y in (x, real, cotangent))
    grads, (out, sums) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)
    if cp is not None:
        out, grads = cp.unshard(out, dim=1), (grads[0], cp.unshard(grads[1], dim=1))
    return grads, (out, tuple(sums))


def assert_exact(spec, skew="", cp=None):
    one, many = exact(spec, skew), found(spec, skew, cp)
    pairs = zip(jax.tree.leaves_with_path(one), jax.tree.leaves(many), strict=True)
    for (path, right), got in pairs:
        error = np.max(np.abs(np.asarray(got, np.float64) - right))
        assert error <= 2e-6 * np.max(np.abs(right)) + 1e-12, (jax.tree_util.keystr(path), error)
    return many


SPECS = {
    "top 1 of 3": spec_of(3, 1, norm_topk=False),
    "top 2 of 8": spec_of(8, 2),
    "top 8 of 64": spec_of(64, 8, scaling=2.5),
    "biased": spec_of(8, 2, bias=True, activation="clamped_silu"),
    "shared": spec_of(4, 2, shared=True),
    "groups": spec_of(8, 3, router="sigmoid", groups=4, topk_groups=2, correction=True),
}


@pytest.mark.parametrize("name", [name for name in SPECS if name not in ("top 2 of 8", "biased")])
def test_output_sums_and_gradients_are_those_of_all_experts(name):
    assert_exact(SPECS[name])


@pytest.mark.slow
def test_the_kernels_of_gpus_compute_the_same():
    cp = hcp.ContextParallel(hcp.make_mesh(cp_inner=2, devices=jax.devices()[:2]))
    assert_exact(dataclasses.replace(SPECS["top 2 of 8"], product="triton"), cp=cp)


@pytest.mark.parametrize("name", ["top 1 of 3", "top 2 of 8"])
def test_no_token_is_lost_if_all_choose_the_same_experts(name):
    spec = SPECS[name]
    _, (_, sums) = assert_exact(spec, "one expert")
    assert sums[4] / sums[6] == spec.num_experts / spec.top_k  # some experts have all, others none


@pytest.mark.parametrize(
    ("sizes", "ep", "parts"),
    [
        ({"cp_outer": 2, "cp_inner": 2}, 1, 1),
        ({"dp": 2, "tp": 2, "cp_inner": 2}, 4, 1),
        pytest.param({"dp": 2, "cp_outer": 2, "cp_inner": 2}, 2, 2, marks=pytest.mark.slow),
        pytest.param({"dp": 2, "cp_outer": 2, "cp_inner": 2}, 8, 1, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_meshes_compute_the_same(sizes, ep, parts):
    devices = jax.devices()[: math.prod(sizes.values())]
    cp = hcp.ContextParallel(hcp.make_mesh(**sizes, devices=devices), ep=ep)
    biased, plain = (
        dataclasses.replace(SPECS[name], dispatch_parts=parts) for name in ("biased", "top 2 of 8")
    )
    assert_exact(biased, cp=cp)
    if ep > 1:  # all rows go to one or two devices: many rounds
        assert_exact(plain, "one expert", cp)


def test_padding_is_not_routed():
    graph, params, x, real, _ = inputs(SPECS["top 2 of 8"], "")
    treat = jax.jit(lambda x: nnx.merge(graph, params).treat(x, RoutedTokens(real), None))
    out, sums = treat(x)
    assert not np.any(out[~real])
    assert np.all(np.any(out[real], -1))
    other, same = treat(np.where(real[..., None], x, 9.0))
    assert np.array_equal(out, other)
    assert jax.tree.all(jax.tree.map(np.array_equal, sums, same))
    order = by_expert(jnp.zeros((4, 2), jnp.int32), jnp.array([True, False, True, False]), 3)
    assert order.sizes.tolist() == [4, 0, 0]


@pytest.mark.parametrize(
    ("own", "error", "words"),
    [
        ({"num_experts_per_tok": 5}, ValueError, "can choose from"),
        ({"n_group": 3}, ValueError, "multiple of n_group"),
        ({"n_group": 2}, NotImplementedError, "router 'softmax'"),
        ({"n_group": 4, "router": "sigmoid"}, ValueError, "needs two"),
        ({"shared_expert_gate": True}, ValueError, "shared_expert_intermediate_size"),
        ({"router": "hash"}, ValueError, "router must be one of"),
        ({"product": "cublas"}, ValueError, "product must be one of triton, ragged_dot"),
    ],
)
def test_wrong_settings_are_refused(own, error, words):
    usual = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    with pytest.raises(error, match=words):
        MoEConfig(**usual | own)
