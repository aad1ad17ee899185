"""Checkpoints: every bit comes back, onto any mesh; those of another model are told."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hcp_jax.train.checkpoint import CheckpointConfig, Checkpoints

MODEL = {"num_layers": 2, "rope": {"factors": (1, 2)}, "window": None}


class State(NamedTuple):
    step: jax.Array
    params: dict
    opt_state: optax.OptState


def mesh(*sizes):
    names = ("a", "b")[: len(sizes)]
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes))


def make_state(sharding, optimizer=None, width=8, seed=0):
    rng = np.random.default_rng(seed)
    params = {
        "w": jax.device_put(rng.standard_normal((8, width), np.float32), sharding),
        "half": jax.device_put(rng.standard_normal((16,)), sharding).astype(jnp.bfloat16),
    }
    optimizer = optimizer or optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))
    return State(jnp.asarray(3, jnp.int32), params, optimizer.init(params))


@pytest.fixture
def sharding():
    return NamedSharding(mesh(8), PartitionSpec("a"))


def save(folder, state, step=3, data=None, model=MODEL):
    checkpoints = Checkpoints(folder, model)
    checkpoints.save(step, state, data or {"next": 5})
    checkpoints.close()


def assert_equal_bits(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)
    assert jax.tree.structure(a) == jax.tree.structure(b)


@pytest.mark.parametrize("kinds", [("pinned_host", "device"), ("device", "pinned_host")])
def test_what_lay_in_the_host_s_memory_comes_back_into_either(tmp_path, sharding, kinds):
    before, after = (make_state(sharding.with_memory_kind(kind)) for kind in kinds)
    save(tmp_path, before)
    restored = Checkpoints(tmp_path, MODEL).restore(after).state
    assert restored.params["w"].sharding.memory_kind == kinds[1]
    assert_equal_bits(restored, before)


def test_every_bit_comes_back_where_it_is_asked_for(tmp_path, sharding):
    state = make_state(sharding)
    save(tmp_path, state, data={"deep": {"slices": (1, 2)}})
    elsewhere = NamedSharding(mesh(2, 4), PartitionSpec("b"))
    like = make_state(elsewhere, seed=1)
    restored = Checkpoints(tmp_path, MODEL).restore(like)
    assert_equal_bits(restored.state, state)
    assert restored.state.params["w"].sharding == elsewhere
    assert restored.state.params["half"].dtype == jnp.bfloat16
    assert restored.data == {"deep": {"slices": [1, 2]}}


def test_only_the_newest_are_kept_and_the_newest_is_restored(tmp_path, sharding):
    checkpoints = Checkpoints(tmp_path, MODEL, keep=2)
    for step in range(1, 5):
        checkpoints.save(step, make_state(sharding, seed=step), {"next": step})
    checkpoints.save(4, make_state(sharding, seed=9), {"next": 9})  # that step has one
    checkpoints.close()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["3", "4"]
    restored = Checkpoints(tmp_path, MODEL).restore(make_state(sharding))
    assert restored.data == {"next": 4}
    assert_equal_bits(restored.state, make_state(sharding, seed=4))


def test_a_checkpoint_of_another_model_is_told_by_what_differs(tmp_path, sharding):
    save(tmp_path, make_state(sharding))
    other = Checkpoints(tmp_path, MODEL | {"num_layers": 4, "window": 16})
    with pytest.raises(ValueError, match=r"another model: num_layers 2 there and 4 here; window"):
        other.restore(make_state(sharding))


def test_a_checkpoint_of_another_optimizer_is_told_by_its_first_array(tmp_path, sharding):
    save(tmp_path, make_state(sharding))
    for other in (make_state(sharding, optax.sgd(0.1)), make_state(sharding, width=16)):
        with pytest.raises(ValueError, match=r"does not fit: .*params\.w is|does not fit: opt_st"):
            Checkpoints(tmp_path, MODEL).restore(other)


def test_a_run_without_a_checkpoint_cannot_go_on(tmp_path, sharding):
    with pytest.raises(ValueError, match="has no checkpoint"):
        Checkpoints(tmp_path, MODEL).restore(make_state(sharding))


@pytest.mark.parametrize("wrong", [{"every": 0}, {"keep": 0}])
def test_nonsense_is_refused(wrong):
    with pytest.raises(ValueError, match=rf"checkpoint\.{next(iter(wrong))} must be at least 1"):
        CheckpointConfig(**wrong)
