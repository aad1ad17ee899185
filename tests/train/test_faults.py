"""Faults of a run of one process: killed at random moments, again and again; a full disk."""

import contextlib
import json
import multiprocessing
import os
import pathlib
import random
import sys
import time

import pytest

from hcp_jax.train.metrics import metrics
from tests.train.tiny import write_config

pytestmark = pytest.mark.slow

KILLS = 10
STEPS = 400


def hcp(arguments, log):
    """The command, in a process that has imported all it needs but has not begun to use jax."""
    from hcp_jax import cli

    with pathlib.Path(log).open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.exit(cli.main(arguments))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts `hcp train` in a folder: an import of jax is shared, a compiled step as well."""
    cache = tmp_path_factory.mktemp("cache")
    before = dict(os.environ)
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_NUM_CPU_DEVICES": "1",
    }
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hcp_jax.commands.train", __name__])

    def start(config, folder):
        arguments = ["train", str(config), f"--folder={folder}"]
        process = context.Process(target=hcp, args=(arguments, folder.with_suffix(".log")))
        process.start()
        return process

    yield start
    os.environ.clear()
    os.environ |= before


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_config(
        tmp_path_factory.mktemp("config"),
        steps=STEPS,
        checkpoint={"every": 6, "keep": 2},
        log={"every": 1000, "tensorboard": False},
    )


@pytest.fixture(scope="module")
def whole(start, config, tmp_path_factory):
    """The run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    process = start(config, folder)
    process.join(300)
    assert process.exitcode == 0, folder.with_suffix(".log").read_text()
    return folder


def curve(folder):
    """All of a run's numbers that are not times, as they are written."""
    names = ("step", "loss", "grad_norm", "learning_rate", "tokens", "skipped")
    return [json.dumps({name: line[name] for name in names}) for line in metrics.read(folder)]


def recorded(folder):
    with contextlib.suppress(FileNotFoundError):
        return (folder / "metrics.jsonl").read_bytes().count(b"\n")
    return 0


def test_a_run_that_is_killed_ten_times_has_the_curve_of_one_that_is_not_bit_for_bit(
    start, config, whole, tmp_path
):
    rng, folder, kills = random.Random(0), tmp_path / "run", 0
    saved = []
    while kills < KILLS:
        process = start(config, folder)
        if kills % 5 == 4:
            # As it starts: while it reads, restores or compiles.
            time.sleep(rng.uniform(0.1, 1.2))
        else:
            # As it runs: between steps, while it writes a record, while it saves.
            enough = recorded(folder) + rng.randint(1, 9)
            deadline = time.monotonic() + 120
            while process.exitcode is None and recorded(folder) < enough:
                assert time.monotonic() < deadline, folder.with_suffix(".log").read_text()
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.02))
        process.kill()
        process.join()
        assert process.exitcode == -9, "it ended before it was killed: make STEPS more"
        kills += 1
        whole_ones = [int(p.name) for p in (folder / "checkpoints").glob("*") if p.name.isdigit()]
        saved.append(max(whole_ones, default=0))
    # Nothing but work since a checkpoint was lost, and it was never further back than before.
    assert saved == sorted(saved)
    process = start(config, folder)
    process.join(300)
    assert process.exitcode == 0, folder.with_suffix(".log").read_text()
    assert curve(folder) == curve(whole)
    assert len(curve(folder)) == STEPS


def test_a_run_that_is_done_is_told_so_and_not_made_again(start, config, whole):
    before = (whole / "metrics.jsonl").read_bytes()
    process = start(config, whole)
    process.join(120)
    assert process.exitcode == 0
    assert "has made all its" in whole.with_suffix(".log").read_text()
    assert (whole / "metrics.jsonl").read_bytes() == before
