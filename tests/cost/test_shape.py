"""FLOPs of a step: what MFU counts."""

import dataclasses
import math

import jax
import pytest

from hcp_jax.cost.shape import ModelShape, step_flops
from hcp_jax.models.config import ModelConfig
from hcp_jax.models.moe_config import MoEConfig
from hcp_jax.models.transformer import abstract_model

LLAMA3_8B = ModelShape(128256, 32, 4096, 14336, 32, 8, 128)


def test_parameters_are_counted_as_published():
    assert LLAMA3_8B.params == 8_030_261_248
    tied = ModelShape(151936, 28, 1024, 3072, 16, 8, 128, tie_embeddings=True)
    assert tied.params == pytest.approx(0.596e9, rel=0.01)


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_parameters_are_those_that_the_model_has(tie_embeddings):
    config = ModelConfig(64, 3, 32, 80, 4, 2, head_size=16, tie_embeddings=tie_embeddings)
    made = sum(math.prod(x.shape) for x in jax.tree.leaves(abstract_model(config)[1]))
    assert ModelShape.from_config(config).params == made


def test_depths_of_multi_token_prediction_are_counted():
    sizes = {"vocab_size": 64, "num_layers": 3, "hidden_size": 32, "intermediate_size": 80}
    heads = {"num_heads": 4, "num_kv_heads": 2, "sliding_window": 8}
    plain, ahead, windows = (
        ModelConfig(**sizes, **heads, mtp_depths=depths, layers=layers)
        for depths, layers in ((0, None), (2, None), (2, "WAW"))
    )
    for config in (ahead, windows):
        made = sum(math.prod(x.shape) for x in jax.tree.leaves(abstract_model(config)[1]))
        assert ModelShape.from_config(config).params == made
    one, more = map(ModelShape.from_config, (plain, ahead))
    products = one.layer_params + 2 * 32 * 32 + one.head_params
    assert step_flops(more, 7, 11) - step_flops(one, 7, 11) == 2 * (6 * products * 7 + 12 * 32 * 11)
    # Two of three layers have a window, and so have those of the depths.
    assert windows.window_shares == {8: 0.8, None: 0.2}


def test_short_streams_cost_six_flops_per_weight_and_token_and_long_ones_attention():
    weights = LLAMA3_8B.params - LLAMA3_8B.head_params  # the embedding multiplies nothing
    short, long = 128, 2**20
    assert step_flops(LLAMA3_8B, short, short**2 / 2) == pytest.approx(
        6 * weights * short, rel=5e-3
    )
    attention = 12 * 32 * 32 * 128 * long**2 / 2
    assert step_flops(LLAMA3_8B, long, long**2 / 2) == pytest.approx(
        6 * weights * long + attention, rel=1e-3
    )
    assert attention > 17 * 6 * weights * long


def test_documents_packed_into_a_stream_have_fewer_flops_than_one_document():
    whole, halves = (step_flops(LLAMA3_8B, 4096, n * (4096 // n) ** 2 / 2) for n in (1, 2))
    of_pairs = step_flops(LLAMA3_8B, 0, 4096**2 / 4)
    assert whole - halves == of_pairs


def test_a_token_goes_through_some_of_the_experts_and_all_are_held():
    moe = MoEConfig(num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768)
    qwen3 = ModelConfig(151936, 48, 2048, 6144, 32, 4, head_size=128, moe=moe)
    shape = ModelShape.from_config(qwen3)
    assert shape.params == pytest.approx(30.53e9, rel=1e-3)  # as published, without norms of heads
    embedding = shape.head_params
    assert shape.product_params + embedding == pytest.approx(3.34e9, rel=3e-3)  # its "A3B"
    own = {"first_k_dense_replace": 1, "shared_expert_intermediate_size": 8}
    small = dataclasses.replace(
        qwen3, num_layers=3, hidden_size=16, vocab_size=8, moe=MoEConfig(4, 2, 8, **own)
    )
    made = sum(math.prod(x.shape) for x in jax.tree.leaves(abstract_model(small)[1]))
    assert ModelShape.from_config(small).params == made
