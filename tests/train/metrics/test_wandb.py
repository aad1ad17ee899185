"""`log.wandb`: the numbers of TensorBoard go to Weights & Biases too; one run, also over a resume."""

import json
import sys

import pytest

from hcp_jax.commands import train as command
from hcp_jax.train import config
from hcp_jax.train.metrics.metrics import Recorder
from hcp_jax.train.metrics.wandb import Wandb
from tests.train.metrics.test_metrics import evaluation

STAND_IN = """
import json, types
class Error(Exception): pass
errors = types.SimpleNamespace(Error=Error)
def Settings(**values): return values
class Run:
    def __init__(self, **given): self.given, self.lines, self.ended = given, [], False
    def log(self, values, step): self.lines.append((step, values))
    def finish(self): self.ended = True
runs = []
def init(**given):
    if given["project"] == "refused": raise Error("no api key")
    runs.append(Run(**given))
    return runs[-1]
"""


@pytest.fixture
def wandb(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("packages")
    (folder / "wandb.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    import wandb

    yield wandb
    monkeypatch.delitem(sys.modules, "wandb")


def test_every_number_of_every_part_of_a_run_is_sent_to_one_run(wandb, tmp_path):
    for start in (0, 2):
        tracker = Wandb("project", tmp_path, {"model.num_layers": 2})
        recorder = Recorder(tmp_path, start, tensorboard=False, tracker=tracker)
        recorder.write(start, {"loss": 3.0 - start})
        recorder.write_evaluation(evaluation(start + 1))
        recorder.close()
    first, second = wandb.runs
    assert first.lines[0] == (0, {"loss": 3.0})
    step, values = first.lines[1]
    assert (step, values["eval/loss"]) == (1, 3.0)
    assert second.lines[0] == (2, {"loss": 1.0})
    assert first.given["id"] == (tmp_path / "wandb-id").read_text() != ""
    for run in wandb.runs:
        assert run.ended
        assert (run.given["project"], run.given["name"]) == ("project", tmp_path.name)
        assert (run.given["id"], run.given["resume"]) == (first.given["id"], "allow")
        assert json.dumps(run.given["config"]) == '{"model.num_layers": 2}'


def test_what_wandb_refuses_is_told_with_the_way_out(wandb, tmp_path):
    with pytest.raises(ValueError, match="cannot start: no api key.*WANDB_MODE=offline"):
        Wandb("refused", tmp_path, {})


def test_a_missing_package_is_told_before_the_run_begins(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    run = config.load("quickstart", [("log.wandb", "mine"), ("run_dir", str(tmp_path))])
    with pytest.raises(
        ValueError, match=r"log.wandb='mine' needs .* pip install 'hcp_jax\[wandb\]'"
    ):
        command.require_can_begin(run, None, 8)
