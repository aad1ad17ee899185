"""ParallelConfig: Megatron's words map to the mesh; contradictions are refused."""

import dataclasses

import numpy as np
import pytest

from hcp_jax.dynamic.config import DynamicConfig
from hcp_jax.dynamic.cost import Cost
from hcp_jax.dynamic.scheduler import schedule
from hcp_jax.models.moe_config import MoEConfig
from hcp_jax.parallel.config import ParallelConfig
from hcp_jax.train.config import SMALL_MODEL


def test_megatrons_words_map_to_the_mesh():
    config = ParallelConfig(
        dp=1,
        context_parallel_size=8,
        hierarchical_context_parallel_sizes=[2, 4],
        cp_comm_type="a2a+p2p",
    )
    cp = config.context_parallel()
    assert (cp.mesh.shape["cp_inner"], cp.mesh.shape["cp_outer"]) == (2, 4)
    flat = ParallelConfig(context_parallel_size=8, cp_comm_type="p2p").resolve()
    assert (flat.cp_outer, flat.cp_inner) == (8, 1)
    heads = ParallelConfig(context_parallel_size=8, cp_comm_type="a2a").resolve()
    assert (heads.cp_outer, heads.cp_inner) == (1, 8)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            {"context_parallel_size": 16, "hierarchical_context_parallel_sizes": [2, 4]},
            "multiply to 8",
        ),
        ({"hierarchical_context_parallel_sizes": [8]}, "needs two sizes"),
        ({"context_parallel_size": 8}, "needs hierarchical_context_parallel_sizes"),
        ({"context_parallel_size": 8, "cp_outer": 8}, "use one of the two"),
        ({"cp_outer": 8, "comm_type": ["p2p", "a2a"]}, "lists 2 layers, but the model has 3"),
        ({"cp_outer": 3}, "needs 3 devices, but there are 8"),
        ({"cp_outer": 8, "comm_type": "p3p"}, "did you mean 'p2p'"),
    ],
)
def test_invalid_parallel_configs_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**words).context_parallel(num_layers=3)


def test_megatron_s_words_for_stages_are_pp_and_virtual_stages():
    words = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 3}
    config = ParallelConfig(**words, cp_outer=4)
    assert config == ParallelConfig(pp=2, virtual_stages=3, cp_outer=4)
    assert (config.num_devices, config.devices_per_stage) == (8, 4)
    assert config.context_parallel().mesh.shape["pp"] == 2
    with pytest.raises(ValueError, match=r"pp=4 is given together.*use one of the two"):
        ParallelConfig(pp=4, **words)
    with pytest.raises(ValueError, match="virtual_stages=2 cuts the layers.*but pp is 1"):
        ParallelConfig(virtual_stages=2)


@pytest.mark.parametrize(
    "words",
    [
        {"dynamic_context_parallel": True},
        {"sequence_packing_scheduler": "default_dynamic_cp"},
        {"dynamic": DynamicConfig(enabled=True, max_seqlen_per_dp_cp_rank=512)},
    ],
)
def test_megatron_s_words_for_dynamic_cp_are_those_of_dynamic(words):
    words |= {"max_seqlen_per_dp_cp_rank": 512, "min_dynamic_context_parallel_size": 2}
    given = ParallelConfig(cp_outer=4, comm_type="p2p", **words)
    dynamic = given.resolve().dynamic
    assert (dynamic.enabled, dynamic.tokens, dynamic.min_cp_size) == (True, 512, 2)
    assert ParallelConfig(**dataclasses.asdict(given) | {"dynamic": dynamic}) == given


def test_dp_balanced_is_dynamic_cp_of_one_width():
    given = ParallelConfig(
        dp=2,
        context_parallel_size=4,
        cp_comm_type="p2p",
        sequence_packing_scheduler="dp_balanced",
        max_seqlen_per_dp_cp_rank=512,
    )
    dynamic = given.dynamic
    assert (dynamic.enabled, dynamic.tokens, dynamic.widths) == (True, 512, (4,))
    limits = dynamic.min_cp_size, dynamic.max_cp_size, dynamic.widths
    lengths = np.random.default_rng(0).integers(100, 2048, 40)
    plan = schedule(lengths, 8, dynamic.tokens, *limits, cost=Cost(lanes=1))
    assert {microbatch.grouping for microbatch in plan.microbatches} == {(4, 4)}
    assert plan.balance > 0.9
    assert ParallelConfig(**dataclasses.asdict(given) | {"dynamic": dynamic}) == given


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ({"hybrid_context_parallel": True}, ValueError, "older name of dynamic.*write dynamic_con"),
        (
            {"sequence_packing_scheduler": "dp_balanced", "dynamic_context_parallel": True},
            ValueError,
            "'dp_balanced' keeps one CP size",
        ),
        (
            {"sequence_packing_scheduler": "dp_balanced", "min_dynamic_context_parallel_size": 2},
            ValueError,
            "keeps every document on cp_outer \\* cp_inner = 1 devices; leave it out",
        ),
        (
            {"sequence_packing_scheduler": "default"},
            ValueError,
            "there are default_dynamic_cp, dp_balanced",
        ),
        ({"dynamic_context_parallel": True}, ValueError, "needs max_tokens_per_device"),
        (
            {"min_dynamic_context_parallel_size": 2, "dynamic": DynamicConfig(min_cp_size=4)},
            ValueError,
            "dynamic.min_cp_size is 4, but Megatron's words say 2",
        ),
        (
            {"dynamic_context_parallel": False, "sequence_packing_scheduler": "default_dynamic_cp"},
            ValueError,
            "leave one of them out",
        ),
    ],
)
def test_megatron_s_words_that_contradict_are_refused(words, error, message):
    with pytest.raises(error, match=message):
        ParallelConfig(**words)


MOE = MoEConfig(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=8)


@pytest.mark.parametrize(
    ("parallel", "moe", "words"),
    [
        ({"cp_outer": 2, "cp_inner": 2, "ep": 3}, MOE, "use one of 1, 2, 4"),
        ({"dp": 4, "cp_inner": 4, "ep": 16}, MOE, "num_experts=8"),
        ({"cp_inner": 2, "ep": 2}, None, "the model has no experts"),
        ({"cp_inner": 2, "ep": 2, "expert_model_parallel_size": 4}, MOE, "use one of the two"),
        ({"tp": 16}, MOE, "moe_intermediate_size=8"),
    ],
)
def test_experts_are_cut_over_whole_axes_or_refused(parallel, moe, words):
    model = dataclasses.replace(SMALL_MODEL, num_heads=16, num_kv_heads=16, vocab_size=256, moe=moe)
    with pytest.raises(ValueError, match=words):
        ParallelConfig(**parallel).check_model(model)


def test_megatron_s_word_for_ep():
    config = ParallelConfig(dp=2, cp_outer=2, cp_inner=2, expert_model_parallel_size=4)
    config.check_model(dataclasses.replace(SMALL_MODEL, moe=MOE))
    assert (config.resolve().ep, config.num_devices) == (4, 8)
