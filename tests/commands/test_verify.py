"""`hcp verify --kernels` where there is no GPU."""

import argparse

import pytest

from hcp_jax.commands import verify


def test_kernels_are_checked_on_a_gpu_only():
    parser = argparse.ArgumentParser()
    verify.add_arguments(parser)
    args = parser.parse_args(["--kernels"])
    assert verify.num_devices(args) == 1
    with pytest.raises(ValueError, match="on a GPU, and this is 'cpu'"):
        verify.run(args)
    with pytest.raises(ValueError, match=r"leave out configs/quickstart\.yaml, or"):
        verify.run(parser.parse_args(["configs/quickstart.yaml", "--kernels"]))
