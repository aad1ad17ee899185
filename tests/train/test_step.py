import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hcp_jax as hcp
from hcp_jax.compiled import hlo
from hcp_jax.models.config import ModelConfig
from hcp_jax.train import step as train_step
from hcp_jax.train.losses import make_eval_loss
from hcp_jax.train.step import (
    OptimizerConfig,
    TrainState,
    abstract_state,
    apply_gradients,
    init_state,
    make_optimizer,
    make_schedule,
    make_train_step,
)

CONFIG = ModelConfig(
    vocab_size=32,
    num_layers=2,
    hidden_size=16,
    intermediate_size=32,
    num_heads=4,
    num_kv_heads=2,
    compute_dtype="float32",
    remat="attention",
    loss_chunk=16,
    z_loss=1e-3,
)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=2)
STEPS = 6
ROWS, T = 4, 64


@functools.cache
def batch():
    rng = np.random.default_rng(0)
    # A pattern to learn, in documents of very different lengths, with uneven weights.
    tokens = (np.cumsum(rng.integers(1, 3, (ROWS, T + 1)), axis=1) % 32).astype(np.int32)
    segments = np.sort(rng.integers(0, 4, (ROWS, T)), axis=1).astype(np.int32)
    starts = np.where(np.diff(segments, axis=1, prepend=-1) != 0, np.arange(T), 0)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": (np.arange(T) - np.maximum.accumulate(starts, axis=1)).astype(np.int32),
        "weights": np.float32([[1], [0.5], [2], [1]]) * (rng.random((ROWS, T)) < 0.7),
        "mask": CONFIG.mask(segments),
    }


@functools.cache
def program(cp=None, fsdp=False, accumulation=1):
    return make_train_step(CONFIG, OPTIMIZER, STEPS, cp, fsdp=fsdp, accumulation=accumulation)


@functools.cache
def _initial(cp, fsdp):
    return init_state(CONFIG, make_optimizer(OPTIMIZER, STEPS), 0, cp, fsdp=fsdp)


def fresh(cp=None, fsdp=False):
    return jax.tree.map(jnp.copy, _initial(cp, fsdp))


@functools.cache
def trained(cp=None, fsdp=False, accumulation=1, steps=4):
    """(state after `steps`, metrics of every step)."""
    state, placed, history = fresh(cp, fsdp), batch(), []
    if cp is not None:
        placed = cp.shard_batch(placed)
    for _ in range(steps):
        state, metrics = program(cp, fsdp, accumulation)(state, placed)
        history.append({name: float(value) for name, value in metrics.items()})
    return state, history


def gradients(state):
    """Of the first step, as AdamW's mean of gradients keeps them, up to a factor."""
    moments = [x for x in jax.tree.leaves(state.opt_state, is_leaf=_is_moments) if _is_moments(x)]
    return moments[0]


def _is_moments(x):
    return isinstance(x, dict) and "layers" in x


def assert_same_history(got, expected, tolerance=1e-5):
    for name in ("loss", "grad_norm", "learning_rate", "tokens"):
        np.testing.assert_allclose(
            [m[name] for m in got], [m[name] for m in expected], rtol=tolerance, err_msg=name
        )


def test_loss_starts_at_chance_and_falls():
    _, history = trained()
    assert history[0]["loss"] == pytest.approx(np.log(32), abs=0.1)
    assert history[-1]["loss"] < history[0]["loss"] - 0.15


def test_accumulated_gradients_are_those_of_one_large_batch():
    expected_state, expected = trained(steps=1)
    state, history = trained(accumulation=ROWS, steps=1)
    assert_same_history(history, expected)
    for got, exact in zip(
        jax.tree.leaves(gradients(state)), jax.tree.leaves(gradients(expected_state)), strict=True
    ):
        assert np.max(np.abs(got - exact)) < 1e-5 * np.max(np.abs(exact))


MESHES = [
    pytest.param({"cp_outer": 4, "cp_inner": 2}, "a2a+p2p", True, 1, id="cp8-fsdp"),
    pytest.param(
        {"dp": 2, "tp": 2, "cp_inner": 2},
        "p2p",
        True,
        2,
        id="dp2-tp2-cp2-fsdp-acc2",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        {"dp": 2, "tp": 2, "cp_inner": 2},
        "p2p",
        False,
        2,
        id="dp2-tp2-cp2-acc2",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        {"dp": 2, "cp_outer": 2, "cp_inner": 2},
        ("all_gather", "a2a"),
        False,
        1,
        id="dp2-cp4-mixed",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(("sizes", "comm_type", "fsdp", "accumulation"), MESHES)
def test_training_over_a_mesh_has_the_losses_of_one_device(sizes, comm_type, fsdp, accumulation):
    cp = hcp.ContextParallel(hcp.make_mesh(**sizes), comm_type=comm_type)
    state, history = trained(cp, fsdp, accumulation)
    assert_same_history(history, trained()[1], 2e-5)
    wanted = abstract_state(CONFIG, make_optimizer(OPTIMIZER, STEPS), cp, fsdp=fsdp)
    for x, like in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert x.sharding.is_equivalent_to(like.sharding, x.ndim)


@pytest.mark.slow
def test_gradients_of_accumulated_portions_are_reduced_over_devices_once():
    cp = hcp.ContextParallel(hcp.make_mesh(dp=2, cp_outer=2, cp_inner=2), "a2a+p2p")
    state, placed, history = fresh(cp), cp.shard_batch(batch()), []
    step = program(cp, accumulation=2).lower(state, placed).compile()
    found = [c for c in hlo.collectives(step.as_text()) if c.kind == "all-reduce"]
    between = [c for c in found if len(c.groups[0]) > 1]
    gradients = sum(x.nbytes for x in jax.tree.leaves(state.params))
    scalars = 20  # bytes, of the sums of losses, weights and visible pairs
    assert gradients <= sum(c.bytes * c.count for c in between) <= gradients + scalars
    for _ in range(4):
        state, metrics = step(state, placed)
        history.append({name: float(value) for name, value in metrics.items()})
    assert_same_history(history, trained()[1], 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [True, False])
def test_training_on_explicit_axes_has_the_losses_of_auto_ones(fsdp):
    explicit = jax.make_mesh(
        (2, 2, 2),
        ("cp_inner", "cp_outer", "dp"),
        axis_types=(jax.sharding.AxisType.Explicit,) * 3,
    )
    cp = hcp.ContextParallel(explicit, "a2a+p2p", tp=None)
    assert_same_history(trained(cp, fsdp, 2)[1], trained()[1], 2e-5)


def test_parameters_are_the_same_on_every_mesh_and_born_where_they_belong():
    cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=4, cp_inner=2))
    state = fresh(cp, fsdp=True)
    jax.tree.map(np.testing.assert_array_equal, state.params, fresh().params)
    gate = state.params["layers"]["mlp"]["gate_proj"]["kernel"]
    assert {shard.data.shape for shard in gate.addressable_shards} == {(2, 2, 32)}


def test_eval_loss_is_the_loss_before_the_step():
    result = make_eval_loss(CONFIG)(fresh().params, batch())
    _, history = trained()
    assert float(result["loss"]) == pytest.approx(history[0]["loss"], rel=1e-6)
    assert float(result["tokens"]) == np.sum(batch()["weights"])


def test_the_state_given_is_donated():
    state = fresh()
    program()(state, batch())
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params))


def test_a_batch_in_which_nothing_counts_changes_no_gradient_and_is_not_nan():
    nothing = {**batch(), "weights": np.zeros((ROWS, T), np.float32)}
    state, metrics = program()(fresh(), nothing)
    assert float(metrics["loss"]) == float(metrics["grad_norm"]) == 0
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state.params))


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_step_that_is_not_finite_leaves_parameters_and_optimizer_as_they_were(fault):
    poison = np.full((ROWS, T), 1, np.float32)
    # An infinite weight makes the loss NaN; a huge one only squares to infinity in the norm.
    poison[0, 0] = np.inf if fault == "loss" else 1e30
    poison[0, 1] = 0.0 if fault == "loss" else -1e30
    before, _ = trained(steps=2)
    before = jax.tree.map(np.asarray, before)
    state, metrics = program()(jax.tree.map(jnp.asarray, before), {**batch(), "weights": poison})
    assert int(metrics["skipped"]) == 1
    assert np.isfinite(metrics["loss"]) == (fault == "gradient")
    assert not np.isfinite(metrics["grad_norm"])
    assert int(state.step) == 3
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), before[1:])


def test_a_step_whose_new_parameters_would_not_be_finite_is_skipped():
    """Loss and gradient are finite; the weight decay overflows."""
    config = OptimizerConfig(learning_rate=1e3, weight_decay=1e3, warmup_steps=0, clip_norm=None)
    optimizer, schedule = make_optimizer(config, 10), make_schedule(config, 10)

    @jax.jit
    def step(value):
        params = {"a": {"kernel": jnp.array([1.0, value])}, "b": {"scale": jnp.ones(2)}}
        state = TrainState(jnp.int32(0), params, optimizer.init(params))
        grads = jax.tree.map(jnp.ones_like, params)
        new, metrics = apply_gradients(state, grads, value, value, optimizer, schedule, 1e3)
        return state, new, metrics["skipped"]

    state, new, skipped = step(jnp.float32(1))
    assert not skipped
    assert np.all(new.params["b"]["scale"] != state.params["b"]["scale"])
    state, new, skipped = step(jnp.float32(3e38))
    assert skipped
    assert new.step == 1
    jax.tree.map(np.testing.assert_array_equal, new[1:], state[1:])


def test_after_a_skipped_step_training_goes_on_as_if_it_had_not_been():
    state, rates = fresh(), []
    poisoned = {**batch(), "weights": np.full((ROWS, T), np.nan, np.float32)}
    for given in (batch(), poisoned, batch(), batch(), batch()):
        state, metrics = program()(state, given)
        rates.append((int(metrics["skipped"]), float(metrics["learning_rate"])))
    expected, history = trained()
    jax.tree.map(np.testing.assert_array_equal, state.params, expected.params)
    assert [rate for skipped, rate in rates if not skipped] == [m["learning_rate"] for m in history]
    assert [skipped for skipped, _ in rates] == [0, 1, 0, 0, 0]


def test_rows_that_cannot_be_portioned_are_refused():
    step = make_train_step(CONFIG, OPTIMIZER, STEPS, accumulation=3)
    with pytest.raises(ValueError, match=r"batch of 4 rows .* accumulation=3 .* multiple of 3"):
        step.lower(_initial(None, False), batch())


KEPT_SMALL = {
    "activations offloaded, MLP in chunks": ({"offload_activations": True, "mlp_chunk": 5}, {}),
    "moments offloaded": ({}, {"offload": True}),
    "all of it, and bfloat16 moments": (
        {"remat": "full", "offload_activations": True, "mlp_chunk": 5},
        {"offload": True, "moments_dtype": "bfloat16"},
    ),
}


def test_visible_pairs_are_counted_for_every_row_also_where_rows_share_a_mask():
    weights = np.full((ROWS, T), 0.5, np.float32)
    shared = {"weights": weights, "mask": hcp.causal()}
    found = train_step._tokens_and_pairs(shared, CONFIG)
    assert list(found) == [ROWS * T / 2, ROWS * T * (T + 1) / 2]
    segments = np.zeros((ROWS, T), np.int32)
    segments[0, T // 2 :] = 1  # one row has two documents
    own = {"weights": weights, "mask": hcp.causal() & hcp.documents(segments)}
    found = train_step._tokens_and_pairs(own, CONFIG)
    assert list(found) == [ROWS * T / 2, ROWS * T * (T + 1) / 2 - (T // 2) ** 2]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name.startswith("all of it") else pytest.mark.slow)
        for name in KEPT_SMALL
    ],
)
def test_what_saves_memory_does_not_change_the_losses(name):
    of_model, of_optimizer = KEPT_SMALL[name]
    model = dataclasses.replace(CONFIG, **of_model)
    optimizer = dataclasses.replace(OPTIMIZER, **of_optimizer)
    cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=4, cp_inner=2))
    state = init_state(model, make_optimizer(optimizer, STEPS), 0, cp, fsdp=True)
    step = make_train_step(model, optimizer, STEPS, cp, fsdp=True)
    places = jax.tree.map(lambda x: x.sharding, state)
    history = []
    for _ in range(4):
        state, metrics = step(state, cp.shard_batch(batch()))
        history.append({name: float(value) for name, value in metrics.items()})
    # Chunks sum in another order; a bfloat16 mean is off by up to one in 256.
    exact = optimizer.moments_dtype == "float32"
    assert_same_history(history, trained(cp, fsdp=True)[1], 1e-5 if exact else 2e-3)
    assert jax.tree.map(lambda x: x.sharding, state) == places
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(gradients(state))}
    assert kinds == {"pinned_host" if optimizer.offload else "device"}
