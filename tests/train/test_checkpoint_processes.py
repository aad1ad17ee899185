"""Checkpoints of two real processes, of which one cannot read, write, or agree with the other.

Both go through all cases once, in lockstep, and say what came of each; a hang in one of them is a
hang of the other as well, and ends all tests here with what both have said and where they stand.
"""

import concurrent.futures
import contextlib
import errno
import json
import logging
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time
import traceback

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from hcp_jax.train import parts
from hcp_jax.train.checkpoint import CheckpointConfig, Checkpoints
from hcp_jax.train.hosts.words import Words
from hcp_jax.train.launch import _free_port
from tests.train.tiny import write_config

pytestmark = pytest.mark.slow

SECONDS = 300
"""After which the two processes hang: alone on two cores, they take five."""

SOON = 30
"""Seconds within which a fault in one process must be known to both, on a machine with other work;
Orbax would wait for 300 at least."""

ROOT = pathlib.Path(__file__).parents[2]
NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
MODEL = {"num_layers": 2}


# What the processes do.


class Case:
    """One process's view of a case: the checkpoints of steps 3, 6 and 9 in a folder of their own."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.process = jax.process_index()
        self.words = Words("test")
        self.told: list[str] = []
        mesh = jax.make_mesh((2,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
        self._cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a"))
        self._whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def state(self, seed):
        """Half of `w` lies in each process."""
        w = np.random.default_rng(seed).standard_normal((2, 8192), np.float32)
        return {
            "w": jax.make_array_from_callback(w.shape, self._cut, lambda at: w[at]),
            "step": jax.make_array_from_callback((), self._whole, lambda _: np.int32(seed)),
        }

    def checkpoints(self, model=None, **config):
        return Checkpoints(self.folder, model or MODEL, CheckpointConfig(keep=3, **config))

    def save(self, checkpoints, step):
        checkpoints.save(step, self.state(step), {"next": step})

    def save_three(self):
        checkpoints = self.checkpoints()
        for step in (3, 6, 9):
            self.save(checkpoints, step)
        checkpoints.close()

    def both(self):
        """The other process has come here, too."""
        self.words.of_all(None)

    def steps(self):
        """What lies in the folder; nothing half-written, then, if all are numbers."""
        return sorted(path.name for path in (self.folder / "checkpoints").iterdir())

    def restored(self, checkpoints):
        found = checkpoints.restore(self.state(0))
        seed = found.data["next"]
        same = jax.tree.map(
            lambda a, b: np.array_equal(a.addressable_data(0), b.addressable_data(0)),
            found.state,
            self.state(seed),
        )
        return {"step": seed, "same bits": all(jax.tree.leaves(same)), "told": self.told}


@contextlib.contextmanager
def full_disk(here):
    """No file of more than a kilobyte can be written, by this process alone: the shards cannot."""
    if here:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)


@contextlib.contextmanager
def replaced(here, owner, name, by):
    """In this process alone."""
    before = getattr(owner, name)
    if here:
        setattr(owner, name, by)
    try:
        yield before
    finally:
        setattr(owner, name, before)


def error_of(call):
    """Of what kind, in which words, and after how long."""
    began = time.monotonic()
    try:
        call()
    except Exception as error:
        return {"kind": type(error).__name__, "says": str(error), "after": time.monotonic() - began}
    return {"kind": None, "says": "", "after": time.monotonic() - began}


def damaged_where_only_process_1_reads(case):
    case.save_three()
    case.both()
    if case.process == 0:
        [part] = (case.folder / "checkpoints/9/state/ocdbt.process_1/d").iterdir()
        part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    case.both()
    checkpoints = case.checkpoints()
    found = case.restored(checkpoints)
    aside = [path.name for path in (case.folder / "checkpoints-damaged").iterdir()]
    case.save(checkpoints, 9)
    checkpoints.close()
    return found | {"aside": aside, "steps": case.steps()}


def about_that_process_1_cannot_read(case):
    case.save_three()

    def read(handler, directory, *args, **kwargs):
        if "/9/about" in str(directory):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return before(handler, directory, *args, **kwargs)

    with replaced(case.process == 1, ocp.JsonCheckpointHandler, "restore", read) as before:
        return case.restored(case.checkpoints())


def another_model_in_process_1(case):
    case.save_three()
    checkpoints = case.checkpoints({"num_layers": 2 + case.process})
    return error_of(lambda: checkpoints.restore(case.state(0))) | {"steps": case.steps()}


def damaged_that_cannot_be_put_aside(case):
    case.save_three()
    if case.process == 0:
        (case.folder / "checkpoints/9/about/metadata").unlink()
        (case.folder / "checkpoints-damaged").write_text("in the way")
    case.both()
    checkpoints = case.checkpoints()
    return error_of(lambda: checkpoints.restore(case.state(0)))


def folder_that_process_0_cannot_make(case):
    if case.process == 0:
        case.folder.mkdir()
        (case.folder / "checkpoints").write_text("in the way")
    case.both()
    return error_of(case.checkpoints)


def word_that_is_not_said(case):
    return error_of(lambda: case.words.hear("nothing", 1 - case.process, 1.5))


def disk_that_is_full(case, process, on_error):
    """Step 3 is saved, 6 cannot be, 9 can be again."""
    checkpoints = case.checkpoints(on_error=on_error)
    case.save(checkpoints, 3)
    checkpoints.wait()

    def save_six():
        case.save(checkpoints, 6)
        checkpoints.wait()

    with full_disk(case.process == process):
        found = error_of(save_six)
    found |= {"told": case.told, "latest": checkpoints.latest(), "steps": case.steps()}
    case.save(checkpoints, 9)
    checkpoints.close()
    return found | {"again": case.restored(case.checkpoints())["step"], "end": case.steps()}


def last_one(case, process):
    """The disk is full at the end of the run: there is no next checkpoint to make up for it."""
    checkpoints = case.checkpoints(on_error="continue")
    case.save(checkpoints, 3)
    checkpoints.wait()
    with full_disk(case.process == process):
        case.save(checkpoints, 6)
        found = error_of(checkpoints.close)
    return found | {"steps": case.steps()}


def save_that_does_not_begin(case, process, owner, name):
    checkpoints = case.checkpoints(on_error="continue")
    case.save(checkpoints, 3)
    checkpoints.wait()

    def fails(*_, **__):
        raise NO_SPACE

    with replaced(case.process == process, owner, name, fails):
        found = error_of(lambda: case.save(checkpoints, 6))
    found |= {"told": case.told, "steps": case.steps()}
    case.save(checkpoints, 9)
    checkpoints.close()
    return found | {"end": case.steps()}


class Endless:
    """A write to a disk that does not answer."""

    def result(self, timeout):
        time.sleep(timeout)
        raise TimeoutError("no answer")


def write_that_does_not_end(case, process):
    async def writes(*_, **__):
        return [Endless()]

    with replaced(True, parts, "WRITE_SECONDS", 1):
        checkpoints = case.checkpoints(on_error="continue")

        def save_six():
            case.save(checkpoints, 6)
            checkpoints.wait()

        with replaced(case.process == process, ocp.StandardCheckpointHandler, "async_save", writes):
            found = error_of(save_six)
    with contextlib.suppress(OSError):  # that its last one was not written
        checkpoints.close()
    checkpoints = case.checkpoints()  # with time to write
    case.save(checkpoints, 9)
    checkpoints.close()
    return found | {"told": case.told, "end": case.steps()}


CASES = {
    "damaged": damaged_where_only_process_1_reads,
    "about": about_that_process_1_cannot_read,
    "another model": another_model_in_process_1,
    "not put aside": damaged_that_cannot_be_put_aside,
    "no folder": folder_that_process_0_cannot_make,
    "no word": word_that_is_not_said,
    **{
        f"full in {process}, {on_error}": lambda case, p=process, o=on_error: disk_that_is_full(
            case, p, o
        )
        for process in (0, 1)
        for on_error in ("continue", "stop")
    },
    **{f"last in {process}": lambda case, p=process: last_one(case, p) for process in (0, 1)},
    **{
        f"endless in {process}": lambda case, p=process: write_that_does_not_end(case, p)
        for process in (0, 1)
    },
    # Before process 0 has said where to write, and when it has; in process 1 as it copies.
    "not begun in 0": lambda case: save_that_does_not_begin(case, 0, ocp.CheckpointManager, "save"),
    "not written in 0": lambda case: save_that_does_not_begin(
        case, 0, ocp.StandardCheckpointHandler, "async_save"
    ),
    "not written in 1": lambda case: save_that_does_not_begin(
        case, 1, ocp.StandardCheckpointHandler, "async_save"
    ),
}


class Heard(logging.Handler):
    def __init__(self):
        super().__init__()
        self.case: Case | None = None

    def emit(self, record):
        if self.case is not None:
            self.case.told.append(record.getMessage())


def play(process: int, port: str, folder: pathlib.Path) -> None:
    """All cases, in one of the two processes; prints what came of them as it goes."""
    jax.distributed.initialize(
        f"127.0.0.1:{port}", 2, process, cluster_detection_method="deactivate"
    )
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    heard = Heard()
    logging.getLogger("hcp_jax").addHandler(heard)
    for name, play_case in CASES.items():
        heard.case = case = Case(folder / name.replace(" ", "-"))
        try:
            found = play_case(case)
        except Exception:
            found = {"went wrong": traceback.format_exc()}
        print(json.dumps({"case": name, "found": found}), flush=True)
    # What the processes say goes over process 0, which has to be the last one.
    end = Words("end")
    if process == 0:
        end.hear("done", 1)
    else:
        end.say("done", True)
    # Not the usual way out, on which jax waits for a process that failed otherwise.
    os._exit(0)


# What is asked of it.


def start(process: int, port: int, folder: pathlib.Path) -> subprocess.Popen:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": paths}
    return subprocess.Popen(
        [*(sys.executable, "-X", "faulthandler", __file__), str(process), str(port), str(folder)],
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
        assert f"process {1 - process} has not said" in found["says"]
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


if __name__ == "__main__":
    play(int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3]))
