"""One folder, one run: two real processes, and one that is killed."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

from hcp_jax.parallel.config import ParallelConfig
from hcp_jax.train import lock, loop
from hcp_jax.train.config import TrainConfig
from hcp_jax.train.data import DataConfig

ROOT = pathlib.Path(__file__).parents[2]

HOLD = """
import pathlib, sys
from hcp_jax.train import lock
with lock.held(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """Another process, which holds the folder until its standard input ends."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"},
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_with_the_first_one_s_name_until_it_is_killed(
    other, tmp_path, caplog
):
    half_written = tmp_path / "checkpoints" / "6.orbax-checkpoint-tmp-1"
    half_written.mkdir(parents=True)
    (tmp_path / "checkpoints" / "3").mkdir()
    text = tmp_path / "text.txt"
    text.write_text("some words " * 40)
    config = TrainConfig(
        steps=200,
        seq_len=64,
        data=DataConfig(path=str(text)),
        parallel=ParallelConfig(cp_inner=8, comm_type="p2p"),
    )
    for begin in (False, True):
        with pytest.raises(lock.RunInUseError) as error:
            loop.train(config, resume=tmp_path, begin=begin)
        assert f"process {other.pid} on {socket.gethostname()} has held it since 2" in str(
            error.value
        )
    assert half_written.is_dir()

    other.kill()
    other.wait()
    with lock.held(tmp_path):
        assert json.loads((tmp_path / lock.NAME).read_text())["process"] == os.getpid()
    assert not caplog.text


def test_a_process_that_ends_properly_lets_go(other, tmp_path):
    other.stdin.close()
    other.wait()
    assert (tmp_path / lock.NAME).read_text() == ""
    with (
        lock.held(tmp_path),
        pytest.raises(lock.RunInUseError, match=f"process {os.getpid()} on"),
        lock.held(tmp_path),
    ):
        pass


def test_a_lock_that_another_host_did_not_let_go_of_is_told(tmp_path, caplog):
    holder = {"host": "elsewhere\x1b[31m", "process": 7, "since": "2026-01-01"}
    (tmp_path / lock.NAME).write_text(json.dumps(holder))
    with lock.held(tmp_path):
        pass
    assert "process 7 on elsewhere\\x1b[31m has held it since 2026-01-01" in caplog.text
    assert "locks do not reach other hosts" in caplog.text


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": 1}', "\0" * 99, "[" * 4000])
def test_what_is_in_the_file_decides_nothing(content, tmp_path):
    (tmp_path / lock.NAME).write_text(content)
    with lock.held(tmp_path), pytest.raises(lock.RunInUseError), lock.held(tmp_path):
        pass
