"""Compiled programs are kept between starts: by commands, where they may, and never by importing."""

import argparse
import collections
import importlib
import subprocess
import sys

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from hcp_jax import cli, program_cache
from tests.train import tiny

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A folder of this test's own for programs; jax's settings are put back afterwards."""
    before = {name: jax.config.values[name] for name in SETTINGS}
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    monkeypatch.setenv(program_cache.VARIABLE, str(tmp_path / "programs"))
    yield tmp_path / "programs"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def events():
    """How often jax has told of each event."""
    counts = collections.Counter()

    def count(event, **_):
        counts[event.rpartition("/")[2]] += 1

    jax.monitoring.register_event_listener(count)
    yield counts
    jax.monitoring.unregister_event_listener(count)


@pytest.mark.slow
def test_a_second_start_compiles_nothing_anew(cache, events, tmp_path, capsys):
    changes = {"steps": 1, "run_dir": str(tmp_path / "runs"), "batch_size": 8}
    config = str(tiny.write_config(tmp_path, parallel={"dp": 8}, **changes))
    compiled = []
    for _ in range(2):
        jax.clear_caches()
        events.clear()
        assert cli.main(["train", config]) == 0
        assert capsys.readouterr().err.count(f"compiled programs are kept in {cache}") == 1
        jax.config.update("jax_compilation_cache_dir", None)  # as a new process has it
        requests, hits = events["compile_requests_use_cache"], events["cache_hits"]
        compiled.append(requests - hits)
        assert requests > 10
    assert compiled[0] > 10
    assert compiled[1] == 0


def test_commands_that_compile_keep_programs_unless_they_are_told_not_to(monkeypatch, tmp_path):
    config, asked = str(tiny.write_config(tmp_path, parallel={"dp": 2})), []
    monkeypatch.setattr(program_cache, "turn_on", lambda **options: asked.append(options))
    # jax cannot read programs for devices that are not here back, and warns of each.
    assert not hasattr(importlib.import_module(cli.COMMANDS["audit"].module), "keep_programs")
    for name in ("train", "verify"):
        module = importlib.import_module(cli.COMMANDS[name].module)
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        asked.clear()
        module.keep_programs(parser.parse_args([config, "--program_cache", "false"]))
        assert not asked
        module.keep_programs(parser.parse_args([config]))
        assert len(asked) == 1


@pytest.mark.parametrize(
    ("argv", "launched", "several_hosts", "tell"),
    [
        ([], False, False, True),
        (["--distributed"], False, True, True),
        (["--coordinator", "a:1", "--process-id", "0"], False, True, True),
        (["--coordinator", "a:1", "--process-id", "3"], False, True, False),
        (["--coordinator", "127.0.0.1:1", "--process-id", "1"], True, False, False),
    ],
)
def test_one_process_tells_and_several_hosts_share_a_named_folder_only(
    argv, launched, several_hosts, tell, monkeypatch, tmp_path
):
    asked = []
    monkeypatch.setattr(program_cache, "turn_on", lambda **options: asked.append(options))
    if launched:
        monkeypatch.setenv("HCP_LAUNCHER", "1")
    module = importlib.import_module(cli.COMMANDS["train"].module)
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    module.keep_programs(parser.parse_args([str(tiny.write_config(tmp_path)), *argv]))
    assert asked == [{"several_hosts": several_hosts, "tell": tell}]


def test_it_is_off_where_it_must_not_be_or_cannot_be(cache, monkeypatch, capsys):
    monkeypatch.setenv(program_cache.VARIABLE, "off")
    assert program_cache.turn_on() is None
    assert capsys.readouterr().err == ""
    monkeypatch.setenv(program_cache.VARIABLE, "")
    assert program_cache.turn_on(several_hosts=True) is None
    assert "name a folder that all hosts share in HCP_PROGRAM_CACHE" in capsys.readouterr().err
    cache.write_text("a file")
    monkeypatch.setenv(program_cache.VARIABLE, str(cache))
    assert program_cache.turn_on() is None
    assert f"not kept: {cache}" in capsys.readouterr().err
    assert jax.config.values["jax_compilation_cache_dir"] is None


def test_a_folder_that_the_user_gave_to_jax_stays(cache, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    assert program_cache.turn_on() is None
    assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "own")


def test_importing_the_library_turns_nothing_on():
    code = (
        "import hcp_jax as hcp, jax; hcp.set_up_platform(); hcp.make_mesh(); "
        "assert jax.config.values['jax_compilation_cache_dir'] is None"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
