import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hcp_jax.train.optimizer import (
    OptimizerConfig,
    fitted_warmup,
    make_optimizer,
    make_schedule,
    stochastic_round,
)


def test_learning_rate_rises_from_the_first_step_and_ends_at_its_share():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4, final_ratio=0.1)
    schedule = make_schedule(config, 20)
    rates = [float(schedule(step)) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert np.all(np.diff(rates[3:]) < 0)
    assert rates[-1] == pytest.approx(0.1)
    assert float(make_schedule(OptimizerConfig(1.0, warmup_steps=0), 20)(0)) > 0.9


@pytest.mark.parametrize("steps", [20, 40])
def test_a_constant_rate_stays_after_the_warmup_whatever_the_steps(steps):
    schedule = make_schedule(OptimizerConfig(1.0, schedule="constant", warmup_steps=4), steps)
    rates = [float(schedule(step)) for step in range(steps)]
    assert rates == [0.25, 0.5, 0.75] + [1.0] * (steps - 3)


@pytest.mark.parametrize(
    ("share", "warmup", "end"),
    [
        (0.25, 4, [1.0, 1.0, 0.82, 0.64, 0.46, 0.28, 0.1]),
        (0.0, 4, [1.0] * 7),
        (0.1, 0, [1.0] * 5 + [0.55, 0.1]),
    ],
)
def test_warmup_stable_decay_falls_linearly_over_its_share_at_the_end(share, warmup, end):
    config = OptimizerConfig(1.0, schedule="wsd", warmup_steps=warmup, decay_share=share)
    schedule = make_schedule(config, 20)
    rates = [float(schedule(step)) for step in range(20)]
    assert rates[:warmup] == [(i + 1) / warmup for i in range(warmup)]
    assert rates[warmup : -len(end)] == [1.0] * (20 - warmup - len(end))
    np.testing.assert_allclose(rates[-len(end) :], end, rtol=1e-6)


def test_a_decay_that_is_as_long_as_the_training_begins_after_the_warmup():
    config = OptimizerConfig(1.0, schedule="wsd", warmup_steps=4, decay_share=1.0)
    rates = [float(make_schedule(config, 20)(step)) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert np.all(np.diff(rates[3:]) < 0)
    assert rates[-1] == pytest.approx(0.1)


def test_weight_decay_is_on_the_matrices_of_layers_alone():
    params = {
        "embed_tokens": {"embedding": jnp.ones(2)},
        "layers": {
            "input_layernorm": {"scale": jnp.ones(2)},
            "q_proj": {"kernel": jnp.ones(2), "bias": jnp.ones(2)},
            "sinks": jnp.ones(2),
        },
        "lm_head": {"embedding": jnp.ones(2)},
    }
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1.0, warmup_steps=0), 10)
    still = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(still, optimizer.init(params), params)
    assert np.all(updates["layers"]["q_proj"].pop("kernel") < 0)
    assert not any(np.any(x) for x in jax.tree.leaves(updates))


def test_gradients_are_clipped_to_the_norm_given():
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=0, clip_norm=0.5), 10)
    params = {"w": {"scale": jnp.ones(4)}}
    _, state = optimizer.update({"w": {"scale": jnp.full(4, 10.0)}}, optimizer.init(params), params)
    mean = next(x for x in jax.tree.leaves(state) if x.shape == (4,))
    assert np.linalg.norm(mean) == pytest.approx(0.5 * (1 - OptimizerConfig().beta1))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: OptimizerConfig(learning_rate=0.0), "learning_rate must be positive"),
        (lambda: OptimizerConfig(weight_decay=-1.0), "must not be negative"),
        (lambda: OptimizerConfig(clip_norm=0.0), "clip_norm must be positive, got 0.0 .or null"),
        (
            lambda: OptimizerConfig(moments_dtype="float16"),
            "one of float32, bfloat16, got 'float16'",
        ),
        (lambda: OptimizerConfig(max_skipped=0), "max_skipped must be at least 1"),
        (lambda: OptimizerConfig(schedule="linear"), "one of cosine, constant, wsd, got 'linear'"),
    ],
)
def test_impossible_optimizers_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize(
    ("warmup", "steps", "fitted"),
    [(10, 100, 10), (10, 11, 10), (10, 10, 1), (10, 5, 1), (100, 50, 5), (10, 1, 0), (0, 1, 0)],
)
def test_a_warmup_that_does_not_fit_shrinks_and_every_step_has_a_rate(warmup, steps, fitted):
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=warmup)
    assert fitted_warmup(config, steps) == fitted
    rates = [float(make_schedule(config, steps)(step)) for step in range(steps)]
    assert min(rates) > 0
    assert max(rates) == pytest.approx(1.0, rel=0.1) or steps == 1


def test_rounding_by_chance_is_right_on_average_and_to_one_of_the_two_nearest():
    # A quarter of the way from 1 to the next bfloat16, and back.
    x = jnp.float32([[1 + 2**-9], [-1 - 2**-9]]) * jnp.ones((2, 10_000))
    rounded = np.asarray(stochastic_round(jax.random.key(0), x), np.float32)
    assert set(np.unique(np.abs(rounded))) == {1.0, 1 + 2**-7}
    np.testing.assert_allclose(np.mean(np.abs(rounded) > 1, axis=1), 0.25, atol=0.02)


def test_rounding_by_chance_leaves_what_is_no_number_or_needs_no_rounding():
    x = jnp.float32([0.0, -0.0, 1.5, np.inf, -np.inf, np.nan])
    np.testing.assert_array_equal(stochastic_round(jax.random.key(0), x).astype(jnp.float32), x)


def test_small_changes_of_a_bfloat16_mean_are_not_lost():
    # The mean of squares goes from 1 towards 1.2, by less than half a bfloat16 step at a time.
    config = OptimizerConfig(beta2=0.99, warmup_steps=0, clip_norm=None, moments_dtype="bfloat16")
    optimizer = make_optimizer(config, 10)
    params = {"w": {"scale": jnp.ones(1000)}}
    state = optimizer.init(params)
    adam = state[0]
    assert adam.mu["w"]["scale"].dtype == adam.nu["w"]["scale"].dtype == jnp.bfloat16
    state = (adam._replace(nu=jax.tree.map(jnp.ones_like, adam.nu)), *state[1:])
    update = jax.jit(optimizer.update)
    for _ in range(50):
        grads = jax.tree.map(lambda p: jnp.full_like(p, 1.2**0.5), params)
        _, state = update(grads, state, params)
    mean = np.mean(state[0].nu["w"]["scale"].astype(np.float32))
    assert mean == pytest.approx(1.2 - 0.2 * 0.99**50, abs=0.005)


def test_offloaded_moments_are_made_in_the_host_s_memory():
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=1, offload=True), 10)
    state = jax.jit(optimizer.init)({"w": {"kernel": jnp.ones((2, 2))}})
    kinds = {x.shape: x.sharding.memory_kind for x in jax.tree.leaves(state)}
    assert kinds == {(2, 2): "pinned_host", (): "device"}
