"""Models of recurrent layers and attention: the same training on one device and on many."""

import dataclasses

import jax
import numpy as np
import pytest

import hcp_jax as hcp
from hcp_jax.cost.shape import ModelShape
from hcp_jax.models.config import ModelConfig
from hcp_jax.models.hf.config_json import raw_config
from hcp_jax.models.recurrent_specs import GatedDeltaConfig, KDAConfig, Mamba2Config
from hcp_jax.models.transformer import abstract_model
from hcp_jax.train.optimizer import make_optimizer
from hcp_jax.train.sections import OptimizerConfig
from hcp_jax.train.step import init_state, make_train_step

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
}
MIXERS = {
    "mamba2": Mamba2Config(num_heads=4, head_size=8, state_size=8, num_groups=2, chunk=8),
    "gated_delta": GatedDeltaConfig(
        num_key_heads=2, num_value_heads=4, key_size=8, value_size=8, chunk=8
    ),
    "kda": KDAConfig(num_heads=4, head_size=8, chunk=8),
}
MODEL = ModelConfig(**SIZES, **MIXERS, num_layers=4, layers="MGKA", compute_dtype="float32")


def batches(steps, rows, length):
    """Packed streams of random documents, the same in every run."""
    rng = np.random.default_rng(0)
    for _ in range(steps):
        tokens = rng.integers(0, 64, (rows, length), dtype=np.int32)
        cuts = np.sort(rng.integers(1, length, (rows, 3)), axis=1)
        segments = np.stack([np.searchsorted(c, np.arange(length), side="right") for c in cuts])
        starts = np.stack([np.r_[0, c][s] for c, s in zip(cuts, segments, strict=True)])
        yield {
            "tokens": tokens,
            # Learnable: the next token follows from this one.
            "targets": (5 * tokens + 3) % 64,
            "weights": np.ones((rows, length), np.float32),
            "positions": (np.arange(length) - starts).astype(np.int32),
            "segments": segments.astype(np.int32),
        }


def curve(model, cp, steps, *, fsdp=False, rows=2, length=45):
    """The loss of each step.

    The steps are small: larger ones make models of this size chaotic, so that on one device a
    change of the parameters by 1e-7 changes the loss by 1e-4 within 20 steps.
    """
    settings = OptimizerConfig(learning_rate=1e-3, warmup_steps=5)
    optimizer = make_optimizer(settings, steps)
    state = init_state(model, optimizer, 0, cp, fsdp=fsdp)
    step = make_train_step(model, settings, steps, cp, fsdp=fsdp)
    losses = []
    for batch in batches(steps, rows, length):
        batch["mask"] = model.mask(batch.pop("segments"))
        state, metrics = step(state, batch if cp is None else cp.shard_batch(batch))
        losses.append(float(metrics["loss"]))
    return losses


@pytest.mark.slow
def test_a_hybrid_trains_alike_on_one_device_and_on_eight():
    steps = 20
    alone = curve(MODEL, None, steps)
    mesh = hcp.make_mesh(cp_outer=4, cp_inner=2)
    many = curve(MODEL, hcp.ContextParallel(mesh, "a2a+p2p"), steps)
    np.testing.assert_allclose(many, alone, rtol=0, atol=2e-4)
    assert alone[-1] < alone[0] - 0.02  # it learns


@pytest.mark.slow
def test_a_hybrid_is_the_same_under_tp_fsdp_remat_and_a_scan_over_layers():
    model = dataclasses.replace(MODEL, num_layers=4, layers="MG", kda=None, remat="full")
    mesh = hcp.make_mesh(tp=2, cp_outer=2, devices=jax.devices()[:4])
    many = curve(model, hcp.ContextParallel(mesh, "p2p"), 2, fsdp=True)
    np.testing.assert_allclose(many, curve(model, None, 2), rtol=1e-5)


def test_the_planner_counts_the_parameters_of_the_model():
    shape = ModelShape.from_config(MODEL)
    _, params = abstract_model(MODEL)
    matrices = [
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(params["layers"])
        if path[-1].key == "kernel"
    ]
    assert shape.layers_params == sum(matrices)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": "MA"}, r"mixer='mamba2', but model.mamba2 is null; give its sizes"),
        ({"kda": MIXERS["kda"]}, "model.kda is given, but no layer has mixer='kda'"),
        (
            {"mixer": "kda", "kda": MIXERS["kda"], "sliding_window": 8},
            "model.sliding_window=8 is given, but no layer attends",
        ),
        (
            {
                "kda": MIXERS["kda"],
                "layers": ({"mixer": "kda", "sliding_window": 8},),
            },
            "a layer with mixer='kda' has no sliding_window",
        ),
        ({"mixer": "mamba"}, "mixer must be one of attention, mamba2, gated_delta, kda"),
    ],
)
def test_patterns_that_mean_nothing_are_refused(settings, message):
    from hcp_jax.models.pattern import LayerConfig

    if isinstance(settings.get("layers"), tuple):
        settings = settings | {"layers": tuple(LayerConfig(**x) for x in settings["layers"])}
    with pytest.raises(ValueError, match=message):
        ModelConfig(**SIZES, num_layers=2, **settings)


def test_a_hybrid_is_not_written_as_a_model_of_another_kind():
    with pytest.raises(
        NotImplementedError,
        match="layer 1 is gated_delta, which is recurrent, and no supported family",
    ):
        raw_config(MODEL, 128, "float32")
