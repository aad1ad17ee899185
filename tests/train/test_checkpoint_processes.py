"""Checkpoints of two real processes, of which one cannot read, write, or agree with the other.

Both go through all cases once, in lockstep, and say what came of each; a hang in one of them is a
hang of the other as well, and ends all tests here with what both have said and where they stand.
"""

import concurrent.futures
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from hcp_jax.commands.launch import _free_port
from tests.train import checkpoint_cases
from tests.train.checkpoint_cases import CASES
from tests.train.tiny import write_config

pytestmark = pytest.mark.slow

SECONDS = 300
"""After which the two processes hang: alone on two cores, they take ten."""

SOON = 30
"""Seconds within which a fault in one process must be known to both, on a machine with other work;
Orbax would wait for 300 at least."""

ROOT = pathlib.Path(__file__).parents[2]


def start(process: int, port: int, folder: pathlib.Path) -> subprocess.Popen:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-X", "faulthandler", checkpoint_cases.__file__]
    return subprocess.Popen(
        [*command, str(process), str(port), str(folder)],
        env=kept | environment,
        # A pipe has no limit to the size of a file.
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What came of each case, in each of the two processes."""
    folder, port = tmp_path_factory.mktemp("run"), _free_port()
    processes = [start(i, port, folder) for i in range(2)]
    with concurrent.futures.ThreadPoolExecutor() as readers:
        said = [readers.submit(process.stdout.read) for process in processes]
        _, hang = concurrent.futures.wait(said, SECONDS)
        for process in processes:
            if hang:
                process.send_signal(signal.SIGABRT)  # It says where it stands.
                time.sleep(0.5)
            process.kill()
        output = [of.result() for of in said]
    for process in processes:
        process.wait()
        process.stdout.close()
    if hang:
        pytest.fail("the processes hung:\n" + "\nand the other one:\n".join(output))
    lines = [[json.loads(x) for x in text.splitlines() if x.startswith("{")] for text in output]
    found = [{line["case"]: line["found"] for line in of} for of in lines]
    if any(list(of) != list(CASES) for of in found):
        pytest.fail("the processes died:\n" + "\nand the other one:\n".join(output))

    def of_case(name):
        of_both = [of[name] for of in found]
        assert not [of["went wrong"] for of in of_both if "went wrong" in of]
        return of_both

    return of_case


def test_a_checkpoint_damaged_where_one_process_reads_is_put_aside_and_both_take_the_one_before(
    both,
):
    for found in both("damaged"):
        assert (found["step"], found["same bits"]) == (6, True)
        assert "step 9" in found["told"][0]
        assert "(process 1 on " in found["told"][0]
        assert found["aside"] == ["9"]
        assert found["steps"] == ["3", "6", "9"]


def test_what_one_process_cannot_read_of_a_checkpoint_makes_both_take_the_one_before(both):
    for found in both("about"):
        assert (found["step"], found["same bits"]) == (6, True)
        assert "process 1 on" in found["told"][0]
        assert "Input/output error" in found["told"][0]


def test_a_checkpoint_that_is_of_another_model_in_one_process_is_refused_by_both(both):
    for found in both("another model"):
        assert found["kind"] == "MismatchError"
        assert "process 1 on" in found["says"]
        assert "num_layers 2 there and 3 here" in found["says"]
        assert found["steps"] == ["3", "6", "9"]


@pytest.mark.parametrize("case", ["not put aside", "no folder"])
def test_what_only_the_first_process_does_fails_in_both_if_it_cannot(both, case):
    for found in both(case):
        assert found["kind"] == "OSError"
        assert "process 0 on" in found["says"]
        assert "File exists" in found["says"]


def test_a_process_that_says_nothing_is_named_after_a_bounded_time(both):
    for process, found in enumerate(both("no word")):
        assert found["kind"] == "TimeoutError"
        assert f"process {1 - process} has not reported" in found["says"]
        assert 1.5 <= found["after"] < SOON


@pytest.mark.parametrize("process", [0, 1])
def test_a_disk_that_is_full_in_one_process_stops_both_with_its_error(both, process):
    for found in both(f"full in {process}, stop"):
        assert found["kind"] == "OSError"
        assert "step 6 could not be written" in found["says"]
        assert f"process {process} on" in found["says"]
        assert "File too large" in found["says"]
        assert "the last whole one is of step 3 (checkpoint.on_error: stop)" in found["says"]
        assert found["after"] < SOON


@pytest.mark.parametrize("process", [0, 1])
def test_a_disk_that_is_full_in_one_process_is_told_by_both_and_the_next_checkpoint_is_whole(
    both, process
):
    for found in both(f"full in {process}, continue"):
        assert found["kind"] is None
        [told] = found["told"]
        assert f"process {process} on" in told
        assert "File too large" in told
        assert "the last whole one is of step 3. Training goes on" in told
        assert found["after"] < SOON
        # Nothing is left of what was begun.
        assert (found["latest"], found["steps"]) == (3, ["3"])
        assert (found["again"], found["end"]) == (9, ["3", "9"])


@pytest.mark.parametrize("process", [0, 1])
def test_a_last_checkpoint_that_one_process_cannot_write_is_an_error_even_if_told_to_go_on(
    both, process
):
    for found in both(f"last in {process}"):
        assert found["kind"] == "OSError"
        assert f"process {process} on" in found["says"]
        assert "the last whole one is of step 3; and it was the last one" in found["says"]
        assert found["after"] < SOON
        assert found["steps"] == ["3"]


@pytest.mark.parametrize("case", ["not begun in 0", "not written in 0", "not written in 1"])
def test_a_save_that_one_process_cannot_begin_is_told_at_once_and_the_next_one_is_whole(both, case):
    for found in both(case):
        assert found["kind"] is None
        [told] = found["told"]
        assert f"process {case[-1]} on" in told
        assert "No space left on device" in told
        assert found["after"] < SOON
        assert found["steps"] == ["3"]
        assert found["end"] == ["3", "9"]


@pytest.mark.parametrize("process", [0, 1])
def test_a_write_that_does_not_end_counts_as_failed_after_a_bounded_time(both, process):
    for found in both(f"endless in {process}"):
        assert found["kind"] is None
        [told] = found["told"]
        assert f"process {process} " in told
        assert 1 <= found["after"] < SOON
        assert found["end"] == ["9"]


# The whole command, of which process 1 may write no file of more than two kilobytes.
LIMITED = """
import resource, signal, sys
if "--process-id=1" in sys.orig_argv:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
"""


def test_a_run_whose_other_host_cannot_write_goes_on_but_does_not_end_as_if_it_were_saved(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(LIMITED)
    config = write_config(
        tmp_path,
        steps=4,
        parallel={"dp": 2, "fsdp": True},
        checkpoint={"every": 2, "on_error": "continue"},
    )
    kept = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    command = [sys.executable, "-m", "hcp_jax.cli", "launch", str(config)]
    done = subprocess.run(
        [*command, "--num-processes=2", f"--run_dir={tmp_path}"],
        env=kept | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 70, done.stderr
    assert "step 3  loss" in done.stdout  # It went on after step 2.
    assert "step 2 could not be written" in done.stderr
    assert "Training goes on" in done.stderr
    assert "step 4 could not be written" in done.stderr
    assert "there is no whole one; and it was the last one of this run" in done.stderr
    assert "process 1 on" in done.stderr
    assert "File too large" in done.stderr
    assert "steps in" not in done.stdout
    assert "Handler Commit operations" not in done.stderr  # Orbax's pages of it
    assert list((tmp_path / "tiny-001" / "checkpoints").iterdir()) == []
