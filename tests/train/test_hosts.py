"""Two processes of one device each: what each reads, what differs, and a batch that one cannot."""

import json
import subprocess
import sys

import pytest
import yaml

from hcp_jax.commands.launch import _free_port
from hcp_jax.train.hosts.watchdog import GONE
from hcp_jax.train.metrics import metrics
from tests.train.tiny import write_config

pytestmark = pytest.mark.slow

# `hcp`, but what it reads of the corpus is written down, and one process cannot read for ever.
WATCHED = """
import atexit, json, sys
from hcp_jax import cli
from hcp_jax.train.data import Corpus

read, places, documents = Corpus.tokens_at, [], set()
fails_after = int(sys.argv.pop(1))

def tokens_at(self, at):
    if len(places) == fails_after:
        raise OSError(5, "Input/output error", "shard-7.npy")
    places.append(at.size)
    documents.update(self.documents_at(at[at > 0]).tolist())
    return read(self, at)

Corpus.tokens_at = tokens_at
code = cli.main(sys.argv[1:])
print(json.dumps({"places": places, "documents": sorted(documents)}))
sys.exit(code)
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    place = tmp_path_factory.mktemp("config")
    return write_config(place, most_words=3, steps=6, seq_len=64, parallel={"dp": 2})


def pair(config, environment, run_dir, options=((), ()), fails_after=(-1, -1)):
    """[(exit code, standard output, standard error)] of both."""
    address = f"127.0.0.1:{_free_port()}"
    common = ["train", str(config), f"--run_dir={run_dir}", f"--coordinator={address}"]
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, "-c", WATCHED, str(fails_after[i])),
                *(*common, "--num-processes=2", f"--process-id={i}", *options[i]),
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        said = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *texts) for p, texts in zip(processes, said, strict=True)]


def test_each_process_reads_the_documents_of_its_own_rows_and_trains_on_all(
    config, environment, tmp_path
):
    ended = pair(config, environment, tmp_path)
    assert [code for code, _, _ in ended] == [0, 0], ended
    first, second = (json.loads(out.splitlines()[-1]) for _, out, _ in ended)
    # A device holds one of the two rows; a few more batches have been read ahead.
    assert set(first["places"]) == set(second["places"]) == {64}
    assert len(first["places"]) >= 6
    both = set(first["documents"]) & set(second["documents"])
    # Only a document that is cut where a stream ends has tokens in two rows.
    assert len(both) <= 2 * len(first["places"])
    assert len(both) < len(first["documents"]) / 2
    lines = metrics.read(tmp_path / "tiny-001")
    assert [line["tokens"] for line in lines] == [2 * 64] * 6


def test_a_batch_that_one_process_cannot_read_ends_both_with_its_error(
    config, environment, tmp_path
):
    ended = pair(config, environment, tmp_path, fails_after=(-1, 4))
    assert [code for code, _, _ in ended] == [GONE, 70], ended
    for _, _, err in ended:
        assert "process 1 on" in err
        assert "Input/output error" in err
        assert "shard-7.npy" in err


def test_hosts_that_disagree_are_told_what_differs_before_anything_compiles(
    config, environment, tmp_path
):
    ended = pair(config, environment, tmp_path, options=((), ("--steps=7", "--seed=1")))
    for code, out, err in ended:
        assert code in (2, GONE)
        assert "steps is 7 in process 1 on" in err
        assert "seed is 1 in process 1 on" in err
        assert "compiled" not in out
    assert ended[0][0] == 2


def test_hosts_with_different_data_are_told_so(config, environment, tmp_path):
    """The path is the same; what is there is not."""
    other = tmp_path / "text.jsonl"
    place = yaml.safe_load(config.read_text())["data"]["path"]
    with open(place) as text:
        lines = text.readlines()
    other.write_text("".join(lines))
    changed = tmp_path / "tiny.yaml"
    values = yaml.safe_load(config.read_text())
    changed.write_text(yaml.safe_dump(values | {"data": {"path": "text.jsonl"}}))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "text.jsonl").write_text("".join(lines[:-1]))
    code = f"import os, sys; os.chdir([{str(tmp_path)!r}, {str(tmp_path / 'there')!r}][int(sys.argv[1])]);"
    code += " from hcp_jax import cli; sys.exit(cli.main(sys.argv[2:]))"
    address = f"127.0.0.1:{_free_port()}"
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, "-c", code, str(i), "train", str(changed)),
                *(f"--coordinator={address}", "--num-processes=2", f"--process-id={i}"),
            ],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    for process in processes:
        _, err = process.communicate(timeout=300)
        assert process.returncode in (2, GONE)
        assert "the number of documents is 299 in process 1 on" in err
        assert "and 300 in process 0" in err


def test_a_run_goes_on_with_the_same_loss_on_half_and_on_twice_the_devices(
    config, environment, tmp_path
):
    assert [c for c, _, _ in pair(config, environment, tmp_path)] == [0, 0]
    found = {}
    for devices in (1, 2, 4):
        folder = tmp_path / f"on-{devices}"
        subprocess.run(["cp", "-r", str(tmp_path / "tiny-001"), str(folder)], check=True)
        mesh = [f"--parallel.dp={min(devices, 2)}", f"--parallel.cp_outer={max(devices // 2, 1)}"]
        command = [sys.executable, "-m", "hcp_jax.cli", "train", "--resume", str(folder)]
        done = subprocess.run(
            [*command, *mesh, "--steps=10"], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        found[devices] = [line["loss"] for line in metrics.read(folder)]
        assert len(found[devices]) == 10
    assert found[1] == pytest.approx(found[2], abs=2e-5)
    assert found[4] == pytest.approx(found[2], abs=2e-5)
