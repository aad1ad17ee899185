"""The command line: quick, and every mistake is one line and exit code 2."""

import argparse
import importlib
import os
import pathlib
import socket
import subprocess
import sys
import types

import pytest

from hcp_jax import cli

DYNAMIC = str(pathlib.Path(__file__).parents[1] / "configs" / "dynamic-cp.yaml")
QUICKSTART = str(pathlib.Path(__file__).parents[1] / "configs" / "quickstart.yaml")


def hcp(*args, **environment):
    """The command in a process of its own, as a shell starts it."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    return subprocess.run(
        [sys.executable, "-m", "hcp_jax.cli", *args],
        env=kept | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def error(capsys):
    """The one line that a command line ends in."""

    def error(*argv, code=2):
        assert cli.main(argv) == code
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1
        assert captured.err.startswith("hcp: ")
        return captured.err

    return error


@pytest.fixture
def command(monkeypatch):
    """Puts a subcommand of this test's own in the table."""

    def command(run):
        module = types.ModuleType("a_command")
        module.add_arguments = lambda parser: parser.add_argument("--number", type=int)
        module.run = run
        monkeypatch.setitem(cli.COMMANDS, "some", cli.Command("a_command", "do it"))
        monkeypatch.setattr(importlib, "import_module", lambda name: module)
        monkeypatch.setattr(cli, "set_up_platform", lambda num_devices: None)

    return command


def test_help_lists_the_commands_that_are_there_and_imports_no_jax():
    code = (
        "import sys; from hcp_jax.cli import main; assert main(['--help']) == 0; "
        "assert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "\n  train " in done.stdout
    for name in cli.COMMANDS:
        assert f"\n  {name} " in done.stdout


HELP = """
import contextlib, io, sys
from hcp_jax import cli
for name in cli.COMMANDS:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        cli.main([name, "--help"])
    assert f"usage: hcp {name}" in out.getvalue()
heavy = "jax torch matplotlib flax orbax optax grain tensorboardX transformers scipy safetensors"
print(sorted(set(heavy.split()) & set(sys.modules)))
"""


def test_the_help_of_every_command_imports_nothing_heavy():
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    done = subprocess.run(
        [sys.executable, "-c", HELP], env=kept, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_help_keeps_the_capitals_of_names(capsys):
    with pytest.raises(SystemExit):
        cli.main(["export", "--help"])
    assert "Hugging Face folder" in capsys.readouterr().out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_that_is_listed_can_be_run(name):
    module = importlib.import_module(cli.COMMANDS[name].module)
    module.add_arguments(argparse.ArgumentParser())
    assert callable(module.run)


def _process(coordinator, processes, process):
    return [
        *("--coordinator", coordinator),
        *("--num-processes", str(processes)),
        *("--process-id", str(process)),
    ]


def test_a_misspelt_command_or_option_names_the_nearest(error):
    assert "no command 'trian'; did you mean 'train'" in error("trian")
    got = error("train", QUICKSTART, "--parallel.comm_typ", "p2p")
    assert "no option '--parallel.comm_typ'; did you mean '--parallel.comm_type'" in got


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train"], "needs a config"),
        (["train", "gone.yaml"], "there is no config 'gone.yaml'"),
        (["train", QUICKSTART, "--steps", "many"], "steps must be int, got 'many'"),
        (["train", QUICKSTART, "--steps"], "argument --steps: expected one argument"),
        (["train", QUICKSTART, "--parallel.comm_type", "p2q"], "unknown comm_type 'p2q'"),
        (["train", QUICKSTART, "--data.path", "/gone"], "data.path: /gone does not exist"),
        (["train", "--resume", "/gone"], "/gone is not a run folder"),
        (["train", "--resume", "latest", "--run_dir", "/gone"], "no runs in /gone"),
        (["audit", DYNAMIC, "--gpu", "h200", "--hosts", "1"], "name one with --widest-group"),
        (["train", QUICKSTART, "--distributed"], "no job of Slurm, Open MPI or Kubernetes"),
        (["train", QUICKSTART, "--coordinator", "me:1"], "give all three"),
        (["train", QUICKSTART, *_process("me", 1, 0)], "must be ADDRESS:PORT of process 0"),
        (["train", QUICKSTART, *_process("me:1", 1, 1)], "count from 0 to 0"),
        (["train", QUICKSTART, "--folder", "a", "--resume", "b"], "give one of them"),
        (
            ["launch", QUICKSTART, "--num-processes", "0"],
            "must be a whole number, at least 1, got '0'",
        ),
        (
            ["launch", QUICKSTART, "--num-processes", "3", "--devices-per-process", "2"],
            "3 processes of 2 devices have 6, but the config's mesh needs 8",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(error, argv, message):
    assert message in error(*argv)


def test_a_port_that_is_taken_is_told_before_jax_dies_of_it(error, monkeypatch):
    monkeypatch.setattr("jax.distributed.initialize", pytest.fail)
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        got = error("train", QUICKSTART, *_process(f"127.0.0.1:{port}", 1, 0))
    assert f"port {port} cannot be used here (Address already in use)" in got


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (ValueError("one\n  two"), 2, "hcp: one two\n"),
        (NotImplementedError("not here"), 2, "hcp: not here\n"),
        (PermissionError(13, "Permission denied", "x"), 2, "hcp: x: Permission denied\n"),
        (FloatingPointError("nan"), 1, "hcp: nan\n"),
        (KeyboardInterrupt(), 130, "hcp: interrupted\n"),
    ],
)
def test_errors_have_their_exit_codes(command, capsys, raised, code, line):
    def run(args):
        raise raised

    command(run)
    assert cli.main(["some"]) == code
    assert capsys.readouterr().err == line


def test_debug_shows_the_traceback(command, monkeypatch):
    def run(args):
        raise ValueError("here")

    command(run)
    monkeypatch.setenv("HCP_DEBUG", "1")
    with pytest.raises(ValueError, match="here"):
        cli.main(["some"])


def test_the_exit_code_is_the_command_s_own(command):
    command(lambda args: args.number)
    assert cli.main(["some", "--number", "7"]) == 7


def test_a_fault_of_ours_is_a_traceback(command):
    command(lambda args: {}["gone"])
    with pytest.raises(KeyError):
        cli.main(["some"])


SHOW_DEVICES = (
    "from hcp_jax.cli import set_up_platform; set_up_platform(3); import jax, os; "
    "print(len(jax.devices()), jax.devices()[0].platform, os.environ.get('XLA_FLAGS', ''))"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({}, "3 cpu"),
        ({"JAX_PLATFORMS": "cpu"}, "3 cpu"),
        ({"JAX_NUM_CPU_DEVICES": "2"}, "2 cpu"),
        (
            {"XLA_FLAGS": "--xla_force_host_platform_device_count=5"},
            "5 cpu --xla_force_host_platform_device_count=5",
        ),
    ],
)
def test_devices_are_simulated_unless_the_user_says_otherwise(environment, shown):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    done = subprocess.run(
        [sys.executable, "-c", SHOW_DEVICES],
        env=kept | {"CUDA_VISIBLE_DEVICES": ""} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == shown
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", "--xla_b=true --xla_c=4"),
        ("--xla_b=false --xla_a=1", "--xla_b=false --xla_a=1 --xla_c=4"),
    ],
)
def test_flags_for_gpus_are_added_to_the_user_s(monkeypatch, given, expected):
    flags = {"xla_b": True, "xla_c": 4}
    monkeypatch.setattr(
        "hcp_jax.parallel.mesh.xla_flags", lambda kind: flags if kind == "GPU X" else {}
    )
    monkeypatch.setattr(cli, "_gpu_kind", lambda: "GPU X")
    monkeypatch.setenv("XLA_FLAGS", given)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    cli.set_up_platform(None)
    assert os.environ["XLA_FLAGS"] == expected


@pytest.mark.slow
def test_the_train_command_trains_and_resumes_on_simulated_devices(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for i in range(9):
        (text / f"{i}.txt").write_text(f"{i} and again " * (10 + i))
    small = {
        "steps": 6,
        "seq_len": 64,
        "log.every": 1,
        "data.path": text,
        "run_dir": tmp_path / "runs",
        "optimizer.warmup_steps": 1,
        "model.num_layers": 1,
        "model.hidden_size": 32,
        "model.intermediate_size": 64,
    }
    options = [f"--{key}={value}" for key, value in small.items()]
    done = hcp("train", QUICKSTART, *options)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    losses = [float(s.split()[3]) for s in done.stdout.splitlines() if s.startswith("step ")]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.5
    again = hcp("train", "--resume", "latest", "--run_dir", str(tmp_path / "runs"), "--steps", "6")
    assert again.returncode == 2
    assert "quickstart-001 has made all its 6 steps" in again.stderr


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("hcp ver", {"verify "}),
        ("hcp train quickstart-", {"quickstart-moe", "quickstart-pp"}),
        ("hcp train quickstart --optimizer.schedule w", {"wsd "}),
        ("hcp plan --gpus", {"--gpus-per-host "}),
    ],
)
def test_a_shell_is_told_which_words_may_come_next(line, words, tmp_path):
    pytest.importorskip("argcomplete")
    answer = tmp_path / "answer"
    asked = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "COMP_TYPE": "9",
    }
    subprocess.run([sys.executable, "-m", "hcp_jax.cli"], env=os.environ | asked, check=True)
    assert set(answer.read_text().split("\n")) == words
