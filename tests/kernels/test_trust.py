"""Which kernels are taken on a GPU where none are named, before and after their check."""

import json
import subprocess

import pytest

from hcp_jax.kernels import core, expert_product, trust, user_cache
from hcp_jax.kernels.trust import Verdict

HOPPER = "NVIDIA H200"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(user_cache, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.delenv(trust.VARIABLE)
    trust.why_not.cache_clear()
    yield tmp_path / "cache"
    trust.why_not.cache_clear()


def best(device_kind: str, dtype: str = "bfloat16") -> str:
    return core.resolve(None, core.Problem(dtype, 8, 2, 128, 128, "gpu", device_kind))


def product(dtype: str = "bfloat16") -> str:
    return expert_product.resolve(None, dtype, "gpu", HOPPER).implementation


def keep(kernels: str, verdict: Verdict) -> None:
    user_cache.write(trust.FILE, user_cache.key(kernels, HOPPER), list(verdict))


def printing(monkeypatch, *, stdout: str = "", stderr: str = "", code: int = 0) -> list[list[str]]:
    """Answer in place of the checking process; return the commands that were started."""
    started = []

    def run(command, **options):
        started.append(command)
        return subprocess.CompletedProcess(command, code, stdout, stderr)

    monkeypatch.setattr(trust.subprocess, "run", run)
    return started


def verdict_line(passed: bool, reason: str = "because") -> str:
    return "a finding\n" + json.dumps({"passed": passed, "reason": reason}) + "\n"


def test_kernels_that_passed_on_this_gpu_are_taken_and_checked_once(cache, monkeypatch):
    monkeypatch.setattr(user_cache, "is_here", lambda kind: kind == HOPPER)
    started = printing(monkeypatch, stdout=verdict_line(True))
    assert best(HOPPER) == "mosaic"
    trust.why_not.cache_clear()  # as in a new process
    assert best(HOPPER) == "mosaic"
    assert len(started) == 1
    # Not for calls that these kernels do not support, nor on GPUs that they do not run on.
    assert best(HOPPER, "float32") == "triton"
    assert best("NVIDIA A100-SXM4-80GB") == "triton"
    assert len(started) == 1
    # Products of experts have a check of their own, for every dtype.
    assert product() == product("float32") == "triton"
    assert product("float64") == "ragged_dot"
    assert [command[-1] for command in started] == ["mosaic", "expert_product"]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"stdout": verdict_line(False, "dk of causal differs")}, "dk of causal differs"),
        (
            {"stdout": "a finding\n", "stderr": "x\nCUDA_ERROR_ILLEGAL_ADDRESS", "code": -6},
            "ILLEGAL",
        ),
        ({}, "ended with code 0"),
        ({"stdout": '{"passed": "yes"}'}, "ended with code 0"),
    ],
)
def test_kernels_that_fail_or_crash_are_not_taken_and_that_is_told(
    cache, monkeypatch, caplog, answer, reason
):
    monkeypatch.setattr(user_cache, "is_here", lambda kind: True)
    printing(monkeypatch, **answer)
    with caplog.at_level("INFO", "hcp_jax"):
        assert best(HOPPER) == "triton"
        assert product() == "ragged_dot"
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == 2
    assert all(reason in text and "hcp verify --kernels" in text for text in warned)
    assert "model.moe.product=triton" in warned[1]
    assert reason in expert_product.describe(None, "bfloat16", "gpu", HOPPER)
    assert reason not in expert_product.describe("ragged_dot", "bfloat16", "gpu", HOPPER)


def test_nothing_is_checked_for_gpus_that_are_not_here(cache, monkeypatch):
    started = printing(monkeypatch, stdout=verdict_line(True))
    assert best(HOPPER) == "triton"
    assert product() == "ragged_dot"
    assert not started


def test_several_processes_choose_alike_whatever_their_hosts_have_kept(cache, monkeypatch, caplog):
    keep("mosaic", Verdict(True, ""))
    keep("expert_product", Verdict(True, ""))
    assert (best(HOPPER), product()) == ("mosaic", "triton")
    trust.why_not.cache_clear()
    monkeypatch.setattr(trust.jax, "process_count", lambda: 2)
    with caplog.at_level("INFO", "hcp_jax"):
        assert (best(HOPPER), product()) == ("triton", "ragged_dot")
    assert "model.implementation=mosaic" in caplog.text
    assert "model.moe.product=triton" in caplog.text


def test_another_source_of_the_kernels_needs_another_check(cache, monkeypatch):
    keep("mosaic", Verdict(True, ""))
    monkeypatch.setattr(user_cache, "sources", lambda: "others")
    assert trust.kept("mosaic", HOPPER) is None


@pytest.mark.parametrize("text", ["", "[1]", '{"mosaic": 1', "null"])
def test_a_file_that_is_not_whole_holds_no_verdict(cache, text):
    cache.mkdir()
    (cache / "kernels.json").write_text(text)
    assert trust.kept("mosaic", HOPPER) is None
    keep("mosaic", Verdict(True, "seen"))
    assert trust.kept("mosaic", HOPPER) == Verdict(True, "seen")


def test_a_check_that_does_not_end_counts_as_failed(cache, monkeypatch):
    def run(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(trust.subprocess, "run", run)
    assert not trust.check("mosaic", HOPPER).passed
    assert not trust.kept("mosaic", HOPPER).passed


def test_without_a_gpu_the_checking_process_says_so(cache):
    assert trust.check("triton", "cpu") == Verdict(False, "there is no GPU here")


def test_it_can_be_turned_off(cache, monkeypatch):
    keep("mosaic", Verdict(True, ""))
    keep("expert_product", Verdict(True, ""))
    monkeypatch.setenv(trust.VARIABLE, "off")
    assert (best(HOPPER), product()) == ("triton", "ragged_dot")
