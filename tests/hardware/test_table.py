"""The table of GPUs: every rate says where it comes from, and names are found or refused."""

import subprocess
import sys

import pytest

from hcp_jax import hardware
from hcp_jax.hardware import GPUS, PEAK_FLOPS


@pytest.mark.parametrize("name", GPUS)
def test_every_rate_names_its_source_and_says_whether_it_was_measured(name):
    gpu = GPUS[name]
    rates = [gpu.product_rate, gpu.nvlink.rate, gpu.network.rate, *gpu.attention_rates.values()]
    for rate in rates:
        assert rate.source
        assert rate.measured != rate.source.startswith("modelled") or "blockwise" in rate.source


@pytest.mark.parametrize("name", GPUS)
def test_what_runs_is_slower_than_what_the_data_sheet_promises(name):
    gpu = GPUS[name]
    assert 0 < gpu.product_rate.value < gpu.peak_flops
    # No attention kernel is faster than the products that it is made of.
    assert all(0 < r.value < gpu.product_rate.value for r in gpu.attention_rates.values())
    assert gpu.nvlink.rate.value <= gpu.nvlink.peak
    assert gpu.network.rate.value <= gpu.network.peak < gpu.nvlink.peak


def test_the_three_figures_of_an_h200_are_told_apart():
    h200 = hardware.gpu("h200")
    assert h200.peak_flops == 989e12
    assert (h200.product_rate.value, h200.product_rate.measured) == (790e12, True)
    assert h200.attention_rate("triton", "forward").value == pytest.approx(361e12)
    assert h200.attention_rate("triton", "backward").value == pytest.approx(338e12)
    assert hardware.gpu("h100").attention_rate("mosaic", "forward").measured


def test_another_gpu_s_kernels_reach_the_same_share_of_its_peak():
    b200, h100 = hardware.gpu("b200"), hardware.gpu("h100")
    for key, rate in h100.attention_rates.items():
        share = b200.attention_rates[key].value / b200.peak_flops
        assert share == pytest.approx(rate.value / h100.peak_flops)


@pytest.mark.parametrize("name", GPUS)
def test_a_gpu_goes_by_its_short_name_and_by_its_device_kind_in_any_case(name):
    gpu = GPUS[name]
    assert hardware.gpu(name.upper()) is hardware.gpu(gpu.device_kind.lower()) is gpu
    assert PEAK_FLOPS[gpu.device_kind] == gpu.peak_flops


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h20o", "did you mean 'h200'"),
        ("NVIDIA H100 80GB", "did you mean 'NVIDIA H100 80GB HBM3'"),
        ("tpu", "unknown GPU 'tpu': there are a100"),
        ("", "unknown GPU"),
        ("NVIDIA H100 PCIe", "only the peak FLOP/s are known: there are .* YAML"),
    ],
)
def test_an_unknown_gpu_is_an_error_that_helps(name, message):
    with pytest.raises(ValueError, match=message):
        hardware.gpu(name)


def test_an_implementation_without_a_rate_is_an_error_that_names_those_with_one():
    with pytest.raises(ValueError, match="there are rates of blockwise, mosaic, triton"):
        hardware.gpu("h100").attention_rate("cudnn", "forward")


def test_the_table_needs_neither_jax_nor_numpy():
    code = "import sys, hcp_jax.hardware; sys.exit(bool({'jax', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
