import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import hcp_jax as hcp
from hcp_jax.models.config import ModelConfig
from hcp_jax.models.layers import decoder
from hcp_jax.models.moe_config import MoEConfig
from hcp_jax.models.pattern import LETTERS
from hcp_jax.models.recurrent_specs import GatedDeltaConfig, KDAConfig, Mamba2Config
from hcp_jax.models.transformer import abstract_model, inside_layer
from hcp_jax.train.sharding import check_divides, param_specs
from hcp_jax.train.step import OptimizerConfig, abstract_state, make_optimizer

CONFIG = ModelConfig(
    vocab_size=64,
    num_layers=2,
    hidden_size=32,
    intermediate_size=48,
    num_heads=8,
    num_kv_heads=4,
    qk_norm=True,
    qkv_bias=True,
    attention_sinks=True,
)


def context(**sizes):
    return hcp.ContextParallel(hcp.make_mesh(**sizes), comm_type="p2p")


def specs(cp, fsdp=False):
    tree = param_specs(abstract_model(CONFIG)[1], cp, fsdp=fsdp)
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, P))
    return {".".join(key.key for key in path): spec for path, spec in flat}


def test_tp_cuts_heads_columns_and_vocabulary_and_nothing_else():
    tp = ("tp",)
    cut = {name: spec for name, spec in specs(context(tp=2, cp_outer=4)).items() if any(spec)}
    assert cut == {
        "embed_tokens.embedding": P(tp, None),
        "lm_head.embedding": P(tp, None),
        "layers.self_attn.q_proj.kernel": P(None, None, tp, None),
        "layers.self_attn.k_proj.kernel": P(None, None, tp, None),
        "layers.self_attn.v_proj.kernel": P(None, None, tp, None),
        "layers.self_attn.q_proj.bias": P(None, tp, None),
        "layers.self_attn.k_proj.bias": P(None, tp, None),
        "layers.self_attn.v_proj.bias": P(None, tp, None),
        "layers.self_attn.o_proj.kernel": P(None, tp, None, None),
        "layers.self_attn.sinks": P(None, tp),
        "layers.mlp.gate_proj.kernel": P(None, None, tp),
        "layers.mlp.up_proj.kernel": P(None, None, tp),
        "layers.mlp.down_proj.kernel": P(None, tp, None),
    }


def test_every_rule_for_tp_has_a_parameter():
    own = {"score_correction": True, "shared_expert_gate": True, "bias": True}
    moe = MoEConfig(8, 2, 8, shared_expert_intermediate_size=8, **own)
    letters = "".join(sorted(set(LETTERS) - {"W"}))
    layers = {
        "layers": letters,
        "num_layers": len(letters),
        "mamba2": Mamba2Config(num_heads=8, head_size=8),
        "gated_delta": GatedDeltaConfig(num_key_heads=2, num_value_heads=4),
        "kda": KDAConfig(num_heads=4),
    }
    named = set()
    for changes in ({"mlp_bias": True, "output_gate": True}, layers, {"moe": moe}):
        config = dataclasses.replace(CONFIG, **changes)
        paths = jax.tree_util.tree_flatten_with_path(abstract_model(config)[1])[0]
        keys = [tuple(key.key for key in path) for path, _ in paths]
        named |= {inside_layer(path)[1] for path in keys}
    modules = [*decoder.MIXERS.values(), *decoder.FEED_FORWARDS.values()]
    assert {(m.NAME, *path) for m in modules for path in m.RULES} <= named


def test_fsdp_cuts_the_first_dim_that_divides_of_every_matrix_and_never_the_layers():
    both = ("dp", "cp_outer")
    cut = specs(context(dp=2, tp=2, cp_outer=2), fsdp=True)
    assert cut["layers.mlp.gate_proj.kernel"] == P(None, both, ("tp",))
    assert cut["layers.mlp.down_proj.kernel"] == P(None, ("tp",), both)
    assert cut["layers.self_attn.q_proj.kernel"] == P(None, both, ("tp",), None)
    assert cut["layers.self_attn.q_norm.scale"] == P(None, None)
    assert cut["norm.scale"] == P(None)
    without_tp = specs(context(cp_outer=4, cp_inner=2), fsdp=True)
    assert without_tp["layers.mlp.gate_proj.kernel"] == P(None, ("cp_outer", "cp_inner"), None)
    # Its 4 kv heads are no multiple of 8.
    assert without_tp["layers.self_attn.o_proj.kernel"][1] == ("cp_outer", "cp_inner")
    assert all(spec[0] is None for name, spec in without_tp.items() if name.startswith("layers"))


def test_fsdp_leaves_whole_what_its_devices_do_not_divide():
    shapes = {"embed_tokens": {"embedding": jax.ShapeDtypeStruct((9, 7), np.float32)}}
    cut = param_specs(shapes, context(cp_outer=8), fsdp=True)
    assert cut == {"embed_tokens": {"embedding": P(None, None)}}


def test_optimizer_state_is_cut_like_its_parameters():
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=1), 10)
    state = abstract_state(CONFIG, optimizer, context(tp=2, cp_outer=4), fsdp=True)
    moments = [
        part
        for part in jax.tree.leaves(
            state.opt_state, is_leaf=lambda x: isinstance(x, dict) and "layers" in x
        )
        if isinstance(part, dict)
    ]
    assert len(moments) == 2
    assert all(moment == state.params for moment in moments)


def test_fsdp_divides_the_bytes_of_the_state():
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=1), 10)
    cp = context(cp_outer=4, cp_inner=2)

    def held(fsdp):
        leaves = jax.tree.leaves(abstract_state(CONFIG, optimizer, cp, fsdp=fsdp))
        return sum(np.prod(x.sharding.shard_shape(x.shape), dtype=int) for x in leaves)

    assert held(True) < held(False) / 6


@pytest.mark.parametrize(
    ("change", "sizes", "says"),
    [
        ({"num_kv_heads": 2}, {"tp": 4, "cp_outer": 2}, "num_kv_heads=2.*a tp that divides 2"),
        ({"num_heads": 6, "num_kv_heads": 6, "head_size": 4}, {"tp": 4, "cp_outer": 2}, "kv_heads"),
        ({"vocab_size": 65}, {"tp": 2, "cp_outer": 4}, "vocab_size=65.*up to 66"),
        ({"intermediate_size": 47}, {"tp": 2, "cp_outer": 4}, "intermediate_size=47"),
    ],
)
def test_a_model_that_tp_cannot_cut_is_refused(change, sizes, says):
    with pytest.raises(ValueError, match=says):
        check_divides(dataclasses.replace(CONFIG, **change), context(**sizes))


def test_a_size_of_one_divides_every_model():
    check_divides(dataclasses.replace(CONFIG, vocab_size=65, num_kv_heads=1), context(cp_outer=8))
