"""Checkpoints: every bit comes back, onto any mesh; those of another model are told."""

import contextlib
import errno
import gc
import json
import os
import shutil
import subprocess
import threading
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hcp_jax.train.checkpoint import checksums
from hcp_jax.train.checkpoint.manager import CheckpointConfig, Checkpoints

# A read or a write that fails half-way leaves Orbax's other ones behind, to be told of as they end.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

MODEL = {"num_layers": 2, "rope": {"factors": (1, 2)}, "window": None}


@pytest.fixture(autouse=True)
def _litter_is_collected_here():
    """A save that fails leaves Orbax's coroutines behind: no later test is to stumble on them."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()


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
    checkpoints = Checkpoints(tmp_path, MODEL, CheckpointConfig(keep=2))
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


def files_of(folder, step, part):
    found = [p for p in (folder / "checkpoints" / str(step) / part).rglob("*") if p.is_file()]
    assert found
    return found


def cut_off(folder, step):
    for path in files_of(folder, step, "state"):
        if path.parent.name == "d":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_bits(folder, step):
    for path in files_of(folder, step, "state"):
        if path.parent.name == "d":
            content = bytearray(path.read_bytes())
            for i in range(0, len(content), 97):
                content[i] ^= 0x10
            path.write_bytes(content)


def forget(folder, step):
    for path in files_of(folder, step, "about"):
        path.unlink()


def other_numbers(folder, step):
    """A whole checkpoint, but of other bits than were said when it was saved."""
    [about] = (folder / "checkpoints" / str(step) / "about").glob("metadata")
    said = json.loads(about.read_text())
    said["arrays"]["params.half"][2] ^= 1
    about.write_text(json.dumps(said))


@pytest.mark.parametrize("damage", [cut_off, flip_bits, forget, other_numbers])
def test_a_damaged_checkpoint_is_told_and_put_aside_and_the_one_before_is_used(
    tmp_path, sharding, damage, caplog
):
    states = {step: make_state(sharding, seed=step) for step in (3, 6, 9)}
    checkpoints = Checkpoints(tmp_path, MODEL, CheckpointConfig(keep=3))
    for step, state in states.items():
        checkpoints.save(step, state, {"next": step})
    checkpoints.close()
    for step in (9, 6):
        damage(tmp_path, step)
    checkpoints = Checkpoints(tmp_path, MODEL, CheckpointConfig(keep=3))
    restored = checkpoints.restore(states[3])
    assert_equal_bits(restored.state, states[3])
    assert restored.data == {"next": 3}
    for step in (9, 6):
        assert f"the checkpoint of step {step} in" in caplog.text
    assert {p.name for p in (tmp_path / "checkpoints-damaged").iterdir()} == {"6", "9"}
    # The steps are made again, and saved again.
    checkpoints.save(6, states[6], {"next": 6})
    checkpoints.close()
    assert_equal_bits(Checkpoints(tmp_path, MODEL).restore(states[3]).state, states[6])


def test_if_none_is_whole_each_is_named_and_nothing_is_moved(tmp_path, sharding):
    state = make_state(sharding)
    save(tmp_path, state, step=3)
    save(tmp_path, state, step=6)
    for step in (3, 6):
        cut_off(tmp_path, step)
    with pytest.raises(ValueError, match=r"none of the checkpoints .* can be read \(steps 6, 3;"):
        Checkpoints(tmp_path, MODEL).restore(state)
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"3", "6"}


def test_what_was_left_half_written_is_no_checkpoint_and_is_removed(tmp_path, sharding):
    state = make_state(sharding)
    save(tmp_path, state)
    whole = tmp_path / "checkpoints" / "3"
    shutil.copytree(whole, whole.with_name("6.orbax-checkpoint-tmp-1"))
    checkpoints = Checkpoints(tmp_path, MODEL)
    assert checkpoints.latest() == 3
    assert [p.name for p in whole.parent.iterdir()] == ["3"]


def test_those_of_every_so_many_steps_are_kept_for_good(tmp_path, sharding):
    checkpoints = Checkpoints(tmp_path, MODEL, CheckpointConfig(keep=1, keep_every=4))
    for step in range(1, 7):
        checkpoints.save(step, make_state(sharding), {})
    checkpoints.close()
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"4", "6"}


def test_a_checkpoint_knows_the_run_it_is_of(tmp_path, sharding):
    checkpoints = Checkpoints(tmp_path, MODEL, run={"seed": 3, "name": "one"})
    checkpoints.save(3, make_state(sharding), {})
    checkpoints.close()
    about = json.loads((tmp_path / "checkpoints" / "3" / "about" / "metadata").read_text())
    assert about["config"] == {"seed": 3, "name": "one"}


@pytest.fixture
def held_sums(monkeypatch):
    """Checksums that are not known before `held_sums.set()`."""
    known, start = threading.Event(), checksums.start

    def held_start(state):
        sums = start(state)

        def wait():
            assert known.wait(60), "the checksums were waited for"
            return sums()

        return wait

    monkeypatch.setattr(checksums, "start", held_start)
    return known


def test_a_save_waits_for_no_checksum_but_the_checkpoint_has_no_name_before_they_are_known(
    tmp_path, sharding, held_sums
):
    state, like = make_state(sharding), make_state(sharding, seed=1)
    before = jax.device_get(state)
    checkpoints = Checkpoints(tmp_path, MODEL)
    checkpoints.save(3, state, {"next": 5})
    # The next step takes the memory of the state.
    jax.jit(lambda state: jax.tree.map(jnp.zeros_like, state), donate_argnums=0)(state)
    [unfinished] = (tmp_path / "checkpoints").iterdir()
    assert "tmp" in unfinished.name
    assert not (unfinished / "about" / "metadata").exists()
    held_sums.set()
    checkpoints.close()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["3"]
    assert_equal_bits(jax.device_get(Checkpoints(tmp_path, MODEL).restore(like).state), before)


def test_a_checkpoint_whose_checksums_cannot_be_computed_is_an_error_and_leaves_no_file(
    tmp_path, sharding, monkeypatch
):
    checkpoints = Checkpoints(tmp_path, MODEL)

    def no_sums():
        raise RuntimeError("out of memory")

    monkeypatch.setattr(checksums, "start", lambda state: no_sums)
    checkpoints.save(3, make_state(sharding), {})
    with pytest.raises(OSError, match=r"step 3 could not be written .*out of memory"):
        checkpoints.wait()
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of two megabytes; skipped where one may not be made."""
    place = tmp_path / "disk"
    place.mkdir()
    made = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(made, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture
def full_disk(monkeypatch, tmp_path):
    """A disk that is said to be full whenever a checkpoint's arrays are written to it."""

    def no_space(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return lambda: monkeypatch.setattr(ocp.StandardCheckpointHandler, "async_save", no_space)


def fill(place):
    with (place / "filling").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def test_on_a_full_disk_training_goes_on_if_told_so_and_what_is_there_stays(
    small_disk, sharding, caplog
):
    states = {step: make_state(sharding, width=512, seed=step) for step in (3, 6, 9)}
    config = CheckpointConfig(keep=1, on_error="continue")
    checkpoints = Checkpoints(small_disk, MODEL, config)
    checkpoints.save(3, states[3], {"next": 3})
    assert checkpoints.latest() == 3
    checkpoints.wait()
    fill(small_disk)
    checkpoints.save(6, states[6], {"next": 6})
    checkpoints.wait()
    assert "step 6 could not be written" in caplog.text
    assert "No space left" in caplog.text
    assert "last whole one is of step 3" in caplog.text
    assert_equal_bits(Checkpoints(small_disk, MODEL).restore(states[6]).state, states[3])
    (small_disk / "filling").unlink()
    checkpoints.save(9, states[9], {"next": 9})
    checkpoints.close()
    assert_equal_bits(Checkpoints(small_disk, MODEL).restore(states[3]).state, states[9])
    assert [p.name for p in (small_disk / "checkpoints").iterdir()] == ["9"]


def test_on_a_full_disk_training_stops_unless_told_otherwise(tmp_path, full_disk, sharding):
    checkpoints = Checkpoints(tmp_path, MODEL)
    checkpoints.save(3, make_state(sharding), {})
    checkpoints.wait()
    full_disk()
    with pytest.raises(OSError, match=r"step 6 could not be written .*last whole one is of step 3"):
        checkpoints.save(6, make_state(sharding), {})
    assert checkpoints.latest() == 3


@pytest.mark.parametrize("wrong", [{"every": 0}, {"keep": 0}, {"keep_every": 0}, {"on_error": "x"}])
def test_nonsense_is_refused(wrong):
    with pytest.raises(ValueError, match=rf"checkpoint\.{next(iter(wrong))} must be"):
        CheckpointConfig(**wrong)
