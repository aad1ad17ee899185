"""GPUs described in YAML files."""

import pytest

from hcp_jax import hardware
from hcp_jax.compiled.aot import target_config


def written(path, text):
    file = path / "gpu.yaml"
    file.write_text(text)
    return str(file)


def test_a_gpu_described_in_yaml_takes_the_rest_from_what_it_is_like(tmp_path):
    text = "{name: h20, like: h100, core_count: 78, peak_flops: 148e12, network: {peak: 25e9}}"
    h20, h100 = hardware.gpu(written(tmp_path, text)), hardware.gpu("h100")
    assert (h20.name, h20.core_count, h20.memory_bytes) == ("h20", 78, h100.memory_bytes)
    assert h20.network.peak == 25e9
    share = h20.peak_flops / h100.peak_flops
    assert h20.product_rate.value == pytest.approx(share * h100.product_rate.value)
    rate = h20.attention_rate("triton", "forward")
    assert rate.value == pytest.approx(share * h100.attention_rate("triton", "forward").value)
    assert not rate.measured
    assert "core_count: 78" in target_config(h20)


def test_what_is_given_is_taken_as_it_is(tmp_path):
    text = (
        "{name: x, compute_capability: 12.1, product_rate: 3e14, nvlink_domain: 0, "
        "nvlink: {peak: 1e11, latency: 0, name: bridge}, sources: {product_rate: a bench}}"
    )
    x = hardware.gpu(written(tmp_path, text))
    assert (x.compute_capability, x.product_rate.value) == ((12, 1), 3e14)
    assert x.product_rate.measured
    assert (x.nvlink.latency, x.nvlink.name, x.sources["product_rate"]) == (
        0.0,
        "bridge",
        "a bench",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{name: x, cores: 3}", "unknown fields"),
        ("{name: x, 3: 4}", "must be a word"),
        ("{like: h100}", "no field `name`"),
        ("{name: 3}", "name must be a text"),
        ("{name: x, like: h1}", "`like` must be one of"),
        ("{name: x, like: [h100]}", "`like` must be one of"),
        ("{name: x, core_count: many}", "core_count must be a number"),
        ("{name: x, core_count: 1.5}", "core_count must be a whole number"),
        ("{name: x, core_count: true}", "core_count must be a number"),
        ("{name: x, peak_flops: 0}", "peak_flops must be a number greater than 0"),
        ("{name: x, memory_bandwidth: -1}", "greater than 0"),
        ("{name: x, compute_capability: new}", "major and a minor"),
        ("{name: x, compute_capability: [9]}", "major and a minor"),
        ("{name: x, network: 25e9}", "needs peak"),
        ("{name: x, network: {peak: 1e9, latency: soon}}", "latency must be a number"),
        ("{name: x, sources: me}", "sources must map"),
        ("[1, 2]", "fields of a GPU"),
        ("{", "cannot read"),
    ],
)
def test_a_wrong_description_says_what_is_wrong(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        hardware.gpu(written(tmp_path, text))


def test_a_file_that_is_missing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="cannot read the GPU's description"):
        hardware.gpu(str(tmp_path / "none.yaml"))
