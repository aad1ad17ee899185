"""Every split of a cluster, costed, ranked and explained."""

import time

import pytest

import hcp_jax as hcp
from hcp_jax.cost.shape import ModelShape
from hcp_jax.models.config import ModelConfig
from hcp_jax.planner import search


@pytest.fixture(scope="module")
def million():
    return search.plan("llama3-8b", 2**20, gpu="h200", hosts=8)


def test_all_splits_of_64_gpus_take_less_than_five_seconds():
    begin = time.perf_counter()
    search.plan("llama3-70b", 2**19, gpu="h100", hosts=8)
    assert time.perf_counter() - begin < 5


def test_every_split_uses_every_gpu_and_divides_the_heads(million):
    assert len({c.split for c in million.candidates}) == len(million.candidates)
    for split in (c.split for c in million.candidates):
        assert split.dp * split.tp * split.cp == 64
        assert 32 // split.tp % split.exchange == 0
        assert 8 % split.tp == 0


def test_those_that_fit_come_first_and_the_fastest_of_them_leads(million):
    fits = [c.fits for c in million.candidates]
    assert fits == sorted(fits, reverse=True)
    fastest = max(c.cost.tokens_per_s for c in million.candidates if c.fits)
    assert million.best.cost.tokens_per_s > 0.98 * fastest


def test_what_is_as_fast_goes_by_memory(million):
    best = million.best
    for other in million.candidates:
        if other.fits and other.cost.tokens_per_s > 1.01 * best.cost.tokens_per_s:
            assert other.peak_bytes >= best.peak_bytes


def test_a_batch_is_shared_out_over_dp():
    plan = search.plan("qwen3-8b", 2**16, gpu="h100", hosts=2, batch=4)
    assert {c.split.dp for c in plan.candidates} <= {1, 2, 4}
    assert {c.cost.tokens for c in plan.candidates} == {4 * 2**16}


def test_the_explanation_names_what_the_best_does_and_every_other_comm_type(million):
    text = million.explain()
    split = million.best.split
    assert f"over {split.cp} GPUs" in text
    for comm_type in {"p2p", "all_gather", "a2a", "a2a+p2p"} - {split.comm_type}:
        assert f"{comm_type}, at its best" in text


def test_the_library_can_be_asked_by_its_one_name():
    assert hcp.plan("qwen3-0.6b", 8192, gpu="h100").best.fits


def test_a_config_is_a_model_too():
    config = ModelConfig(
        vocab_size=128256,
        num_layers=32,
        hidden_size=4096,
        intermediate_size=14336,
        num_heads=32,
        num_kv_heads=8,
    )
    assert search.model_shape(config) == search.model_shape("llama3-8b")


@pytest.mark.parametrize("name", search.MODELS)
def test_named_models_are_configs(name):
    fields = search.model_fields(name)
    assert isinstance(search.model_shape(name), ModelShape)
    assert ModelConfig(**fields).head_dim == 128


def test_an_unknown_model_is_an_error_that_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'llama3-8b'"):
        search.plan("llama3-8", 8192)


def test_a_length_that_nothing_fits_names_the_least_cluster_that_would():
    with pytest.raises(ValueError, match=r"fits: .* per GPU, .* \d+ x 8 A100 would do"):
        search.plan("llama3-8b", 2**22, gpu="a100", hosts=1)


@pytest.mark.parametrize("length", [0, -5, 1.5])
def test_a_length_must_be_a_number_of_tokens(length):
    with pytest.raises(ValueError, match="seq_len must be a whole number from 1"):
        search.plan("llama3-8b", length)


def test_the_face_has_it():
    assert callable(hcp.plan)
