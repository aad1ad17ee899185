"""Logits are those of the transformers package, from the folders that it writes itself."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

import hcp_jax as hcp
from hcp_jax.models.hf import config_json, loading, writing
from hcp_jax.models.pattern import LayerConfig
from hcp_jax.models.transformer import abstract_model
from hcp_jax.train.sharding import param_specs
from tests.models.folders import tensors_of

NEEDED = "compares with transformers on torch; pip install 'hcp_jax[parity]'"
torch = pytest.importorskip("torch", reason=NEEDED)
transformers = pytest.importorskip("transformers", reason=NEEDED)

T, VOCAB = 48, 96
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}

ROTARY, OTHER = LayerConfig(), LayerConfig(rope_theta=3e3)
QWEN3_MOE = {
    "head_dim": 16,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
}
GEMMA3 = {
    "num_hidden_layers": 5,
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "final_logit_softcapping": 5.0,
    "attention_bias": True,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
    },
}
GEMMA3["layer_types"] = GEMMA3["layer_types"][:5]

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.5, 2.0],
    "long_factor": [1.5, 3.0, 8.0],
}
PHI3 = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 48, "pad_token_id": 0}
GPT_OSS = {
    "num_hidden_layers": 3,
    "head_dim": 16,
    "num_local_experts": 6,
    "num_experts_per_tok": 3,
    "sliding_window": 7,
}
GLM4_MOE = {
    "num_hidden_layers": 3,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
    "attention_bias": True,
    "use_qk_norm": True,
}
MINIMAX_M2 = {
    "head_dim": 16,
    "num_local_experts": 6,
    "num_experts_per_tok": 3,
    "rotary_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# The norm of a delta net divides by what may almost cancel: with the usual epsilon, the two forms of
# transformers itself (by chunk and by token) differ by 2.4e-5 here.
QWEN3_NEXT = {
    "rms_norm_eps": 1e-3,
    "num_hidden_layers": 4,
    "head_dim": 16,
    "attention_bias": True,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}
BAMBA = {
    "num_hidden_layers": 3,
    "attn_layer_indices": [1],
    "mamba_n_heads": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 16,
    "pad_token_id": 0,
}

# name -> (config class, its arguments, what of the imported model counts: without it, logits differ)
MODELS = {
    "llama3": ("Llama", {"num_key_value_heads": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {}),
    "llama3.1": ("Llama", {"rope_parameters": LLAMA3}, {"rope_scaling": None}),
    "llama3.2": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "head_dim": 16}, {"rope_scaling": None}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}, "attention_bias": True, "mlp_bias": True}, {"rope_scaling": None}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN | {"truncate": False, "mscale": 1.0, "mscale_all_dim": 0.5, "beta_fast": 16.0}}, {"rope_scaling": None}),
    "mistral": ("Mistral", {"sliding_window": 7}, {"sliding_window": None}),
    "qwen2-yarn": ("Qwen2", {"rope_parameters": YARN, "tie_word_embeddings": True}, {"rope_scaling": None}),
    "qwen2-window": ("Qwen2", WINDOW, {"sliding_window": None}),
    "qwen3-yarn": ("Qwen3", {"head_dim": 16, "rope_parameters": YARN, "attention_bias": True}, {"rope_scaling": None}),
    "qwen2-upper": ("Qwen2", WINDOW | {"num_hidden_layers": 4, "max_window_layers": 2}, {"sliding_window": 9}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": 7}, {"sliding_window": None}),
    "qwen3-moe-dense": ("Qwen3Moe", QWEN3_MOE | {"num_hidden_layers": 3, "mlp_only_layers": [0], "norm_topk_prob": True, "attention_bias": True}, {}),
    "gemma3": ("Gemma3Text", GEMMA3, {"embedding_scale": None}),
    "gemma3-plain": ("Gemma3Text", GEMMA3 | {"final_logit_softcapping": None, "rope_parameters": None, "attention_bias": False, "num_hidden_layers": 6, "layer_types": None}, {"attention_scale": None}),
    "olmo2-gqa": ("Olmo2", {"attention_bias": True, "rms_norm_eps": 1e-3}, {"norm_eps": 1e-5}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 6, "pad_token_id": 0}, {"layers": (ROTARY,) * 3 + (OTHER,)}),
    "smollm3-biases": ("SmolLM3", {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1], "attention_bias": True, "mlp_bias": True, "pad_token_id": 0}, {"layers": (ROTARY, OTHER)}),
    "phi3-short": ("Phi3", PHI3, {"rope_scaling": None}),
    "phi3-long": ("Phi3", PHI3 | {"original_max_position_embeddings": 47}, {"rope_scaling": None}),
    "gpt-oss": ("GptOss", GPT_OSS, {"sliding_window": 9}),
    "glm4-moe": ("Glm4Moe", GLM4_MOE, {"rotary_share": 1.0}),
    "minimax-m2": ("MiniMaxM2", MINIMAX_M2, {"rotary_share": 1.0}),
    "qwen3-next": ("Qwen3Next", QWEN3_NEXT, {"rotary_share": 0.5}),
    "bamba": ("Bamba", BAMBA, {"rotary_share": 1.0}),
}  # fmt: skip

TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, T)).astype(np.int32)
POSITIONS = np.broadcast_to(np.arange(T, dtype=np.int32), TOKENS.shape)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Folders as save_pretrained writes them, and the logits of what is in them."""

    @functools.cache
    def folder_of(name):
        torch.manual_seed(0)
        family, options, _ = MODELS[name]
        config = getattr(transformers, f"{family}Config")(**SMALL | options)
        kind = family.removesuffix("Text")
        config._attn_implementation = "eager"  # which applies soft caps, too
        model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
        with torch.no_grad():
            # Biases that are 0 and norms of 1 show nothing, nor clamps that nothing reaches.
            for place, parameter in model.named_parameters():
                around = 1.0 if parameter.std() == 0 and parameter.mean() == 1 else 0.0
                wide = family == "GptOss" and place.endswith("gate_up_proj")
                parameter.normal_(around, 0.4 if wide else 0.1)
            for place, buffer in model.named_buffers():
                if "correction" in place:
                    buffer.normal_(0.0, 0.1)
            logits = model(torch.tensor(TOKENS.astype(np.int64))).logits.numpy()
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        return folder, logits

    return folder_of


def imported(folder):
    raw = config_json.read_raw(folder)
    return dataclasses.replace(config_json.model_config(raw), compute_dtype="float32", remat="none")


def logits_of(config, params, cp=None):
    args = {"tokens": TOKENS, "positions": POSITIONS}
    if cp is not None:
        args = cp.shard_batch(args | {"mask": config.mask()})
    model = nnx.merge(abstract_model(config)[0], params)
    out = jax.jit(lambda params, args: model.logits(model(**args, cp=cp)))(params, args)
    return np.asarray(out if cp is None else cp.unshard(out, length=T))


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(folder_of, name):
    folder, expected = folder_of(name)
    config = imported(folder)
    params = loading.load_params(config, folder)
    error = np.max(np.abs(logits_of(config, params) - expected))
    print(f"parity {name}: {error:.1e} of {np.max(np.abs(expected)):.2f}")
    assert error < 1e-5
    assert 0.5 < np.max(np.abs(expected)) < 20
    if without := MODELS[name][2]:
        other = dataclasses.replace(config, **without)
        assert np.max(np.abs(logits_of(other, params) - expected)) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["phi3-long", "gpt-oss", "qwen3-next"])
def test_logits_over_eight_devices_are_those_of_transformers(folder_of, name):
    folder, expected = folder_of(name)
    config = imported(folder)
    mesh = hcp.make_mesh(tp=2, cp_outer=2, cp_inner=2)
    cp = hcp.ContextParallel(mesh, comm_type="a2a+p2p")
    specs = param_specs(abstract_model(config)[1], cp, fsdp=True)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    params = loading.load_params(config, folder, shardings)
    assert np.max(np.abs(logits_of(config, params, cp) - expected)) < 1e-5


@pytest.mark.parametrize(
    "name",
    [
        "llama3.1",
        "mistral",
        "qwen2-window",
        "qwen3-yarn",
        "qwen2-upper",
        "gemma3",
        "olmo2-gqa",
        "smollm3-biases",
        "llama-linear",
        "mixtral",
        "qwen3-moe-dense",
        "phi3-long",
        "gpt-oss",
        "glm4-moe",
        "minimax-m2",
        "qwen3-next",
        "bamba",
    ],
)
def test_transformers_reads_what_is_written(folder_of, tmp_path, name):
    folder, expected = folder_of(name)
    config = imported(folder)
    stored = loading.check(config, folder)
    # Without the config.json that it came with, so that every word of it is ours.
    raw = config_json.raw_config(config, 256, "float32")
    writing.write_folder(
        tmp_path, config, raw, lambda slot: loading.read_slot(slot, stored[slot.name]), 50_000
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        logits = model(torch.tensor(TOKENS.astype(np.int64))).logits.numpy()
    np.testing.assert_array_equal(logits, expected)
    assert tensors_of(tmp_path) == tensors_of(folder)
