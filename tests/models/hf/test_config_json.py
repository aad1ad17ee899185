"""config.json: read as transformers reads it, refused by name and value where we would differ."""

import dataclasses
import json

import pytest

from hcp_jax.models.config import ModelConfig
from hcp_jax.models.hf import config_json
from hcp_jax.models.layers.rope import RopeScaling
from hcp_jax.models.moe_config import MoEConfig
from hcp_jax.models.pattern import LayerConfig

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
MODEL = ModelConfig(96, 2, 64, 80, 8, 2, norm_eps=1e-6)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def read(family="llama", **changes):
    return config_json.model_config({"model_type": family} | SIZES | changes)


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("llama", {}, {}),
        ("llama", {"rms_norm_eps": 1e-5, "tie_word_embeddings": True}, {"norm_eps": 1e-5, "tie_embeddings": True}),
        ("llama", {"head_dim": 8}, {}),
        ("llama", {"head_dim": None, "num_key_value_heads": None}, {"num_kv_heads": 8}),
        ("llama", {"head_dim": 16, "sliding_window": 7}, {"head_size": 16}),
        ("mistral", {}, {"sliding_window": 4096}),
        ("mistral", {"sliding_window": None}, {}),
        ("qwen2", {"attention_bias": True}, {"qkv_bias": True}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 7}, {"qkv_bias": True}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}, {"qkv_bias": True}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}, {"qkv_bias": True, "sliding_window": 7}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}, {"qkv_bias": True, "sliding_window": 7, "layers": "AW"}),
        ("llama", {"attention_bias": True, "mlp_bias": True}, {"qkv_bias": True, "o_bias": True, "mlp_bias": True}),
        ("olmo2", {}, {"norm_eps": 1e-5, "norms": "after", "qk_norm": True, "qk_norm_over": "heads"}),
        ("smollm3", {"no_rope_layers": [0, 0, 1]}, {"tie_embeddings": True, "rope_theta": 2e6, "rotary": False}),
        ("smollm3", {"no_rope_layers": [1, 0]}, {"tie_embeddings": True, "rope_theta": 2e6, "layers": (LayerConfig(), LayerConfig(rotary=False))}),
        ("qwen3", {"attention_bias": True, "head_dim": 8}, {"qk_norm": True, "qkv_bias": True, "o_bias": True}),
        ("qwen3", {}, {"qk_norm": True, "head_size": 128}),
        ("mixtral", {}, {"norm_eps": 1e-5, "rope_theta": 1e6, "moe": MoEConfig(8, 2, 80)}),
        ("qwen3_moe", {}, {"qk_norm": True, "moe": MoEConfig(128, 8, 768, norm_topk_prob=False)}),
        ("qwen3", {"head_dim": 8, "use_sliding_window": True, "sliding_window": 7, "layer_types": ["sliding_attention"] * 2}, {"qk_norm": True, "sliding_window": 7}),
    ],
)  # fmt: skip
def test_every_family_is_read_with_the_defaults_it_has(family, changes, expected):
    assert read(family, **changes) == dataclasses.replace(MODEL, **expected)


@pytest.mark.parametrize("form", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"rope_type": "default"}, None),
        ({"type": "linear", "factor": 2}, RopeScaling("linear", 2.0)),
        (LLAMA3, RopeScaling("llama3", 8.0, 512)),
        (YARN, RopeScaling("yarn", 4.0, 128)),
        (YARN | {"factor": None}, RopeScaling("yarn", 4.0, 128)),
        (YARN | {"beta_fast": 16, "truncate": False}, RopeScaling("yarn", 4.0, 128, beta_fast=16.0, truncate=False)),
        (YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, RopeScaling("yarn", 4.0, 128, attention_factor=1.0)),
        (YARN | {"attention_factor": 1.5}, RopeScaling("yarn", 4.0, 128, attention_factor=1.5)),
    ],
)  # fmt: skip
def test_rope_is_read_from_both_forms_of_the_file(form, values, expected):
    inside = form == "rope_parameters"
    theta = {"rope_theta": 5e5}
    got = read(**{form: values | (theta if inside else {})}, **({} if inside else theta))
    assert got == dataclasses.replace(MODEL, rope_theta=5e5, rope_scaling=expected)


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("deepseek_v3", {}, "model_type='deepseek_v3' is not supported. Supported are llama .*qwen3"),
        (None, {}, "model_type=None"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\]"),
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("phi3", {"rope_scaling": YARN}, "rope_type='yarn' is not supported for model_type='phi3'"),
        ("phi3", {"resid_pdrop": 0.1}, "resid_pdrop=0.1"),
        ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit=5.0"),
        ("gpt_oss", {"quantization_config": {"quant_method": "mxfp4"}}, "quantization_config=.*mxfp4"),
        ("bamba", {"mamba_proj_bias": True}, "mamba_proj_bias=True"),
        ("minimax_m2", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
        ("qwen3_next", {"mtp_num_hidden_layers": 1}, "mtp_num_hidden_layers=1"),
        ("gemma3_text", {"hidden_activation": "gelu"}, "hidden_activation='gelu'"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 1e4}}, "needs the parts full_attention"),
        ("gemma3_text", {"rope_parameters": {"full_attention": {"partial_rotary_factor": 0.5}}}, "partial_rotary_factor=0.5"),
        ("gemma3_text", {"attn_logit_softcapping": 3.0}, "attn_logit_softcapping=3.0"),
        ("smollm3", {"use_sliding_window": True}, "use_sliding_window of smollm3"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "with use_sliding_window=False"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config=.*bits.*quantised"),
        ("llama", {"auto_map": {"AutoModelForCausalLM": "x.Y"}}, "auto_map=.*never run"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor=0.25"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'.*llama3"),
        ("llama", {"rope_scaling": {"rope_type": "longrope"}}, "rope_type='longrope'"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "one for all layers"),
    ],
)  # fmt: skip
def test_what_would_be_computed_otherwise_is_refused_by_name_and_value(family, changes, says):
    with pytest.raises(NotImplementedError, match=f"config.json: .*{says}"):
        read(family, **changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": None}, "hidden_size must be an integer, got None"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers must be an integer, got '2'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_type='linear' needs factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "needs low_freq_factor, high_f"),
        ({"num_attention_heads": 7}, "num_heads=7 must be a multiple"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers must be a list of 2"),
        (
            {"model_type": "gemma3_text", "layer_types": ["full_attention"]},
            "layer_types must be a list of 2",
        ),
        (
            {"model_type": "gemma3_text", "sliding_window": None},
            "sliding_window must be an integer",
        ),
    ],
)
def test_what_is_missing_or_contradicts_itself_is_told(changes, says):
    with pytest.raises(ValueError, match=says):
        read(**changes)


def test_kv_heads_may_be_left_out_by_llama_alone():
    raw = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
    assert config_json.model_config({"model_type": "llama"} | raw).num_kv_heads == 8
    with pytest.raises(ValueError, match="num_key_value_heads must be an integer"):
        config_json.model_config({"model_type": "qwen2"} | raw)


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_folder_without_a_config_is_told(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json"):
        config_json.read_raw(tmp_path)


@pytest.mark.parametrize(
    "model",
    [
        MODEL,
        dataclasses.replace(MODEL, sliding_window=9, head_size=16),
        dataclasses.replace(MODEL, qkv_bias=True, tie_embeddings=True, rope_theta=1e6),
        dataclasses.replace(MODEL, qkv_bias=True, sliding_window=9),
        dataclasses.replace(MODEL, qk_norm=True, rope_scaling=RopeScaling("linear", 2.0)),
        dataclasses.replace(MODEL, rope_scaling=RopeScaling("llama3", 8.0, 64)),
        dataclasses.replace(MODEL, rope_scaling=RopeScaling("yarn", 8.0, 64, truncate=False)),
    ],
)
def test_what_is_written_reads_back_as_the_same_model(model):
    raw = json.loads(json.dumps(config_json.raw_config(model, 4096, "bfloat16")))
    assert config_json.model_config(raw) == model
    assert raw["max_position_embeddings"] == 4096
    assert raw["torch_dtype"] == "bfloat16"


def test_of_an_unchanged_model_the_file_it_came_with_is_kept():
    like = {"model_type": "qwen3", **SIZES, "head_dim": 16, "eos_token_id": 7, "dtype": "float32"}
    like["rope_parameters"] = YARN | {"rope_theta": 1e6}
    kept = config_json.raw_config(config_json.model_config(like), 100, "float32", like)
    assert kept == {k: v for k, v in like.items() if k != "dtype"} | {"torch_dtype": "float32"}


def test_a_longer_context_and_another_rope_are_written_into_the_file_it_came_with():
    like = {"model_type": "llama", **SIZES, "eos_token_id": 7, "rope_theta": 1e4}
    longer = dataclasses.replace(MODEL, rope_theta=8e6, rope_scaling=RopeScaling("yarn", 8.0, 512))
    raw = config_json.raw_config(longer, 4096, "bfloat16", like)
    assert config_json.model_config(raw) == longer
    assert (raw["eos_token_id"], raw["max_position_embeddings"]) == (7, 4096)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"attention_sinks": True}, "as llama it cannot have attention_sinks=True"),
        ({"logits_soft_cap": 30.0}, "as llama it cannot have logits_soft_cap=30.0"),
        ({"qk_norm": True, "qkv_bias": True}, "as qwen3 it cannot have qkv_bias=True"),
    ],
)
def test_a_model_of_no_family_is_not_written(changes, says):
    with pytest.raises(NotImplementedError, match=says):
        config_json.raw_config(dataclasses.replace(MODEL, **changes), 512, "float32")


def test_a_window_that_its_origin_cannot_have_is_not_written():
    like = {"model_type": "llama", **SIZES}
    with pytest.raises(NotImplementedError, match="as llama it cannot have sliding_window=9"):
        config_json.raw_config(dataclasses.replace(MODEL, sliding_window=9), 512, "float32", like)
