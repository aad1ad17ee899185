"""`hcp verify --kernels`, where there is no GPU and with a made-up one."""

import argparse
import types

import jax
import pytest

from hcp_jax.commands import verify
from hcp_jax.kernels import trust


def test_kernels_are_checked_on_a_gpu_only():
    parser = argparse.ArgumentParser()
    verify.add_arguments(parser)
    args = parser.parse_args(["--kernels"])
    assert verify.num_devices(args) == 1
    with pytest.raises(ValueError, match="on a GPU, and this is 'cpu'"):
        verify.run(args)
    with pytest.raises(ValueError, match=r"leave out configs/quickstart\.yaml, or"):
        verify.run(parser.parse_args(["configs/quickstart.yaml", "--kernels"]))


def test_kernels_of_attention_and_of_experts_are_checked(monkeypatch, capsys):
    gpu = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")
    monkeypatch.setattr(jax, "devices", lambda: [gpu])

    def check(kernels, device_kind):
        return trust.Verdict(kernels != "expert_product", f"seen on {device_kind}")

    monkeypatch.setattr(trust, "check", check)
    parser = argparse.ArgumentParser()
    verify.add_arguments(parser)
    assert verify.run(parser.parse_args(["--kernels"])) == 1
    assert capsys.readouterr().out.splitlines() == [
        "mosaic: ok: seen on NVIDIA H200",
        "triton: ok: seen on NVIDIA H200",
        "expert_product: FAILED: seen on NVIDIA H200",
    ]
