"""Steps of models with experts: one device and meshes make the same step, losses included."""

import functools

import jax
import numpy as np
import pytest

import hcp_jax as hcp
from hcp_jax import dynamic
from hcp_jax.models.config import ModelConfig
from hcp_jax.models.moe_config import MoEConfig
from hcp_jax.models.stacks import real_tokens
from hcp_jax.parallel import spmd
from hcp_jax.train import data
from hcp_jax.train.losses import summed_losses, values
from hcp_jax.train.portions import batch_specs
from hcp_jax.train.sections import OptimizerConfig
from hcp_jax.train.step import init_state, make_optimizer, make_train_step

MODEL = ModelConfig(
    vocab_size=32,
    num_layers=2,
    hidden_size=16,
    intermediate_size=16,
    num_heads=4,
    num_kv_heads=2,
    compute_dtype="float32",
    moe=MoEConfig(
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        router="sigmoid",
        score_correction=True,
        first_k_dense_replace=1,
        router_aux_loss_coef=0.5,
        router_z_loss_coef=0.1,
        sequence_aux_loss_coef=0.2,
    ),
)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=0)
ROWS, T = 4, 32


@functools.cache
def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 32, (ROWS, T + 1)).astype(np.int32)
    segments = np.sort(rng.integers(1, 4, (ROWS, T)), axis=1).astype(np.int32)
    segments[2, 20:] = 0  # padding
    starts = np.where(np.diff(segments, axis=1, prepend=-1) != 0, np.arange(T), 0)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": (np.arange(T) - np.maximum.accumulate(starts, axis=1)).astype(np.int32),
        "weights": ((segments > 0) & (rng.random((ROWS, T)) < 0.8)).astype(np.float32),
        "mask": hcp.causal() & hcp.documents(segments, padding_id=0),
    }


@functools.cache
def step(accumulation, sizes=None):
    """Return the state after one step, and its metrics."""
    cp = None if sizes is None else hcp.ContextParallel(hcp.make_mesh(**dict(sizes)))
    state = init_state(MODEL, make_optimizer(OPTIMIZER, 10), 0, cp)
    make = make_train_step(MODEL, OPTIMIZER, 10, cp, accumulation=accumulation)
    return jax.device_get(make(state, batch() if cp is None else cp.shard_batch(batch())))


@pytest.mark.slow
def test_a_mesh_makes_the_step_of_one_device_in_portions():
    one, alone = step(accumulation=2)
    many, meshed = step(2, (("dp", 2), ("cp_outer", 2), ("cp_inner", 2)))
    assert {"load_balance", "sequence_balance", "router_z", "max_load"} <= set(meshed)
    for name in alone:
        assert meshed[name] == pytest.approx(alone[name], rel=2e-6), name
    moved = [state.params["layers"]["1"]["mlp"]["gate"]["correction"] for state in (one, many)]
    assert np.array_equal(*moved)
    assert set(np.abs(np.unique(moved[0]))) <= {np.float32(0), np.float32(1e-3)}
    assert np.any(moved[0] > 0)


def test_the_losses_of_the_router_are_means_over_tokens_times_the_weight():
    params = init_state(MODEL, make_optimizer(OPTIMIZER, 10), 0).params
    total, main, means = jax.jit(summed_losses(MODEL))(params, batch())
    real = batch()["mask"].intervals(T)
    real = np.asarray(real[1] > real[0])
    assert means["load_balance"].tokens == real.sum() == ROWS * T - 12
    found = values(means)
    added = 0.5 * found["load_balance"] + 0.1 * found["router_z"]
    added = (added + 0.2 * found["sequence_balance"]) * batch()["weights"].sum()
    assert total - main == pytest.approx(float(added), rel=1e-5)


def test_the_padding_of_packed_streams_is_not_routed():
    segments = np.array([[1, 1, 2, 0], [3, 0, 0, 0]], np.int32)
    real = real_tokens(MODEL.packed_mask(segments), (2, 4), None)
    assert real.tolist() == (segments > 0).tolist()
    corpus = data.Corpus([b"a" * 40, b"b" * 23], "two documents")
    batch = next(
        data.make_batches(corpus, batch_size=2, seq_len=64, seed=0, mask=MODEL.packed_mask)
    )
    routed = np.asarray(real_tokens(batch["mask"], (2, 64), None))
    assert np.array_equal(routed, batch["weights"] > 0)
    assert not np.all(routed)


def test_the_padding_of_groups_is_not_routed_on_any_device():
    cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=4, cp_inner=2), "a2a+p2p", widest_group=8)
    packed = dynamic.pack(dynamic.Microbatch((4, 2, 2), ((0,), (1,), (2,))), [17, 3, 7], 6)
    batch = hcp.place_microbatch(cp, packed, {"tokens": np.zeros_like(packed.document)})
    # Devices that exchange heads have each other's intervals too.
    specs = batch_specs(batch, cp)["mask"]
    on_device = spmd.shard_map(
        cp.mesh, cp.axes, lambda mask: real_tokens(mask, (1, 6), cp), (specs,), cp.spec(2)
    )
    found = np.asarray(jax.jit(on_device)(batch["mask"]))
    assert np.array_equal(found.reshape(8, 6), packed.document >= 0)
