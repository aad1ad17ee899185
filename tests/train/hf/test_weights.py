"""hcp import, training from a folder, hcp export: the weights that come in are those that go out."""

import dataclasses
import json
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import yaml

from hcp_jax import cli
from hcp_jax.models.hf import config_json, loading
from hcp_jax.parallel.config import ParallelConfig
from hcp_jax.train import config as configuration
from hcp_jax.train.checkpoint.manager import Checkpoints
from hcp_jax.train.config import TrainConfig
from hcp_jax.train.hf import weights
from hcp_jax.train.state_form import StateForm
from tests.models.folders import CONFIG, make_folder, tensors_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("hf") / "small-qwen2")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    (folder / "modeling.py").write_text("raise SystemExit")
    return folder


class Run(NamedTuple):
    """A run that has saved its first state, and then lost the folder that it began from."""

    config: TrainConfig
    path: pathlib.Path
    state: Any
    abstract: Any


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    origin = shutil.copytree(folder, root / "origin")
    config = TrainConfig(
        model=CONFIG,
        seq_len=4096,
        init_from=str(origin),
        parallel=ParallelConfig(tp=2, cp_outer=2, cp_inner=2, fsdp=True),
    )
    path = root / "run"
    path.mkdir()
    (path / "config.yaml").write_text(configuration.dump(config))
    cp = config.parallel.context_parallel(config.model.num_layers)
    form = StateForm(config, cp)
    state = weights.initial_state(config, form, path)
    checkpoints = Checkpoints(path, dataclasses.asdict(config.model))
    checkpoints.save(7, state, {})
    checkpoints.close()
    shutil.rmtree(origin)
    return Run(config, path, state, form.stored)


def test_stages_of_a_pipeline_get_the_folder_s_weights(folder, tmp_path):
    parallel = ParallelConfig(pp=2, tp=2, cp_outer=2, fsdp=True)
    config = TrainConfig(model=CONFIG, seq_len=4096, init_from=str(folder), parallel=parallel)
    form = StateForm(config, config.parallel.context_parallel())
    stored = form.give(weights.initial_state(config, form, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, stored.params, loading.load_params(CONFIG, folder))


def test_the_initial_state_has_the_folder_s_weights_where_they_belong(folder, run):
    state, abstract = run.state, run.abstract
    jax.tree.map(np.testing.assert_array_equal, state.params, loading.load_params(CONFIG, folder))
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, abstract)
    moments = jax.tree.leaves(state.opt_state)
    assert not any(np.any(np.asarray(x)) for x in moments)
    assert int(state.step) == 0


def test_the_small_files_are_kept_in_the_run_folder_and_no_code(run):
    kept = run.path / weights.KEPT
    names = {f.name for f in kept.iterdir()}
    assert names == {"config.json", "tokenizer.json", "tokenizer_config.json"}
    assert config_json.model_config(config_json.read_raw(kept)).num_layers == CONFIG.num_layers


def test_another_rope_is_told_and_another_shape_refused(folder):
    assert weights.check(CONFIG, str(folder)) == f"weights: {folder} (qwen2, bfloat16)"
    longer = dataclasses.replace(CONFIG, rope_theta=8e6)
    told = weights.check(longer, str(folder))
    assert (
        "settings changed from its config.json: rope_theta 1000000.0 there and 8000000.0 here"
        in told
    )
    other = dataclasses.replace(CONFIG, num_layers=4, qkv_bias=False)
    with pytest.raises(ValueError, match=r"another model: num_layers 3 there and 4 here; qkv_bias"):
        weights.check(other, str(folder))


def test_import_writes_a_config_that_training_begins_from(folder, tmp_path, capsys):
    assert cli.main(["import", str(folder), "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert f"weights: {folder} (qwen2, bfloat16): 0.15 M parameters, 39 tensors" in printed
    file = tmp_path / "run" / "config.yaml"
    assert f"hcp train {file}" in printed
    assert f"# hcp train {file}" in file.read_text()
    config = configuration.load(file)
    expected = config_json.model_config(config_json.read_raw(folder))
    assert (config.model, config.init_from, config.name) == (expected, str(folder), folder.name)
    assert config.data.tokenizer == str(folder / "tokenizer.json")
    assert cli.main(["import", str(folder), "--out", str(tmp_path / "run")]) == 2
    assert "config.yaml exists" in capsys.readouterr().err


def test_import_without_a_place_shows_the_config(folder, capsys):
    assert cli.main(["import", str(folder)]) == 0
    _, shown = capsys.readouterr().out.split("\n", 1)
    assert yaml.safe_load(shown)["model"]["num_layers"] == CONFIG.num_layers


def test_import_and_export_give_the_same_folder_bit_for_bit(folder, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    assert cli.main(["import", str(folder), "--out", str(run)]) == 0
    assert cli.main(["export", str(run), str(out), "--shard-gb", "0.0001"]) == 0
    assert "as qwen2, 4 files of bfloat16; config.json, tokenizer.json" in capsys.readouterr().out
    assert tensors_of(out) == tensors_of(folder)
    assert json.loads((out / "config.json").read_text()) == config_json.read_raw(folder)
    assert not (out / "modeling.py").exists()


def test_a_checkpoint_is_exported_bit_for_bit_also_without_the_folder(
    folder, run, tmp_path, capsys
):
    assert cli.main(["export", str(run.path), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "the weights of step 7 as qwen2, 1 file of bfloat16, rounded from float32" in printed
    assert tensors_of(tmp_path / "out") == tensors_of(folder)
    # Trained further than it came.
    assert config_json.read_raw(tmp_path / "out")["max_position_embeddings"] == 4096
    assert (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize("item", ["state", "about"])
def test_a_damaged_checkpoint_is_not_exported(run, tmp_path, capsys, item):
    """Another one's arrays, whole by themselves, and another one's config under a seal that fails."""
    there = tmp_path / "run"
    shutil.copytree(run.path, there)
    other = Checkpoints(tmp_path / "other", {})
    other.save(7, jax.tree.map(lambda x: x + 1, run.state), {"next": 3})
    other.close()
    shutil.rmtree(there / "checkpoints" / "7" / item)
    shutil.copytree(
        tmp_path / "other" / "checkpoints" / "7" / item, there / "checkpoints" / "7" / item
    )
    assert cli.main(["export", str(there), str(tmp_path / "out")]) == 2
    assert "checkpoints/7 is damaged" in capsys.readouterr().err


def test_a_run_that_began_at_random_is_written_as_the_family_of_its_parameters(run, tmp_path):
    random = shutil.copytree(run.path, tmp_path / "run")
    shutil.rmtree(random / weights.KEPT)
    config = dataclasses.replace(run.config, init_from=None)
    (random / "config.yaml").write_text(configuration.dump(config))
    assert cli.main(["export", str(random), str(tmp_path / "out")]) == 0
    raw = config_json.read_raw(tmp_path / "out")
    assert raw["architectures"] == ["Qwen2ForCausalLM"]
    assert raw["torch_dtype"] == "float32"
    exported = loading.load_params(CONFIG, tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, exported, run.state.params)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["import", "{}/gone"], "is not a Hugging Face folder: it has no config.json"),
        (["export", "{}", "{}/out"], "is no run folder"),
        (["export", "{}/run", "{}"], "exists and is not empty"),
        (["export", "{}/run", "{}/out"], "no checkpoint and no init_from: nothing to export"),
        (
            ["export", "{}/run", "{}/out", "--shard-gb", "0"],
            "--shard-gb: must be a finite number above 0",
        ),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, capsys, argv, says):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(configuration.dump(TrainConfig()))
    assert cli.main([arg.format(tmp_path) for arg in argv]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_training_begins_from_the_weights_and_they_come_out_again(folder, tmp_path):
    """With a learning rate of nothing; else the same command line as anybody's."""
    run = tmp_path / "run"
    assert cli.main(["import", str(folder), "--out", str(run)]) == 0
    options = {
        "data.tokenizer": "null",
        "steps": 2,
        "seq_len": 64,
        "batch_size": 8,
        "parallel.dp": 8,
        "optimizer.learning_rate": 1e-30,
        "optimizer.warmup_steps": 1,
        "run_dir": tmp_path / "runs",
    }
    argv = [f"--{key}={value}" for key, value in options.items()]
    assert cli.main(["train", str(run / "config.yaml"), *argv]) == 0
    assert (
        cli.main(["export", str(tmp_path / "runs" / "small-qwen2-001"), str(tmp_path / "o")]) == 0
    )
    assert tensors_of(tmp_path / "o") == tensors_of(folder)
