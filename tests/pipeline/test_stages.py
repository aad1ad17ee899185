"""Cutting a model into stages: equal chunks, layers of zeros at the end, refusals that say what works."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import hcp_jax as hcp
from hcp_jax.models.config import ModelConfig
from hcp_jax.models.moe_config import MoEConfig
from hcp_jax.models.transformer import abstract_model
from hcp_jax.pipeline.stages import (
    Stages,
    stage_params,
    stage_shardings,
    whole_params,
    without_empty,
)
from hcp_jax.pipeline.ticks import Pipeline

MODEL = ModelConfig(
    vocab_size=32,
    num_layers=7,
    hidden_size=16,
    intermediate_size=24,
    num_heads=4,
    num_kv_heads=2,
    compute_dtype="float32",
)


def numbered(model):
    """Return parameters in which every number is different."""
    shapes = abstract_model(model)[1]
    return jax.tree.map(lambda x: 1.0 + np.arange(x.size).reshape(x.shape), shapes)


@pytest.mark.parametrize(
    ("pp", "v", "layers"), [(2, 1, "A"), (4, 1, "WA"), (2, 2, "A"), (1, 1, "WWA")]
)
def test_parameters_of_stages_are_the_model_s_own(pp, v, layers):
    window = 4 if "W" in layers else None
    model = dataclasses.replace(MODEL, layers=layers, sliding_window=window)
    stages, params = Stages(model, pp, v), numbered(model)
    staged = stage_params(stages, params)
    back = whole_params(stages, staged)
    assert jax.tree.all(jax.tree.map(np.array_equal, back, params))
    width = len(layers)
    for kind in range(width):
        staged_kind, own_kind = (
            tree["layers"][str(kind)] if width > 1 else tree["layers"] for tree in (staged, params)
        )
        scale, own = (np.asarray(x["input_layernorm"]["scale"]) for x in (staged_kind, own_kind))
        for stage, chunk, turn in np.ndindex(scale.shape[:3]):
            period = (chunk * pp + stage) * stages.turns + turn
            real = period * width + kind < 7
            assert np.array_equal(scale[stage, chunk, turn], own[period] if real else 0 * own[0])


def test_layers_of_zeros_get_no_gradients():
    model = dataclasses.replace(MODEL, layers="WA", sliding_window=4)
    stages = Stages(model, 2, 2)  # W A  W A  W A  W 0
    ones = jax.tree.map(np.ones_like, stage_params(stages, numbered(model)))
    cleared = jax.jit(without_empty, static_argnums=0)(stages, ones)
    w, a = (cleared["layers"][kind]["input_layernorm"]["scale"][..., 0] for kind in "01")
    assert w.tolist() == [[[1], [1]], [[1], [1]]]
    assert a.tolist() == [[[1], [1]], [[1], [0]]]
    assert np.all(np.asarray(cleared["norm"]["scale"]) == 1)


def test_stages_and_fsdp_cut_every_matrix():
    cp = hcp.ContextParallel(hcp.make_mesh(pp=2, tp=2, cp_outer=2), "p2p")
    shardings = stage_shardings(Stages(MODEL, 2), cp, abstract_model(MODEL)[1], fsdp=True)
    q = shardings["layers"]["self_attn"]["q_proj"]["kernel"].spec  # [pp, v, turns, D, N, H]
    assert q == PartitionSpec("pp", None, None, "cp_outer", "tp", None)
    assert shardings["embed_tokens"]["embedding"].spec == PartitionSpec(("pp", "tp"), "cp_outer")
    assert shardings["norm"]["scale"].spec == PartitionSpec(None)


@pytest.mark.parametrize(
    ("changes", "pp", "v", "error", "message"),
    [
        ({"num_layers": 5}, 4, 1, ValueError, "1 of 4 chunks would have no layer.*at most 3"),
        ({"num_layers": 2}, 2, 2, ValueError, "2 of 4 chunks"),
        ({"vocab_size": 33}, 2, 1, ValueError, "Round vocab_size up to 34"),
        (
            {"layers": "AWW", "sliding_window": 4, "num_layers": 3},
            1,
            1,
            NotImplementedError,
            "runs of 2 kinds",
        ),
        ({}, 0, 1, ValueError, "num_stages"),
        ({"moe": MoEConfig(4, 2, 8)}, 2, 1, NotImplementedError, "num_layers=6 or 8"),
        (
            {"moe": MoEConfig(4, 2, 8, first_k_dense_replace=1)},
            2,
            1,
            NotImplementedError,
            "first_k_dense_replace: 0",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused_with_what_can(changes, pp, v, error, message):
    with pytest.raises(error, match=message):
        Stages(dataclasses.replace(MODEL, **changes), pp, v)


@pytest.mark.parametrize(
    ("mesh", "words", "changes", "error", "message"),
    [
        ({"cp_outer": 8}, {}, {}, ValueError, "no axis 'pp'"),
        ({"pp": 2, "cp_outer": 4}, {"dp": "pp"}, {}, ValueError, "has a role in cp"),
        (
            {"pp": 2, "cp_outer": 4},
            {"comm_type": ("p2p",) * 4 + ("a2a",) * 3},
            {},
            NotImplementedError,
            "must repeat every 4 layers",
        ),
        (
            {"pp": 2, "cp_outer": 4},
            {"comm_type": ("p2p",) * 8},
            {},
            ValueError,
            "names 8 layers, but the model has 7",
        ),
        ({"pp": 2, "tp": 4}, {}, {}, ValueError, "tp=4 cannot cut num_kv_heads=2"),
        (
            {"pp": 2, "cp_outer": 4},
            {},
            {"offload_activations": True},
            NotImplementedError,
            "offload_activations",
        ),
    ],
)
def test_what_a_pipeline_does_not_support_is_refused(mesh, words, changes, error, message):
    cp = hcp.ContextParallel(hcp.make_mesh(**mesh), **{"comm_type": "p2p"} | words)
    with pytest.raises(error, match=message):
        Pipeline(dataclasses.replace(MODEL, **changes), cp)


def test_microbatches_that_are_not_alike_are_refused():
    cp = hcp.ContextParallel(hcp.make_mesh(pp=2, cp_outer=4), "p2p")
    pipeline = Pipeline(MODEL, cp)

    def batch(length, **changes):
        tokens = np.zeros((1, length), np.int32)
        names = ("tokens", "targets", "positions", "weights")
        return cp.shard_batch(dict.fromkeys(names, tokens) | {"mask": MODEL.mask()}) | changes

    with pytest.raises(ValueError, match="at least one microbatch"):
        pipeline.sums(None, [])
    further = Pipeline(dataclasses.replace(MODEL, mtp_depths=2), cp)
    with pytest.raises(ValueError, match=r"mtp_weights \[B, T, 2\]; microbatch 0 does not"):
        further.sums(None, [batch(8)])
    with pytest.raises(ValueError, match="microbatch 1 has other arrays"):
        pipeline.sums(None, [batch(8), batch(16)])
    with pytest.raises(ValueError, match="microbatch 0 is not placed"):
        pipeline.sums(None, [batch(8, mask=MODEL.mask())])
