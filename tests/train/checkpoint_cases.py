"""What two processes do to their checkpoints, a case after the other: a program of its own.

Each case has a fault in one process; both go through all of them in lockstep, and print a line of
JSON that says what came of it. `test_checkpoint_processes.py` starts them, and asks.

    python checkpoint_cases.py PROCESS PORT FOLDER
"""

import contextlib
import errno
import json
import logging
import os
import pathlib
import resource
import signal
import sys
import time
import traceback

import jax
import numpy as np
import orbax.checkpoint as ocp

from hcp_jax.train.checkpoint import writers
from hcp_jax.train.checkpoint.manager import CheckpointConfig, Checkpoints
from hcp_jax.train.hosts.kv_store import Messages

NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
MODEL = {"num_layers": 2}


class Case:
    """One process's view of a case: the checkpoints of steps 3, 6 and 9 in a folder of their own."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.process = jax.process_index()
        self.words = Messages("test")
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
        self.words.gather(None)

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
    return error_of(lambda: case.words.receive("nothing", 1 - case.process, 1.5))


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

    with replaced(True, writers, "WRITE_SECONDS", 1):
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
    end = Messages("end")
    if process == 0:
        end.receive("done", 1)
    else:
        end.send("done", True)
    # Not the usual way out, on which jax waits for a process that failed otherwise.
    os._exit(0)


if __name__ == "__main__":
    play(int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3]))
