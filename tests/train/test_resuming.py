"""What a run that goes on may change: told, asked for, or refused; nothing is trained here."""

import argparse
import dataclasses

import optax
import pytest

from hcp_jax.commands import train
from hcp_jax.models.layers.rope import RopeScaling
from hcp_jax.train.checkpoint.manager import Restored
from hcp_jax.train.config import TrainConfig
from hcp_jax.train.data.fingerprint import Entry
from hcp_jax.train.resuming import GoingOn
from hcp_jax.train.step import TrainState

CONFIG = TrainConfig(steps=200, parallel=dataclasses.replace(TrainConfig().parallel, cp_inner=8))
FILES = {"data.path": [Entry("a.txt", 3, "x"), Entry("b.txt", 3, "y")]}


def changed(**changes):
    """`CONFIG` with `model__remat="full"` and such."""
    config = CONFIG
    for name, value in changes.items():
        part, _, field = name.rpartition("__")
        if part:
            value = dataclasses.replace(getattr(config, part), **{field: value})
        config = dataclasses.replace(config, **{part or name: value})
    return config


def about(config=CONFIG, files=FILES):
    return {
        "step": 150,
        "config": dataclasses.asdict(config),
        "files": {key: list(map(list, entries)) for key, entries in files.items()},
    }


def describe(config, files=FILES, accept=(), updates=150):
    going_on = GoingOn(config, files, frozenset(accept))
    going_on.require(about())
    state = TrainState(150, {}, optax.ScaleByScheduleState(updates))
    return going_on.describe(Restored(state, {}, about()))


def test_the_same_run_goes_on_without_a_word():
    assert describe(CONFIG) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model__remat": "full"}, "model.remat was 'none' and is 'full'"),
        ({"model__loss_chunk": 64}, "model.loss_chunk was 1024 and is 64"),
        ({"model__mlp_chunk": 64}, "model.mlp_chunk was None and is 64"),
        (
            {"model__implementation": "reference"},
            "model.implementation was None and is 'reference'",
        ),
        (
            {"model__remat": "full", "model__offload_activations": True},
            "model.offload_activations was False and is True",
        ),
        ({"optimizer__offload": True}, "optimizer.offload was False and is True"),
        ({"parallel__comm_type": "p2p"}, "parallel.comm_type was 'a2a+p2p' and is 'p2p'"),
        ({"checkpoint__every": 9}, "checkpoint.every was None and is 9"),
        ({"accumulation": 2}, "accumulation was 1 and is 2"),
    ],
)
def test_what_changes_memory_or_speed_alone_is_told(change, told):
    [line] = describe(changed(**change))
    assert "change memory, speed" in line
    assert told in line


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"model__compute_dtype": "bfloat16"},
            "model.compute_dtype was 'float32' and is 'bfloat16'",
        ),
        ({"model__rope_theta": 5e5}, r"model.rope_theta was 10000\.0 and is 500000\.0"),
        (
            {"model__rope_scaling": RopeScaling("linear", 2.0)},
            "model.rope_scaling was None and is {",
        ),
        ({"model__sliding_window": 64}, "model.sliding_window was None and is 64"),
        ({"optimizer__weight_decay": 0.2}, "optimizer.weight_decay was 0.1 and is 0.2"),
        ({"batch_size": 4}, "batch_size was 2 and is 4"),
    ],
)
def test_what_changes_the_numbers_needs_a_word(change, told):
    with pytest.raises(ValueError, match=f"change what is computed: {told}.*--accept numbers"):
        describe(changed(**change))
    [line] = describe(changed(**change), accept=["numbers"])
    assert "(accepted)" in line


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model__num_layers": 2}, "model.num_layers was 4 and is 2"),
        ({"model__qk_norm": True}, "model.qk_norm was False and is True"),
        ({"model__tie_embeddings": True}, "model.tie_embeddings was False and is True"),
        ({"optimizer__moments_dtype": "bfloat16"}, "optimizer.moments_dtype was 'float32'"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"seq_len": 2048}, "seq_len was 1024 and is 2048"),
        ({"init_from": "somewhere"}, "init_from was None and is 'somewhere'"),
    ],
)
def test_what_a_run_keeps_is_refused_whatever_is_accepted(change, told):
    with pytest.raises(ValueError, match=f"a run keeps these settings: {told}"):
        describe(changed(**change), accept=["numbers", "data"])


def test_other_text_needs_a_word():
    other = {"data.path": [Entry("a.txt", 3, "x"), Entry("b.txt", 3, "z")]}
    says = "data.path: 'b.txt' has other contents of the same size"
    with pytest.raises(ValueError, match=f"{says}.*--accept data"):
        describe(CONFIG, other, accept=["numbers"])
    assert describe(CONFIG, other, accept=["data"]) == [
        f"going on with other text (accepted): {says}"
    ]


def test_a_jump_of_the_learning_rate_is_told_with_both_rates():
    [_, line] = describe(changed(steps=400))
    assert line.startswith(
        "learning rate at step 150: 0.000281 from here on, where the run had 0.000161"
    )
    # It goes by the updates made, of which skipped steps are none.
    [_, line] = describe(changed(steps=400), updates=110)
    assert "0.000299 from here on, where the run had 0.000292" in line


class Program:
    """Its data stand at a place of an order."""

    def __init__(self):
        self.place = {"next": 0}

    def data_state(self):
        return self.place

    def restore_data(self, state):
        if state.get("other"):
            raise ValueError("the data are others.")
        self.place = state


def test_data_of_another_order_begin_anew_if_that_is_accepted():
    program, other = Program(), {"next": 7, "other": True}
    with pytest.raises(ValueError, match=r"are others\. Begin them anew by --accept data"):
        GoingOn(CONFIG, FILES).restore_data(program, other)
    [told] = GoingOn(CONFIG, FILES, frozenset(["data"])).restore_data(program, other)
    assert program.place == {"next": 0}
    assert "begin anew" in told
    assert GoingOn(CONFIG, FILES).restore_data(program, {"next": 5}) == []
    assert program.place == {"next": 5}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["--resume", "runs/x", "--init_from", "folder"], "--init_from begins a new run"),
        (["x.yaml", "--accept", "data"], "--accept is for a run that goes on"),
    ],
)
def test_a_command_line_that_contradicts_itself_is_refused_at_once(line, says):
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    with pytest.raises(ValueError, match=says):
        train.num_devices(parser.parse_args(line))
