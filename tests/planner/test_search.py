"""Every split of a cluster, costed, ranked and explained."""

import itertools
import math
import re
from collections import Counter
from typing import get_args

import pytest

import hcp_jax as hcp
from hcp_jax.cost.models import model_shape
from hcp_jax.cost.split import Split
from hcp_jax.cost.traffic import COMM_TYPES, Remat
from hcp_jax.planner import search
from hcp_jax.planner.explain import describe_strategy


@pytest.fixture(scope="module")
def million():
    return search.plan("llama3-8b", 2**20, gpu="h200", hosts=8)


def possible(model, gpus, length):
    """Every split that the model allows, by trying all."""
    divisors = [n for n in range(1, gpus + 1) if gpus % n == 0]
    for pp, dp, tp, outer, inner in itertools.product(divisors, repeat=5):
        if pp * dp * tp * outer * inner != gpus or model.num_kv_heads % tp:
            continue
        width = model.experts.intermediate_size if model.experts else model.intermediate_size
        if width % tp or model.vocab_size % tp or length < 256 * outer * inner:
            continue
        # One level is written on its own axis; two levels need two axes.
        kinds = {
            "p2p": inner == 1,
            "all_gather": inner == 1 < outer,
            "a2a": outer == 1 < inner,
            "a2a+p2p": outer > 1 < inner,
            "a2a+all_gather": outer > 1 < inner,
        }
        eps = {1}
        if model.experts:
            eps |= {inner, outer * inner, dp * outer * inner}
            eps = {ep for ep in eps if model.experts.number % ep == 0}
        for comm_type in (kind for kind, allowed in kinds.items() if allowed):
            exchange = inner if "a2a" in comm_type else 1
            if model.num_heads // tp % exchange:
                continue
            choices = itertools.product(get_args(Remat), (True, False), eps, (1, 2))
            for remat, fsdp, ep, v in choices:
                if (fsdp or dp * outer * inner > 1) and _has_stages(model, pp, v, tp):
                    yield Split(dp, tp, outer, inner, comm_type, remat, fsdp, ep, pp, v)


def _has_stages(model, pp, v, tp):
    """Whether each of pp · v chunks has a layer, when all have as many as the first."""
    if pp == 1:
        return v == 1
    turns = math.ceil(model.num_layers / pp / v)
    if model.experts and model.num_layers != turns * pp * v:
        return False
    cuts = model.vocab_size % (pp * tp) == 0
    return cuts and model.num_layers > turns * (pp * v - 1)


@pytest.mark.parametrize(
    ("name", "gpus", "length"),
    [
        ("llama3-8b", 16, 2**17),
        ("llama3-8b", 16, 2048),  # no chunks of less than a tile
        ("qwen3-32b", 24, 2**17),
        ("qwen3-30b-a3b", 24, 2**17),
    ],
)
def test_every_split_that_the_model_allows_is_tried_and_no_other(name, gpus, length):
    model = model_shape(name)
    found = Counter(search.splits(model, gpus, length))
    assert found == Counter(possible(model, gpus, length))
    assert max(split.cp for split in found) == min(gpus if gpus == 16 else 24, length // 256)
    assert {split.pp > 1 for split in found} == {False, True}


def test_every_split_uses_every_gpu_and_divides_the_heads(million):
    assert len({c.split for c in million.candidates}) == len(million.candidates)
    for split in (c.split for c in million.candidates):
        assert split.pp * split.dp * split.tp * split.cp == 64
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
    for comm_type in set(COMM_TYPES) - {split.comm_type}:
        assert f"{comm_type}, at its best" in text or f"{comm_type}: does not fit" in text


def test_a_pipeline_is_found_where_gathering_the_weights_takes_longer_than_the_layers():
    large = search.plan("llama3-405b", 8192, gpu="h100", hosts=64, batch=64)
    split = large.best.split
    assert split.pp > 1
    assert f"cut over {split.pp} stages" in large.explain()
    without = next(c for c in large.candidates if c.split.pp == 1)
    waits = max(without.cost.transfers, key=lambda t: t.exposed)
    assert waits.what == "weights gathered, gradients scattered"
    assert waits.exposed > 0.3 * without.cost.step_s
    small = search.plan("llama3-8b", 2**17, gpu="h100", hosts=8, batch=16)
    assert small.best.split.pp == 1
    assert "No pipeline: with pp" in small.explain()
    assert any(c.split.pp == 8 and c.fits for c in small.candidates)


def test_experts_are_cut_over_devices_where_that_is_faster_and_the_reason_is_given():
    plan = search.plan("mixtral-8x7b", 2**15, gpu="h200", hosts=4, batch=32)
    ep = plan.best.split.ep
    assert ep > 1
    assert f"Experts are cut over {ep} GPUs" in plan.explain()
    whole = next(c for c in plan.candidates if c.split.ep == 1 and c.fits)
    slower = 1 - whole.cost.tokens_per_s / plan.best.cost.tokens_per_s
    assert f"with all experts on every GPU it would be {slower:.0%} slower" in plan.explain()


@pytest.mark.parametrize(
    ("split", "words"),
    [
        (Split(1, 1, 8, 1, "p2p"), "keys and values go round a ring of 8 GPUs while attention"),
        (Split(1, 1, 8, 1, "all_gather"), "keys and values of all 8 GPUs are gathered before"),
        (Split(1, 1, 1, 8, "a2a"), "8 GPUs exchange heads for sequence: each then has all"),
        (
            Split(1, 1, 2, 4, "a2a+p2p"),
            "4 neighbours exchange heads for sequence, and keys and values go round a ring of 2",
        ),
        (
            Split(1, 1, 2, 4, "a2a+all_gather"),
            "4 neighbours exchange heads for sequence, and keys and values of all 2 such groups",
        ),
    ],
)
def test_each_comm_type_is_explained_by_what_it_moves(split, words):
    assert describe_strategy(split).startswith(words)


def test_the_library_can_be_asked_by_its_one_name():
    assert hcp.plan("qwen3-0.6b", 8192, gpu="h100").best.fits


def test_a_length_that_nothing_fits_names_the_least_cluster_that_would():
    with pytest.raises(ValueError, match=r"fits: .* per GPU, .* \d+ x 8 A100 would do"):
        search.plan("llama3-8b", 2**22, gpu="a100", hosts=1)


@pytest.mark.parametrize("length", [0, -5, 1.5])
def test_a_length_must_be_a_number_of_tokens(length):
    with pytest.raises(ValueError, match="seq_len must be an integer from 1"):
        search.plan("llama3-8b", length)


def test_the_face_has_it():
    assert callable(hcp.plan)


def test_the_cluster_that_would_do_is_the_least_of_such_hosts():
    with pytest.raises(ValueError, match="would do") as told:
        search.plan("llama3-8b", 2**22, gpu="a100", hosts=1)
    hosts = int(re.search(r"(\d+) x 8 A100 would do", str(told.value))[1])
    assert search.plan("llama3-8b", 2**22, gpu="a100", hosts=hosts).best.fits
    with pytest.raises(ValueError, match="would do"):
        search.plan("llama3-8b", 2**22, gpu="a100", hosts=hosts // 2)
