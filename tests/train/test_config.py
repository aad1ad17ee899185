"""Configs: a wrong key or value is told in one line that helps; a round trip changes nothing."""

import argparse
import dataclasses
import pathlib

import pytest

from hcp_jax.models.layers.rope import RopeScaling
from hcp_jax.train import config
from hcp_jax.train.config import TrainConfig

CONFIGS = sorted((pathlib.Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.fixture
def load(tmp_path):
    def load(text, *overrides):
        path = tmp_path / "x.yaml"
        path.write_text(text)
        return config.load(path, overrides)

    return load


def test_an_empty_file_gives_the_defaults(load):
    assert load("") == dataclasses.replace(TrainConfig(), name="x")
    assert config.load() == TrainConfig()


def test_values_of_the_file_replace_defaults_one_by_one(load):
    got = load("steps: 3\nmodel: {num_layers: 2}\noptimizer: {learning_rate: 3e-4}")
    assert (got.steps, got.model.num_layers, got.optimizer.learning_rate) == (3, 2, 3e-4)
    assert got.model.hidden_size == config.SMALL_MODEL.hidden_size


def test_the_command_line_wins_over_the_file(load):
    got = load(
        "steps: 3\nparallel: {comm_type: a2a, cp_inner: 4}",
        ("parallel.comm_type", "[p2p, a2a, p2p, a2a]"),
        ("parallel.fsdp", "true"),
        ("data.path", "7"),
        ("data.tokenizer", "[a] {b}: c"),
    )
    assert got.parallel.comm_type == ["p2p", "a2a", "p2p", "a2a"]
    assert (got.steps, got.parallel.cp_inner, got.parallel.fsdp) == (3, 4, True)
    assert (got.data.path, got.data.tokenizer) == ("7", "[a] {b}: c")


def test_an_optional_part_can_be_given_overridden_and_taken_away(load):
    text = "model: {rope_scaling: {kind: linear, factor: 2}}"
    assert load(text).model.rope_scaling == RopeScaling("linear", 2.0)
    got = load(text, ("model.rope_scaling.factor", "4"))
    assert got.model.rope_scaling == RopeScaling("linear", 4.0)
    assert load(text, ("model.rope_scaling", "null")).model.rope_scaling is None


def test_a_written_config_reads_back_equal(load):
    got = load(
        "parallel: {comm_type: [p2p, a2a, p2p, a2a], cp_outer: 2, cp_inner: 2}\n"
        "model: {rope_scaling: {kind: llama3, factor: 8, original_max_position_embeddings: 64}}\n"
        "data: {path: '12'}"
    )
    assert load(config.dump(got)) == got


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {num_layer: 2}", r"no key 'model\.num_layer'; did you mean 'model\.num_layers'"),
        ("modle: {num_layers: 2}", r"no key 'modle'; did you mean 'model'"),
        ("comm_type: p2p", r"no key 'comm_type'; did you mean 'parallel\.comm_type'"),
        ("parallel: {comm_typ: p2p}", r"did you mean 'parallel\.comm_type'"),
        (
            "model: {rope_scaling: {kind: yarn, facor: 2}}",
            r"no key 'model\.rope_scaling\.facor'; did you mean 'model\.rope_scaling\.factor'",
        ),
        ("model: {num_layers: two}", r"model\.num_layers must be int, got 'two'"),
        ("steps: 1000.5", r"steps must be int, got 1000\.5"),
        ("steps: true", "steps must be int, got True"),
        ("steps:", "steps must be int, got null"),
        ("parallel: {fsdp: 3}", r"parallel\.fsdp must be true or false, got 3"),
        ("parallel: {comm_type: 3}", r"parallel\.comm_type must be str or a list of str.*got 3"),
        ("model: 3", "model must hold keys and values, got 3"),
        (
            "model: {remat: ful}",
            r"model\.remat must be one of auto, none, .*'ful'; did you mean 'full'",
        ),
        ("model: {rope_scaling: {kind: yan, factor: 2}}", r"rope_scaling\.kind .*mean 'yarn'"),
        ("model: {rope_scaling: {kind: yarn}}", r"model\.rope_scaling needs factor, too"),
        ("a: [", "is not YAML"),
        ("- 3", "must hold keys and values, got list"),
    ],
)
def test_a_wrong_key_or_value_is_one_line_that_names_file_and_key(load, text, message):
    with pytest.raises(ValueError, match=rf"x\.yaml.*{message}") as error:
        load(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch_size: 3\nparallel: {dp: 2}", r"batch_size=3 must be a multiple of .*1 \* 2"),
        ("batch_size: 4\naccumulation: 3", r"batch_size=4 must be a multiple of .*3 \* 1"),
        ("steps: 0", "steps must be at least 1"),
        ("name: a/b", "name must be the name of a folder"),
        ("model: {num_heads: 3}", "num_heads=3 must be a multiple"),
        ("model: {rope_scaling: {kind: yarn, factor: 4}}", "^rope_scaling.kind='yarn' needs ori"),
        (
            "accumulation: 2\nparallel: {dynamic: {enabled: true, max_tokens_per_device: 8}}",
            "accumulation=2 does not go with parallel.dynamic",
        ),
        (
            "parallel: {dynamic: {enabled: true, max_tokens_per_device: 8}, layout: contiguous}",
            "layout='contiguous' does not go with parallel.dynamic",
        ),
        (
            "parallel: {cp_outer: 4, dynamic: {enabled: true, max_tokens_per_device: 8, menu: [8]}}",
            "dynamic.menu has the width 8; programs may have 1, 2, 4 devices",
        ),
        (
            "parallel: {context_parallel_size: 8, hierarchical_context_parallel_sizes: [2, 2]}",
            "multiply to 4, but context_parallel_size is 8",
        ),
    ],
)
def test_values_that_do_not_fit_each_other_are_refused(load, text, message):
    with pytest.raises(ValueError, match=message):
        load(text)


def test_a_wrong_override_names_the_command_line(load):
    with pytest.raises(ValueError, match="the command line: steps must be int, got 'many'"):
        load("", ("steps", "many"))
    with pytest.raises(ValueError, match=r"--step: there is no such key; did you mean 'steps'"):
        load("", ("step", "3"))


def test_every_key_is_an_option_with_its_meaning():
    parser = argparse.ArgumentParser()
    config.add_arguments(parser)
    told = {a.option_strings[0]: a.help for a in parser._actions if a.dest == "overrides"}
    assert told["--parallel.cp_inner"].startswith("A, ")
    assert "--model.rope_scaling.factor" in told
    assert [option for option, text in told.items() if not text] == []
    args = parser.parse_args(["--steps", "5", "some.yaml", "--parallel.comm_type", "p2p"])
    assert args.config == pathlib.Path("some.yaml")
    assert args.overrides == [("steps", "5"), ("parallel.comm_type", "p2p")]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_of_the_project_loads_and_says_how_it_is_run(path):
    assert config.load(path).name == path.stem
    head = path.read_text().split("\n\n")[0]
    assert f"hcp train configs/{path.name}" in head
    assert all(line.startswith("#") for line in head.splitlines())


def test_an_including_file_replaces_included_values_key_by_key(tmp_path, load):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "base.yaml").write_text(
        "include: sizes.yaml\nname: base\nsteps: 5\noptimizer: {learning_rate: 1e-4, eps: 1e-6}"
    )
    (tmp_path / "shared" / "sizes.yaml").write_text("steps: 4\nmodel: {num_layers: 2}\nseed: 9")
    (tmp_path / "mesh.yml").write_text("parallel: {cp_outer: 2, comm_type: [p2p, p2p]}\nseed: 8")
    got = load(
        "include: [shared/base.yaml, mesh.yml]\nparallel: {comm_type: [a2a, a2a]}\n"
        "optimizer: {eps: 1e-5}",
        ("seed", "7"),
    )
    assert (got.name, got.steps, got.seed, got.model.num_layers) == ("base", 5, 7, 2)
    assert (got.parallel.cp_outer, got.parallel.comm_type) == (2, ["a2a", "a2a"])
    assert (got.optimizer.learning_rate, got.optimizer.eps) == (1e-4, 1e-5)
    assert "include" not in config.dump(got)
    assert load("include: quickstart").model == config.load("quickstart").model
    assert load("include: quickstart").name == "x"


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("include: x.yaml", ValueError, r"leads back to itself: \S*x.yaml -> \S*x.yaml"),
        ("include: y.yaml", ValueError, r"x.yaml -> \S*y.yaml -> \S*x.yaml"),
        ("include: gone.yaml", FileNotFoundError, r"x.yaml: include: there is no file \S*gone"),
        ("include: wrong.yaml", ValueError, r"wrong.yaml: there is no key 'step'; did you mean"),
        ("include: /etc/hostname", ValueError, "neither a file ending in .yaml nor a config"),
        ("include: {a: b}", ValueError, "include must be the name of a YAML file"),
        ("include: [a.yaml, 3]", ValueError, "or a list of them, got 3"),
        ("model: {include: a.yaml}", ValueError, "no key 'model.include'"),
        ("include: [twice.yaml, twice.yaml]", ValueError, "made of more than 32 files"),
    ],
)
def test_includes_that_do_not_fit_are_refused(tmp_path, load, text, error, message):
    (tmp_path / "y.yaml").write_text("include: x.yaml")
    (tmp_path / "wrong.yaml").write_text("step: 3")
    (tmp_path / "twice.yaml").write_text("include: [many.yaml, many.yaml]")
    (tmp_path / "many.yaml").write_text(f"include: [{'seed.yaml, ' * 20}]")
    (tmp_path / "seed.yaml").write_text("seed: 1")
    with pytest.raises(error, match=message):
        load(text)
