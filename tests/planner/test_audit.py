"""`hcp audit`, from a config to what is said of it."""

import argparse
import json

import pytest

from hcp_jax import hardware
from hcp_jax.commands import audit as command
from hcp_jax.compiled.clock import Schedule
from hcp_jax.compiled.report import Audit, Memory, Moved
from hcp_jax.cost.memory import estimate_memory
from hcp_jax.cost.models import model_shape
from hcp_jax.cost.split import Split
from hcp_jax.hardware import Cluster
from hcp_jax.planner import audit
from tests.compiled import needs_cuda_compiler

SMALL = """
steps: 100
batch_size: 1
seq_len: 4096
optimizer: {warmup_steps: 10}
model: {vocab_size: 512, num_layers: 2, hidden_size: 256, intermediate_size: 512, num_heads: 4,
        num_kv_heads: 2, head_size: 64, implementation: blockwise}
parallel: {cp_outer: 2, cp_inner: 2}
"""


def audited(capsys, *arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args(list(arguments))) == 0
    return capsys.readouterr().out


@pytest.fixture
def small(tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text(SMALL)
    return str(file)


@needs_cuda_compiler
@pytest.mark.slow
def test_every_hop_of_a_training_step_on_a_million_tokens_is_hidden_and_its_memory_foreseen(capsys):
    where = ["--gpu", "h200", "--hosts", "8", "--gpus-per-host", "8"]
    told = json.loads(audited(capsys, "configs/llama3-8b-1m.yaml", *where, "--json", "-"))
    # 32 layers; K and V forward, K, V, dK and dV backward; seven moves of each.
    assert told["ring_hops"] == 32 * 6 * 7
    assert told["ring_hops_hidden"] == told["ring_hops"]
    foreseen = estimate_memory(model_shape("llama3-8b"), Split(cp_outer=8, cp_inner=8), 2**20).peak
    assert foreseen == pytest.approx(told["memory"]["peak_bytes"], rel=0.15)
    assert told["modelled"]["exposed_s"] < 0.01 * told["modelled"]["step_s"]
    assert {"kind", "axes", "bytes", "count", "hidden"} <= set(told["collectives"][0])


@needs_cuda_compiler
def test_table_json_and_picture_tell_of_one_program(capsys, small, tmp_path):
    picture, figures = tmp_path / "schedule.png", tmp_path / "audit.json"
    where = ["--gpu", "h100", "--hosts", "2", "--gpus-per-host", "2", "--attention"]
    text = audited(capsys, small, *where, "--json", str(figures), "--picture", str(picture))
    told = json.loads(figures.read_text())
    assert f"{told['ring_hops_hidden']} of {told['ring_hops']} hidden" in text
    assert "xla_gpu_enable_latency_hiding_scheduler=true" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    memory = told["memory"]
    parts = ("argument_bytes", "output_bytes", "temp_bytes")
    assert memory["peak_bytes"] == sum(memory[part] for part in parts) - memory["alias_bytes"]


@needs_cuda_compiler
@pytest.mark.slow
def test_the_step_of_groups_is_audited_too(capsys, small):
    where = ["--gpu", "h100", "--hosts", "2", "--gpus-per-host", "2", "--widest-group", "2"]
    told = json.loads(audited(capsys, small, *where, "--json", "-"))
    # No group is wider than a host, and inside hosts heads are exchanged: K and V do not move.
    moved = {(c["what"], *c["axes"]) for c in told["collectives"] if c["what"]}
    assert moved == {("heads", "cp_inner")}


@needs_cuda_compiler
def test_a_cluster_of_another_size_than_the_mesh_is_an_error(capsys, small):
    with pytest.raises(ValueError, match="mesh has 4 devices, but 2 x 8 H100 are 16"):
        audited(capsys, small, "--gpu", "h100", "--hosts", "2")


def test_flags_of_the_command_line_win_over_the_library_s():
    cluster = Cluster(hardware.gpu("h100"), 1, 8)
    name = "xla_gpu_enable_latency_hiding_scheduler"
    assert audit.chosen_flags(cluster, [f"--{name}=false"])[name] == "false"
    assert audit.chosen_flags(cluster, [], library=False) == {}
    with pytest.raises(ValueError, match="NAME=VALUE"):
        audit.chosen_flags(cluster, ["xla_gpu_enable"])


def an_audit(moved=(), temp=0, step_s=1.0):
    schedule = Schedule((), {}, {"attention": 0.5, "product": 0.1, "other": 0.0}, 0.4, step_s)
    cluster = Cluster(hardware.gpu("h100"), 1, 8)
    memory = Memory(0, 0, 0, temp, cluster.gpu.memory_bytes)
    return Audit(cluster, memory, tuple(moved), schedule)


def exposed(what, seconds, waits):
    return Moved("all-to-all", what, (), "inside a host", 1, 1.0, 1, False, seconds, waits, ())


@pytest.mark.parametrize(
    ("moved", "temp", "words"),
    [
        ([], 90 * 2**30, "does not fit"),
        ([exposed("ring", 0.2, 0.2)], 0, "no attention is scheduled beside them"),
        ([exposed("ring", 0.2, 0.1)], 0, "attention beside them is too short"),
        ([exposed("heads", 0.2, 0.2)], 0, "The exchange of heads is not hidden"),
        ([exposed("gather", 0.2, 0.2)], 0, "The gather of K and V is not hidden"),
        ([exposed("", 0.2, 0.2)], 0, "Waiting for weights, gradients and activations"),
    ],
)
def test_what_is_exposed_or_does_not_fit_is_met_with_advice(moved, temp, words):
    (line,) = audit.advice(an_audit(moved, temp), {})
    assert words in line


def test_flags_that_are_set_are_not_asked_for():
    found = an_audit([exposed("ring", 0.2, 0.2)])
    (line,) = audit.advice(found, audit.chosen_flags(found.cluster, []))
    assert "cp_inner larger" in line
    first, *_ = flags = audit.chosen_flags(found.cluster, [])
    (line,) = audit.advice(found, flags | {first: "false"})
    assert "set the flags" in line


def test_advice_names_the_program_that_it_measured():
    (line,) = audit.advice(an_audit([exposed("stages", 0.2, 0.1)]), {}, "tick")
    assert "10% of the tick" in line


def test_where_all_is_well_it_says_so():
    (line,) = audit.advice(an_audit([exposed("heads", 0.2, 0.001)]), {})
    assert line.startswith("Everything fits")
