"""Megatron's functional test of dynamic CP in small, in its own words, and its `dp_balanced`."""

import io
import pathlib
import shutil

import numpy as np
import pytest
import rich.console

from hcp_jax.train import config as configuration
from hcp_jax.train import loop
from hcp_jax.train.metrics import metrics
from tests.kept_programs import kept_programs

pytestmark = pytest.mark.slow

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "dynamic-megatron.yaml"
SMALLER = 8  # documents and buffers are shorter by this factor
BALANCED = {
    "parallel.sequence_packing_scheduler": "dp_balanced",
    "parallel.dynamic_context_parallel": "false",
    "parallel.dynamic.menu": "auto",
    "parallel.tp": "1",
    "parallel.dp": "2",
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Documents of 128 to 2048 tokens, log-normal as in the reference, shorter by `SMALLER`."""
    lengths = np.clip(np.random.default_rng(0).lognormal(6, 1, 60), 128, 2048) / SMALLER
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = (f'{{"text": "{("abc " * 64)[: int(length) - 1]}"}}' for length in lengths)
    path.write_text("\n".join(lines))
    return path


def losses_of(folder):
    return [line["loss"] for line in metrics.read(folder)]


def train(text, run_dir, resume=None, **words):
    given = {
        "steps": "6",
        "seq_len": str(2048 // SMALLER),
        "run_dir": str(run_dir),
        "data.path": str(text),
        "checkpoint.every": "3",
        "optimizer.warmup_steps": "1",
        "parallel.max_seqlen_per_dp_cp_rank": str(512 // SMALLER),
        "parallel.dynamic.lookahead": "1",  # a step's documents do not depend on the scheduler
        **words,
    }
    config = configuration.load(CONFIG, list(given.items()))
    console = rich.console.Console(file=io.StringIO())
    return loop.train(config, resume=resume, console=console).folder


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    with kept_programs(tmp_path_factory.mktemp("cache"), 0.1):
        yield train(text, tmp_path_factory.mktemp("runs"))


def test_a_run_that_goes_on_from_its_middle_keeps_its_losses(text, whole, tmp_path):
    folder = tmp_path / whole.name
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("6"))
    assert max(line["groupings"] for line in metrics.read(whole)) > 1
    assert losses_of(whole)[-1] < losses_of(whole)[0] - 0.5
    train(text, tmp_path, resume=folder)
    assert losses_of(folder) == losses_of(whole)


def test_two_stages_train_the_same_documents_and_go_on_from_their_middle(text, whole, tmp_path):
    """Megatron's other shape, tp 2 · pp 2 · cp 2; here with FSDP inside a stage."""
    words = {
        "parallel.pipeline_model_parallel_size": "2",
        "parallel.context_parallel_size": "2",
        "parallel.fsdp": "true",
        "parallel.max_seqlen_per_dp_cp_rank": str(1024 // SMALLER),
        "parallel.dynamic.menu": "[2]",
    }
    folder = train(text, tmp_path / "whole", **words)
    assert losses_of(folder) == pytest.approx(losses_of(whole), abs=2e-5)
    again = tmp_path / folder.name
    shutil.copytree(folder, again, ignore=shutil.ignore_patterns("6"))
    train(text, tmp_path, resume=again, **words)
    assert losses_of(again) == losses_of(folder)


def test_dp_balanced_trains_the_same_documents_on_one_cp_size(text, whole, tmp_path):
    folder = train(text, tmp_path, **BALANCED)
    assert losses_of(folder) == pytest.approx(losses_of(whole), abs=2e-5)
    lines = metrics.read(folder)
    assert {line["groupings"] for line in lines} == {1}
    assert [line["tokens"] for line in lines] == [line["tokens"] for line in metrics.read(whole)]
