import dataclasses
import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hcp_jax as hcp
from hcp_jax.attention.local import RESIDUALS
from hcp_jax.cost.traffic import Remat
from hcp_jax.models.config import ModelConfig
from hcp_jax.models.transformer import abstract_model, init_params

CONFIG = ModelConfig(
    vocab_size=32,
    num_layers=2,
    hidden_size=16,
    intermediate_size=24,
    num_heads=4,
    num_kv_heads=2,
    compute_dtype="float32",
    remat="none",
)
LLAMA3_8B = ModelConfig(
    vocab_size=128_256,
    num_layers=32,
    hidden_size=4096,
    intermediate_size=14_336,
    num_heads=32,
    num_kv_heads=8,
    rope_theta=500_000.0,
)
REMATS = get_args(Remat)
T = 16
SEGMENTS = np.repeat([[0, 1, 2]], [7, 4, 5], axis=1)
POSITIONS = np.concatenate([np.arange(7), np.arange(4), np.arange(5)]).astype(np.int32)[None]
TOKENS = np.random.default_rng(0).integers(0, 32, (1, T)).astype(np.int32)


@functools.cache
def params_of(config):
    return jax.jit(functools.partial(init_params, config))(jax.random.key(0))


@functools.partial(jax.jit, static_argnums=0)
def hidden(config, params, tokens, positions, mask):
    return nnx.merge(abstract_model(config)[0], params)(tokens, positions, mask=mask)


def squares(config, params, cp=None):
    """A loss whose gradient reaches everything."""
    args = {"tokens": TOKENS, "positions": POSITIONS, "mask": config.mask(SEGMENTS)}
    if cp is not None:
        args = cp.shard_batch(args)
    model = nnx.merge(abstract_model(config)[0], params)
    return jnp.sum(model.logits(model(**args, cp=cp)) ** 2)


def value_and_grads(config, cp=None):
    return jax.value_and_grad(functools.partial(squares, config, cp=cp))


@functools.cache
def loss_and_grads(config, cp=None):
    params = params_of(dataclasses.replace(config, remat="none", offload_activations=False))
    return jax.jit(value_and_grads(config, cp))(params)


def assert_same(got, expected, tolerance):
    def same(path, a, b):
        error = np.max(np.abs(a - b)) / np.max(np.abs(b))
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: {error}"

    jax.tree_util.tree_map_with_path(same, got, expected)


def by_the_book(config, params, tokens, positions, segments):
    """Logits of one row in float64, with loops, of the model as papers describe it."""

    def normed(x, scale):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.norm_eps) * scale

    def turned(x):
        half = config.head_dim // 2
        frequency = config.rope_theta ** (-np.arange(half) / half)
        pairs = (x[..., :half] + 1j * x[..., half:]) * np.exp(
            1j * positions[:, None, None] * frequency
        )
        return np.concatenate([pairs.real, pairs.imag], axis=-1)

    def attended(x, p):
        q, k, v = (
            np.einsum("td,dnh->tnh", x, p[f"{name}_proj"]["kernel"]) + p[f"{name}_proj"]["bias"]
            for name in "qkv"
        )
        q, k = turned(normed(q, p["q_norm"]["scale"])), turned(normed(k, p["k_norm"]["scale"]))
        out = np.zeros_like(q)
        for t, n in np.ndindex(*q.shape[:2]):
            kv = n // (config.num_heads // config.num_kv_heads)
            seen = [s for s in range(t + 1) if segments[s] == segments[t]]
            seen = [s for s in seen if t - s < config.sliding_window]
            logits = k[seen, kv] @ q[t, n] / np.sqrt(config.head_dim)
            logits = config.logits_soft_cap * np.tanh(logits / config.logits_soft_cap)
            weights = np.exp(logits) / (np.sum(np.exp(logits)) + np.exp(p["sinks"][n]))
            out[t, n] = weights @ v[seen, kv]
        return np.einsum("tnh,nhd->td", out, p["o_proj"]["kernel"])

    def mlp(x, p):
        gate, up = x @ p["gate_proj"]["kernel"], x @ p["up_proj"]["kernel"]
        return (gate / (1 + np.exp(-gate)) * up) @ p["down_proj"]["kernel"]

    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    x = params["embed_tokens"]["embedding"][tokens]
    for i in range(config.num_layers):
        p = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
        x = x + attended(normed(x, p["input_layernorm"]["scale"]), p["self_attn"])
        x = x + mlp(normed(x, p["post_attention_layernorm"]["scale"]), p["mlp"])
    return normed(x, params["norm"]["scale"]) @ params["lm_head"]["embedding"].T


def test_logits_are_those_of_the_model_written_out_in_float64():
    config = dataclasses.replace(
        CONFIG,
        qk_norm=True,
        qkv_bias=True,
        attention_sinks=True,
        sliding_window=4,
        logits_soft_cap=2.0,
        head_size=6,
    )
    rng = np.random.default_rng(0)
    # Scales that are all 1 and biases that are all 0 would show nothing.
    params = jax.tree.map(
        lambda p: (p + 0.3 * rng.normal(size=p.shape)).astype(np.float32), params_of(config)
    )
    model = nnx.merge(abstract_model(config)[0], params)
    run = jax.jit(lambda: model.logits(model(TOKENS, POSITIONS, mask=config.mask(SEGMENTS))))
    expected = by_the_book(config, params, TOKENS[0], POSITIONS[0], SEGMENTS[0])
    assert np.max(np.abs(run()[0] - expected)) < 1e-5 * np.max(np.abs(expected))


@pytest.mark.parametrize("window", [None, 3])
def test_no_logit_depends_on_a_later_token_or_on_another_document(window):
    config = dataclasses.replace(CONFIG, num_layers=2, sliding_window=window, qk_norm=True)
    graphdef, _ = abstract_model(config)
    params = params_of(config)
    # Tokens that all differ, so that a row of the embedding is a place of the stream.
    tokens = jnp.arange(T, dtype=jnp.int32)[None]

    def logits(table):
        changed = {**params, "embed_tokens": {"embedding": table}}
        model = nnx.merge(graphdef, changed)
        out = model(tokens, POSITIONS, mask=config.mask(SEGMENTS))
        return jnp.sum(model.logits(out)[0], axis=-1)

    depends = jax.jit(jax.jacrev(logits))(params["embed_tokens"]["embedding"])[:, :T]
    depends = np.any(depends != 0, axis=-1)
    place = np.arange(T)
    sees = (place[:, None] >= place) & (SEGMENTS[0][:, None] == SEGMENTS[0])
    if window is not None:  # every layer reaches window - 1 further back
        sees &= place[:, None] - place <= config.num_layers * (window - 1)
    np.testing.assert_array_equal(depends, sees)


def test_documents_packed_in_one_stream_give_what_they_give_alone():
    packed = hidden(CONFIG, params_of(CONFIG), TOKENS, POSITIONS, CONFIG.mask(SEGMENTS))
    alone = hidden(CONFIG, params_of(CONFIG), TOKENS[:, 7:11], POSITIONS[:, 7:11], None)
    np.testing.assert_allclose(packed[:, 7:11], alone, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"remat": "attention"},
        {"remat": "mlp"},
        {"remat": "full"},
        {"remat": "attention", "offload_activations": True},
        {"remat": "full", "offload_activations": True, "mlp_chunk": 5},
    ],
    ids=str,
)
def test_what_saves_memory_changes_neither_loss_nor_gradients(change):
    expected = loss_and_grads(CONFIG)
    assert_same(loss_and_grads(dataclasses.replace(CONFIG, **change)), expected, 1e-6)


@pytest.mark.parametrize(
    ("remat", "kept"),
    [("full", {"hcp_layer_input"}), ("attention", {"hcp_layer_input", *RESIDUALS})],
)
def test_what_a_layer_keeps_goes_to_the_host_and_nothing_else_stays(remat, kept):
    config = dataclasses.replace(CONFIG, remat=remat, offload_activations=True)
    grad = jax.grad(functools.partial(squares, config))
    scans = [
        [v.aval for v in eqn.outvars if v.aval.shape[:1] == (eqn.params["length"],)]
        for eqn in jax.make_jaxpr(grad)(abstract_model(config)[1]).jaxpr.eqns
        if eqn.primitive.name == "scan" and not eqn.params["reverse"]
    ]
    # What the scan over the layers forward gives, but for the hidden states, is what it keeps.
    of_tokens = [x for x in scans[0] if T in x.shape and x.size >= config.num_layers * T * 4]
    assert len(of_tokens) == len(kept)
    assert all("host" in str(x) for x in of_tokens), of_tokens


def test_remat_policies_keep_and_recompute_what_they_say():
    cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=8), comm_type="p2p")
    hops = {r: _count_ppermutes(dataclasses.replace(CONFIG, remat=r), cp) for r in REMATS}
    # "attention" keeps the ring's results, so that only "full" sends keys and values round again.
    assert hops["attention"] == hops["none"] < hops["full"]

    # Products by layer beside those of "none": of q, k, v and the output; of gate and up.
    products = {r: _count_products(dataclasses.replace(CONFIG, remat=r)) for r in REMATS}
    more = {r: count - products["none"] for r, count in products.items()}
    assert more["mlp"] == 0
    assert more["projections"] == 2
    assert more["attention"] == 6
    assert more["full"] > 6


def _count_products(config):
    grad = jax.jit(jax.grad(functools.partial(squares, config)))
    return grad.lower(abstract_model(config)[1]).as_text().count("stablehlo.dot_general")


def _count_ppermutes(config, cp):
    grad = jax.jit(jax.grad(functools.partial(squares, config, cp=cp)))
    return grad.lower(abstract_model(config)[1]).as_text().count("collective_permute")


def test_a_model_over_a_mesh_computes_what_one_device_does():
    config = dataclasses.replace(
        CONFIG, qk_norm=True, qkv_bias=True, attention_sinks=True, remat="attention"
    )
    mesh = hcp.make_mesh(tp=2, cp_outer=2, cp_inner=2)
    cp = hcp.ContextParallel(mesh, comm_type=("all_gather", "a2a+p2p"))
    assert_same(loss_and_grads(config, cp), loss_and_grads(config), 2e-5)


@pytest.mark.parametrize(
    ("comm_types", "turns"),
    [
        (["p2p"] * 4, [4]),
        (["p2p", "p2p", "all_gather", "all_gather"], [2, 2]),
        (["p2p", "all_gather", "p2p", "all_gather"], [2]),
        (["p2p", "all_gather", "all_gather", "p2p"], [1, 2, 1]),
    ],
    ids=str,
)
def test_equal_or_repeating_layers_are_one_scan(comm_types, turns):
    mesh = hcp.make_mesh(cp_outer=4, cp_inner=2)
    cp = hcp.ContextParallel(mesh, comm_type=tuple(comm_types))
    config = dataclasses.replace(CONFIG, num_layers=4)
    traced = jax.make_jaxpr(functools.partial(squares, config, cp=cp))(abstract_model(config)[1])
    scans = [e.params["length"] for e in traced.jaxpr.eqns if e.primitive.name == "scan"]
    assert scans == turns


def test_repeating_layers_are_computed_in_their_order():
    config = dataclasses.replace(CONFIG, num_layers=4)
    mesh = hcp.make_mesh(cp_outer=4, cp_inner=2)
    cp = hcp.ContextParallel(mesh, comm_type=("a2a+p2p", "all_gather") * 2)
    args = {"tokens": TOKENS, "positions": POSITIONS, "mask": config.mask(SEGMENTS)}
    expected = hidden(config, params_of(config), **args)
    model = nnx.merge(abstract_model(config)[0], params_of(config))
    got = jax.jit(lambda batch: model(**batch, cp=cp))(cp.shard_batch(args))
    np.testing.assert_allclose(cp.unshard(got), expected, atol=2e-5)


def test_comm_types_for_another_number_of_layers_are_refused():
    cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=8), comm_type=("p2p",) * 3)
    with pytest.raises(ValueError, match="names 3 layers, but the model has 2"):
        jax.eval_shape(functools.partial(squares, CONFIG, cp=cp), abstract_model(CONFIG)[1])


def test_llama3_8b_has_8030261248_parameters():
    shapes = jax.tree.leaves(abstract_model(LLAMA3_8B)[1])
    assert sum(x.size for x in shapes) == 8_030_261_248
    assert {x.dtype for x in shapes} == {jnp.dtype("float32")}


def test_tied_embeddings_are_the_output_head_and_get_both_gradients():
    tied = dataclasses.replace(CONFIG, tie_embeddings=True)
    params = {**params_of(CONFIG)}
    params["lm_head"] = params["embed_tokens"]
    untied_loss, untied = jax.jit(value_and_grads(CONFIG))(params)
    del params["lm_head"]
    tied_loss, grads = jax.jit(value_and_grads(tied))(params)
    assert tied_loss == pytest.approx(float(untied_loss), rel=1e-6)
    both = untied["embed_tokens"]["embedding"] + untied["lm_head"]["embedding"]
    assert_same(grads["embed_tokens"]["embedding"], both, 1e-5)


def test_every_option_adds_its_own_parameters_and_no_other():
    plain = _names(CONFIG)
    assert _names(dataclasses.replace(CONFIG, qk_norm=True)) - plain == {
        "layers.self_attn.q_norm.scale",
        "layers.self_attn.k_norm.scale",
    }
    assert _names(dataclasses.replace(CONFIG, qkv_bias=True)) - plain == {
        f"layers.self_attn.{name}_proj.bias" for name in "qkv"
    }
    assert _names(dataclasses.replace(CONFIG, attention_sinks=True)) - plain == {
        "layers.self_attn.sinks"
    }
    assert plain - _names(dataclasses.replace(CONFIG, tie_embeddings=True)) == {"lm_head.embedding"}


def test_parameters_are_called_what_hugging_face_calls_them():
    assert _names(CONFIG) == {
        "embed_tokens.embedding",
        "layers.input_layernorm.scale",
        "layers.mlp.down_proj.kernel",
        "layers.mlp.gate_proj.kernel",
        "layers.mlp.up_proj.kernel",
        "layers.post_attention_layernorm.scale",
        "layers.self_attn.k_proj.kernel",
        "layers.self_attn.o_proj.kernel",
        "layers.self_attn.q_proj.kernel",
        "layers.self_attn.v_proj.kernel",
        "lm_head.embedding",
        "norm.scale",
    }


def _names(config):
    paths, _ = jax.tree_util.tree_flatten_with_path(abstract_model(config)[1])
    return {".".join(key.key for key in path) for path, _ in paths}


def test_bfloat16_compute_keeps_parameters_and_gradients_in_float32():
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    params = params_of(CONFIG)
    out = hidden(config, params, TOKENS, POSITIONS, None)
    assert out.dtype == jnp.bfloat16
    exact = hidden(CONFIG, params, TOKENS, POSITIONS, None)
    assert 0 < np.mean(np.abs(out.astype(np.float32) - exact)) < 0.05
    grads = jax.eval_shape(jax.grad(functools.partial(squares, config)), params)
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
