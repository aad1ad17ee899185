"""What stands beside the fields of a config: every one has a kind, every number its bounds."""

import dataclasses
import re
import typing

import pytest

from hcp_jax.base import settings
from hcp_jax.models.layers.rope import RopeScaling
from hcp_jax.train import config as configuration
from hcp_jax.train.config import TrainConfig

NONSENSE = [float("nan"), float("inf"), float("-inf"), -1, 1e38]

FULL = dataclasses.replace(
    TrainConfig(),
    model=dataclasses.replace(TrainConfig().model, rope_scaling=RopeScaling("linear", 2.0)),
    parallel=dataclasses.replace(
        TrainConfig().parallel,
        dynamic=dataclasses.replace(
            TrainConfig().parallel.dynamic, enabled=True, max_tokens_per_device=512
        ),
    ),
)
"""Every part that may be left out is there."""


def parts(config, prefix=""):
    """Each dataclass of a config, and what its keys begin with."""
    yield prefix, config
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from parts(value, f"{prefix}{field.name}.")


def takes_a_number(kind):
    options = typing.get_args(kind) or (kind,)
    return any(
        option in (int, float) or takes_a_number(option) for option in options if option is not kind
    ) or kind in (int, float)


FIELDS = [
    pytest.param(part, field, id=f"{prefix}{field.name}")
    for prefix, part in parts(FULL)
    for field in dataclasses.fields(part)
    if not dataclasses.is_dataclass(getattr(part, field.name)) or field.metadata
]
NUMBERS = [
    pytest.param(*one.values, id=one.id)
    for one in FIELDS
    if takes_a_number(typing.get_type_hints(type(one.values[0]))[one.values[1].name])
]


def test_the_walk_finds_the_fields():
    assert len(FIELDS) > 70
    assert len(NUMBERS) > 45


@pytest.mark.parametrize(("part", "field"), FIELDS)
def test_every_field_says_whether_a_run_may_change_it(part, field):
    """A new field needs `metadata=free(...)`, `numbers(...)` or `fixed(...)`: see hcp_jax/base/settings.py."""
    assert field.metadata["setting"].kind in typing.get_args(settings.Kind)


@pytest.mark.parametrize(("part", "field"), NUMBERS)
def test_no_number_may_be_not_finite_negative_or_absurd(part, field):
    bounds = field.metadata["setting"].bounds
    assert bounds.most is not None
    assert (bounds.least is None) != (bounds.above is None)
    for value in NONSENSE:
        with pytest.raises(
            ValueError, match=rf"{field.name} must (be|not be) .*{re.escape(repr(value))}"
        ):
            dataclasses.replace(part, **{field.name: value})


FLOATS = [
    one.id
    for one in NUMBERS
    if float
    in (k := typing.get_type_hints(type(one.values[0]))[one.values[1].name], *typing.get_args(k))
]


@pytest.mark.parametrize("key", FLOATS)
def test_the_command_line_cannot_bring_such_numbers_in(key, tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("model: {rope_scaling: {kind: linear, factor: 2}}")
    with pytest.raises(ValueError, match=f"{key.rsplit('.', 1)[-1]} must be at most"):
        configuration.load(file, [(key, "1e38")])


@pytest.mark.parametrize("text", ["nan", ".nan", "inf", "-1"])
def test_nor_can_it_bring_in_what_is_no_number(text):
    with pytest.raises(ValueError, match="learning_rate must be"):
        configuration.load(None, [("optimizer.learning_rate", text)])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("optimizer: {learning_rate: .nan}", "learning_rate must be a finite number, got nan"),
        ("optimizer: {weight_decay: -.inf}", "weight_decay must be a finite number, got -inf"),
        ("optimizer: {clip_norm: 1e38}", r"clip_norm must be at most 1e\+18, got 1e\+38"),
        ("model: {rope_scaling: {kind: linear, factor: .nan}}", "factor must be a finite number"),
        ("steps: 1000000000000", "steps must be at most 2,147,483,647, got 1000000000000"),
        ("parallel: {dynamic: {menu: [1, -1]}}", "menu must be at least 1, got -1"),
    ],
)
def test_nor_can_a_file(text, says, tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=says):
        configuration.load(file)


def test_changes_are_told_by_key_with_their_kind():
    before = dataclasses.asdict(FULL)
    assert settings.changes(before, FULL) == []
    now = dataclasses.replace(
        FULL,
        steps=7,
        seed=3,
        model=dataclasses.replace(FULL.model, rope_scaling=RopeScaling("linear", 4.0)),
    )
    found = {
        change.key: (change.kind, change.before, change.now)
        for change in settings.changes(before, now)
    }
    assert found == {
        "steps": ("free", 200, 7),
        "seed": ("fixed", 0, 3),
        "model.rope_scaling.factor": ("numbers", 2.0, 4.0),
    }
    before["model"]["rope_scaling"] = None
    [change] = settings.changes(before, FULL)
    assert (change.key, change.kind) == ("model.rope_scaling", "numbers")


def test_a_key_that_was_not_there_had_its_default():
    before = dataclasses.asdict(FULL)
    del before["optimizer"]["schedule"], before["optimizer"]["max_skipped"]
    assert settings.changes(before, FULL) == []
