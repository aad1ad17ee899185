"""`hcp launch`: real processes, of which one is killed, told to stop, or cannot read its data."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml

from hcp_jax import cli
from hcp_jax.commands import launch
from hcp_jax.train.metrics import metrics
from tests.train.tiny import write_config

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
STEPS = 30
SECONDS = 300


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_config(
        tmp_path_factory.mktemp("config"),
        steps=STEPS,
        parallel={"cp_outer": 2, "comm_type": "p2p"},
        checkpoint={"every": 4},
    )


class Launched:
    def __init__(self, config, environment, run_dir, *options):
        self.folder = run_dir / "tiny-001"
        command = [sys.executable, "-m", "hcp_jax.cli", "launch", str(config)]
        command += ["--num-processes=2", "--devices-per-process=1", f"--run_dir={run_dir}"]
        self.process = subprocess.Popen(
            [*command, *options],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.terminate()
            self.process.communicate(timeout=60)

    def after(self, step):
        """Waits until a step has been recorded."""
        deadline = time.monotonic() + SECONDS
        while self.process.poll() is None and time.monotonic() < deadline:
            if any(line["step"] >= step for line in metrics.read(self.folder)):
                return
            time.sleep(0.02)
        pytest.fail(f"no step {step}: {self.process.communicate(timeout=60)}")

    def process_ids(self):
        """Of the processes, by their numbers."""
        listed = subprocess.run(
            ["ps", "-ww", "--ppid", str(self.process.pid), "-o", "pid=,args="],
            capture_output=True,
            text=True,
            check=True,
        )
        found = [line.split(maxsplit=1) for line in listed.stdout.splitlines()]
        return {
            int(args.rpartition("--process-id=")[2]): int(pid)
            for pid, args in found
            if "--process-id=" in args
        }

    def ended(self):
        out, err = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, out, err


def losses(folder):
    return {line["step"]: line["loss"] for line in metrics.read(folder)}


@pytest.mark.slow
def test_a_killed_process_is_named_and_all_are_started_again_from_the_last_checkpoint(
    config, environment, tmp_path
):
    with Launched(config, environment, tmp_path, "--restarts=1") as launched:
        launched.after(8)
        before = launched.process_ids()
        os.kill(before[1], signal.SIGKILL)
        launched.after(STEPS - 1)
        code, out, err = launched.ended()
    assert code == 0, (out, err)
    assert "hcp: process 1 on " in err
    assert " died; so process 0 on " in err
    assert "hcp launch: process 1 was killed by SIGKILL; starting again, 0 left" in err
    assert list(losses(launched.folder)) == list(range(STEPS))
    # What the second start did again came to the same losses.
    told = [line.split() for line in out.splitlines() if line.startswith("step ")]
    of_step = {}
    for words in told:
        if "loss" in words:
            of_step.setdefault(int(words[1]), set()).add(words[words.index("loss") + 1])
    assert all(len(of) == 1 for of in of_step.values())


@pytest.mark.slow
def test_sigterm_saves_and_is_no_failure_and_a_dead_process_without_restarts_is(
    config, environment, tmp_path
):
    with Launched(config, environment, tmp_path, "--steps=2000") as launched:
        launched.after(3)
        launched.process.send_signal(signal.SIGTERM)
        code, out, err = launched.ended()
    assert code == 0, (out, err)
    done = len(losses(launched.folder))
    assert f"Stopped after step {done} of 2000. Go on with:" in out
    assert (launched.folder / "checkpoints" / str(done)).is_dir()

    again = ("--steps=2000", f"--resume={launched.folder}")
    with Launched(config, environment, tmp_path, *again) as launched:
        launched.after(done)
        began = time.monotonic()
        os.kill(launched.process_ids()[0], signal.SIGKILL)
        code, out, err = launched.ended()
    assert code == 128 + signal.SIGKILL
    assert time.monotonic() - began < 60
    assert "hcp launch: process 0 was killed by SIGKILL" in err
    assert "[1] hcp: process 0 on " in err


def test_lines_of_other_processes_have_their_number(capfd):
    code = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    commands = [[sys.executable, "-c", code]] * 2
    with launch._Processes(commands, [{}, {}]) as processes:
        end = processes.wait()
    assert end.codes == {0: 3, 1: 3}
    assert end.describe() == "process 0 ended with exit code 3, process 1 ended with exit code 3"
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == ["[1] out", "out"]
    assert sorted(err.splitlines()) == ["[1] err", "err"]


def test_processes_that_do_not_end_after_another_died_are_killed(monkeypatch):
    monkeypatch.setattr(launch, "GRACE", 0.2)
    commands = [
        [sys.executable, "-c", code]
        for code in ("raise SystemExit(5)", "import time; time.sleep(60)")
    ]
    with launch._Processes(commands, [{}, {}]) as processes:
        end = processes.wait()
    assert end.codes == {0: 5, 1: -signal.SIGKILL}
    assert end.describe() == "process 0 ended with exit code 5"
    assert end.code == 5


def test_a_process_that_ended_because_of_another_one_is_not_the_cause():
    end = launch.End({0: 75, 1: -9, 2: 75}, set(), None)
    assert end.describe() == "process 1 was killed by SIGKILL"
    assert end.code == 137


def test_gpus_are_shared_out_by_the_names_they_have(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,GPU-abc,7")
    assert launch._gpus() == ["4", "5", "GPU-abc", "7"]


@pytest.mark.parametrize("name", ["slurm.sh", "kubernetes.yaml"])
def test_what_clusters_are_given_calls_options_that_there_are(name, capsys):
    text = (CONFIGS / "launch" / name).read_text()
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    help_text = capsys.readouterr().out
    code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    start = code.index("train", code.index("hcp"))
    options = re.findall(r"--[a-z][a-z-]+", code[start:])
    assert "--distributed" in options
    for option in options:
        assert option in help_text, option


def test_the_slurm_script_is_a_script():
    script = CONFIGS / "launch" / "slurm.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert script.read_text().startswith("#!")


def test_the_kubernetes_manifest_is_a_service_and_an_indexed_job_with_its_name():
    service, job = yaml.safe_load_all((CONFIGS / "launch" / "kubernetes.yaml").read_text())
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    assert service["spec"]["clusterIP"] == "None"
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["parallelism"] == job["spec"]["completions"]
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"]["job-name"] == job["metadata"]["name"]
