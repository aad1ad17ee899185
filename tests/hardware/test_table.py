"""GPUs and clusters as data."""

import pytest

from hcp_jax import hardware
from hcp_jax.datasheet import peak_flops
from hcp_jax.hardware import GPUS, Cluster


def written(path, text):
    file = path / "gpu.yaml"
    file.write_text(text)
    return str(file)


@pytest.mark.parametrize("name", GPUS)
def test_every_rate_names_its_source_and_says_whether_it_was_measured(name):
    gpu = GPUS[name]
    rates = [gpu.matmul, gpu.nvlink.rate, gpu.network.rate, *gpu.attention.values()]
    for rate in rates:
        assert rate.source
        assert rate.measured != rate.source.startswith("modelled") or "blockwise" in rate.source
        assert rate.value > 0


@pytest.mark.parametrize("name", GPUS)
def test_the_trainer_measures_against_the_same_data_sheet(name):
    assert peak_flops(GPUS[name].device_kind) == GPUS[name].peak_flops


@pytest.mark.parametrize("name", GPUS)
def test_nothing_runs_faster_than_its_data_sheet(name):
    gpu = GPUS[name]
    assert gpu.matmul.value < gpu.peak_flops
    assert all(rate.value < gpu.peak_flops for rate in gpu.attention.values())
    assert gpu.nvlink.rate.value <= gpu.nvlink.peak
    assert gpu.network.rate.value <= gpu.network.peak < gpu.nvlink.peak


def test_a_gpu_described_in_yaml_takes_the_rest_from_what_it_is_like(tmp_path):
    text = "{name: h20, like: h100, core_count: 78, peak_flops: 148e12, network: {peak: 25e9}}"
    h20, h100 = hardware.gpu(written(tmp_path, text)), hardware.gpu("h100")
    assert (h20.name, h20.core_count, h20.memory_bytes) == ("h20", 78, h100.memory_bytes)
    assert h20.network.peak == 25e9
    share = h100.attention_rate("triton", "forward").value / h100.peak_flops
    rate = h20.attention_rate("triton", "forward")
    assert rate.value / h20.peak_flops == pytest.approx(share)
    assert not rate.measured
    assert "core_count: 78" in hardware.target_config(h20)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{name: x, cores: 3}", "unknown fields"),
        ("{like: h100}", "no field `name`"),
        ("{name: x, like: h1}", "like"),
        ("{name: x, core_count: many}", "core_count must be a number"),
        ("{name: x, network: 25e9}", "needs peak"),
        ("[1, 2]", "fields of a GPU"),
        ("{", "cannot read"),
    ],
)
def test_a_wrong_description_says_what_is_wrong(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        hardware.gpu(written(tmp_path, text))


def test_an_unknown_gpu_is_an_error_that_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'h200'"):
        hardware.gpu("h20o")


@pytest.mark.parametrize("sizes", [(0, 8), (1, -1), (1.5, 8)])
def test_a_cluster_needs_whole_hosts(sizes):
    with pytest.raises(ValueError, match="must be a positive integer"):
        Cluster(hardware.gpu("h100"), *sizes)


def test_an_nvlink_domain_may_be_larger_than_a_host():
    cluster = Cluster(hardware.gpu("gb200"), 18, 4)
    assert cluster.path("all-to-all", tuple(range(72))).link == hardware.INSIDE
    cluster = Cluster(hardware.gpu("gb200"), 36, 4)
    assert cluster.path("all-to-all", (71, 72)).link == hardware.BETWEEN
