"""`hcp plan`, from the command line to a config."""

import argparse
import json
import re

import pytest
import rich.console

from hcp_jax.base import tables
from hcp_jax.commands import plan
from hcp_jax.planner import search
from hcp_jax.train import config as configuration
from tests.compiled import needs_cuda_compiler


def planned(capsys, *arguments):
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    assert plan.run(parser.parse_args(list(arguments))) == 0
    return capsys.readouterr().out


WHERE = ["--gpu", "h100", "--hosts", "4", "--seq-len", "131072"]


def test_the_best_is_told_first_with_its_reasons(capsys):
    text = planned(capsys, "--model", "llama3-8b", *WHERE, "--top", "3")
    assert "131,072 tokens on 4 x 8 H100" in text
    assert "Each stream of 131,072 tokens is cut over" in text


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_fits_a_narrow_terminal_and_is_never_cut(monkeypatch, capsys, width):
    narrow = rich.console.Console(width=width, highlight=False, markup=False)
    monkeypatch.setattr(tables, "console", lambda: narrow)
    text = planned(capsys, "--model", "llama3-8b", *WHERE, "--top", "2")
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    assert "…" not in text
    head = next(line for line in text.splitlines() if line.startswith("dp "))
    assert "[in, out]" in head
    assert "step s" in head
    assert "GiB" in head
    left_out = set(plan._HEADINGS) - set(plan._PLAIN) - set(re.split(r"\s\s+", head.strip()))
    told = " ".join(text[text.find("(left out") :].split()) if "(left out" in text else ""
    assert all(name in told for name in left_out)


def test_the_table_is_whole_in_a_pipe(capsys):
    text = planned(capsys, "--model", "llama3-8b", *WHERE, "--top", "2")
    head = next(line for line in text.splitlines() if line.startswith("dp "))
    assert re.split(r"\s\s+", head.strip()) == [
        name for name in plan._HEADINGS if name not in plan._PLAIN
    ]
    assert re.search(
        r"\[\d+ in, \d+ out\]", text
    )  # of the reasons, which rich would take for markup


def test_lengths_may_be_written_with_k_and_m(capsys):
    assert "131,072 tokens on" in planned(
        capsys, *("--model", "qwen3-0.6b", "--gpu", "h100", "--hosts", "1"), *("--seq-len", "128K")
    )


def test_any_length_is_answered_without_counting_its_tokens(monkeypatch):
    monkeypatch.setattr("hcp_jax.sequence.mask.Mask.intervals", pytest.fail)
    with pytest.raises(ValueError, match="no split of 1000000007 tokens"):
        search.plan("llama3-8b", 1_000_000_007, gpu="h100", hosts=4)
    with pytest.raises(ValueError, match="seq_len must be an integer from 1 to 2147483647"):
        search.plan("llama3-8b", 10**14, gpu="h100", hosts=4)
    with pytest.raises(NotImplementedError, match="ranks at most"):
        search.plan("llama3-8b", 8192, gpu="h100", hosts=10**5)


def test_json_has_every_candidate(capsys):
    told = json.loads(planned(capsys, "--model", "qwen3-8b", *WHERE, "--json", "-"))
    best = told["candidates"][0]
    assert {"dp", "tp", "cp_outer", "cp_inner", "comm_type", "remat", "mfu", "fits"} <= set(best)
    assert len(told["candidates"]) > 100
    assert told["why"]


def test_what_is_written_is_a_config_that_loads(capsys, tmp_path):
    file = tmp_path / "best.yaml"
    planned(capsys, "--model", "llama3-8b", *WHERE, "--batch", "4", "--write", str(file))
    config = configuration.load(file)
    assert config.parallel.num_devices == 32
    assert (config.seq_len, config.batch_size) == (131072, 4)
    assert config.model.rope_theta == 500_000.0
    assert config.made_for == "4 x 8 H100"
    assert config.checkpoint.every_minutes == 30
    assert config.data.path == configuration.FILL_IN
    assert f"path: {configuration.FILL_IN}  # <- a folder of text" in file.read_text()


def test_a_config_can_be_planned_for(capsys, tmp_path):
    file = tmp_path / "model.yaml"
    file.write_text(
        "model: {vocab_size: 32000, num_layers: 8, hidden_size: 1024, intermediate_size: 2816, "
        "num_heads: 8, num_kv_heads: 8}\n"
    )
    assert "65,536 tokens" in planned(
        capsys, "--model", str(file), "--gpu", "a100", "--hosts", "1", "--seq-len", "65536"
    )


@needs_cuda_compiler
@pytest.mark.slow
def test_verified_candidates_have_compiled_memory(capsys):
    model = ["--model", "qwen3-0.6b", "--gpu", "h100", "--hosts", "1", "--seq-len", "16384"]
    told = json.loads(planned(capsys, *model, "--verify", "1", "--json", "-"))
    sources = [c["memory_source"] for c in told["candidates"]]
    assert sources.count("compiled") == 1
    assert sources[0] == "compiled"
