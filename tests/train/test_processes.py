"""Two real processes of four CPU devices each train as one process of eight does."""

import contextlib
import io
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest
import rich.console

from hcp_jax.train import config as configuration
from hcp_jax.train import loop
from hcp_jax.train.metrics import metrics
from hcp_jax.train.steps import Outcome
from tests.kept_programs import kept_programs

pytestmark = pytest.mark.slow

QUICKSTART = pathlib.Path(__file__).parents[2] / "configs" / "quickstart.yaml"
STEPS = 30
CHANGES = {
    "steps": str(STEPS),
    "seq_len": "64",
    "batch_size": "2",
    "optimizer.warmup_steps": "2",
    "log.every": "1",
    "eval.every": "10",
    "eval.tokens": "1024",
}
SECONDS = 300
"""After which two processes have hung: they compile for as long as one does, on shared cores."""


class Pair:
    """`hcp train` in two processes on loopback; both are gone when the context ends."""

    def __init__(self, logs: pathlib.Path, cache: pathlib.Path, *arguments: str):
        address = f"127.0.0.1:{_free_port()}"
        place = [f"--coordinator={address}", "--num-processes=2"]
        kept = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
        platform = {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache)}
        self._logs = logs
        self.processes = []
        for i in range(2):
            command = [sys.executable, "-m", "hcp_jax.cli", "train", *arguments]
            with (logs / f"{i}.out").open("w") as out, (logs / f"{i}.err").open("w") as err:
                self.processes.append(
                    subprocess.Popen(
                        [*command, *place, f"--process-id={i}"],
                        env=kept | platform,
                        stdout=out,
                        stderr=err,
                    )
                )

    def __enter__(self) -> "Pair":
        return self

    def __exit__(self, *_) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def ended(self) -> "Ended":
        """Waits for both; one that fails would leave the other waiting, so that time is bounded."""
        self._wait_until(lambda: all(p.poll() is not None for p in self.processes))
        codes = [p.returncode for p in self.processes]
        return Ended(codes, self._output("out"), self._output("err"))

    def interrupt_after(self, step: int, folder: pathlib.Path) -> None:
        """Ctrl-C in the second process, once the run has recorded a step."""
        self._wait_until(lambda: step in losses(folder) or self.processes[0].poll() is not None)
        self.processes[1].send_signal(signal.SIGINT)

    def _wait_until(self, is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not is_so():
            if time.monotonic() > deadline:
                pytest.fail(f"hung: {self._output('out')} {self._output('err')}")
            time.sleep(0.05)

    def _output(self, stream: str) -> list[str]:
        return [(self._logs / f"{i}.{stream}").read_text() for i in range(2)]


class Ended(NamedTuple):
    """How two processes ended: of each, the exit code and what it printed."""

    codes: list[int]
    out: list[str]
    err: list[str]


def _free_port() -> int:
    """One below those that the system gives to outgoing connections while the processes start."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("there is no free port on 127.0.0.1")


def losses(folder: pathlib.Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in metrics.read(folder)}


def train(run_dir: pathlib.Path, resume: pathlib.Path | None = None) -> Outcome:
    """The same run in this process, on its eight devices."""
    changes = {**CHANGES, "run_dir": str(run_dir)}
    config = configuration.load(QUICKSTART, list(changes.items()))
    return loop.train(config, resume=resume, console=rich.console.Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Runs of one config share what they compile."""
    with kept_programs(tmp_path_factory.mktemp("cache")) as folder:
        yield folder


@pytest.fixture(scope="module")
def alone_folder(cache, tmp_path_factory):
    """The run of one process of eight devices."""
    return train(tmp_path_factory.mktemp("alone")).folder


@pytest.fixture(scope="module")
def alone(alone_folder):
    """Its losses."""
    return losses(alone_folder)


@pytest.fixture(scope="module")
def stopped(cache, tmp_path_factory):
    """A run of two processes that Ctrl-C in the second one stopped, and its folder."""
    place = tmp_path_factory.mktemp("two")
    options = [f"--{key}={value}" for key, value in CHANGES.items()]
    folder = place / "runs" / "quickstart-001"
    with Pair(place, cache, str(QUICKSTART), *options, f"--run_dir={folder.parent}") as pair:
        pair.interrupt_after(3, folder)
        return folder, pair.ended()


@pytest.fixture(scope="module")
def resumed(cache, stopped, tmp_path_factory):
    """The same run, gone on by two processes in a copy of its folder to the end."""
    place = tmp_path_factory.mktemp("resumed")
    folder = place / "runs" / "quickstart-001"
    shutil.copytree(stopped[0], folder)
    with Pair(place, cache, "--resume", str(folder)) as pair:
        return folder, pair.ended()


def test_two_processes_train_to_the_losses_of_one(alone, resumed):
    folder, ended = resumed
    assert ended.codes == [0, 0], ended
    assert list(losses(folder)) == list(range(STEPS))
    assert losses(folder) == pytest.approx(alone, abs=2e-5)


def test_two_processes_evaluate_to_what_one_does(alone_folder, resumed):
    one, two = map(metrics.read_evaluations, (alone_folder, resumed[0]))
    assert [line["step"] for line in two] == [0, 10, 20, 30]
    for a, b in zip(one, two, strict=True):
        assert a["loss_by_position"] == pytest.approx(b["loss_by_position"], abs=2e-5)
        assert a["tokens_by_position"] == b["tokens_by_position"]


def test_ctrl_c_in_one_process_stops_both_after_the_same_step_with_a_checkpoint(stopped):
    folder, ended = stopped
    # The first one hears of it as of a SIGTERM.
    assert ended.codes == [0, 130], ended
    done = len(losses(folder))
    assert 4 <= done < STEPS
    assert f"Stopped after step {done} of {STEPS}" in ended.out[0]
    assert [p.name for p in (folder / "checkpoints").iterdir()] == [str(done)]


def test_only_the_first_process_prints_and_writes(stopped, resumed):
    for folder, ended in (stopped, resumed):
        assert "steps in " in ended.out[0]
        # What gloo says of its connections, in lines that its threads tear apart, comes from both.
        ours = ("devices", "model", "loss", "step", "hcp", "quickstart")
        assert not [word for word in ours if word in ended.out[1]]
        assert all(word in ended.out[0] for word in ours[:4])
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == len(losses(folder))
    [waits] = resumed[1].err[0].splitlines()
    assert " waits at 127.0.0.1:" in waits
    assert resumed[1].err[1] == ""
    assert [p.name for p in stopped[0].parent.iterdir()] == ["quickstart-001"]
    assert len(list((stopped[0] / "tensorboard").iterdir())) == 1
    saved = {p.name for p in (resumed[0] / "checkpoints").iterdir()}
    assert saved == {str(len(losses(stopped[0]))), str(STEPS)}


def test_the_mesh_says_that_its_ring_runs_between_the_processes(stopped):
    printed = stopped[1].out[0]
    assert "cp_outer  size 4, between hosts" in printed
    assert "cp_inner  size 2, inside a host" in printed
    assert "crosses hosts" not in stopped[1].err[0]


def test_one_process_goes_on_from_the_checkpoint_of_two(alone, stopped, tmp_path):
    folder = tmp_path / "quickstart-001"
    shutil.copytree(stopped[0], folder)
    assert train(tmp_path, resume=folder) == Outcome(folder, STEPS)
    assert losses(folder) == pytest.approx(alone, abs=2e-5)


def test_one_process_can_restore_what_two_saved_at_the_end(resumed):
    with pytest.raises(ValueError, match=f"has made all its {STEPS} steps"):
        train(resumed[0].parent, resume=resumed[0])
