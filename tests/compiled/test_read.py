"""Reading a program written by hand: what is hidden, what is held, and over which link it moves."""

import types

import numpy as np
import pytest

from hcp_jax import hardware
from hcp_jax.compiled import report
from hcp_jax.cost.models import model_shape
from tests.compiled.test_clock import BYTES, H200, HEAD, done, entry, kernel, start

MEMORY = {
    "argument_size_in_bytes": 100,
    "output_size_in_bytes": 30,
    "alias_size_in_bytes": 20,
    "temp_size_in_bytes": 7,
    "host_argument_size_in_bytes": 5,
    "host_temp_size_in_bytes": 3,
}


def read(text, hosts=2):
    compiled = types.SimpleNamespace(
        as_text=lambda: HEAD + text,
        memory_analysis=lambda: types.SimpleNamespace(**MEMORY),
    )
    devices = [types.SimpleNamespace(process_index=i * (hosts - 1), id=i) for i in range(2)]
    mesh = types.SimpleNamespace(devices=np.array(devices), axis_names=("cp_outer",))
    cluster = hardware.Cluster(H200, hosts, 2 // hosts)
    return report.read(compiled, mesh, cluster)


def test_a_hop_is_hidden_only_behind_attention_that_lasts():
    behind = [kernel("long", 8192), kernel("short", 1024), kernel("other", 8192, scope="mlp")]
    for lines, hidden in zip(behind, (1, 0, 0), strict=True):
        found = read(entry(start("a"), lines, done("a")))
        assert (found.ring_hops, found.ring_hops_hidden) == (1, hidden)
        (moved,) = found.collectives
        assert (moved.what, moved.bytes, moved.axes) == ("ring", BYTES, ("cp_outer",))
        assert moved.hidden == bool(hidden)
        assert moved.behind == (("call",) if hidden else ())


def test_a_pair_of_hosts_is_slower_than_a_pair_of_gpus():
    program = entry(start("a"), done("a"))
    across, inside = (read(program, hosts) for hosts in (2, 1))
    for found, link, rate in (
        (across, "between hosts", H200.network),
        (inside, "inside a host", H200.nvlink),
    ):
        (moved,) = found.collectives
        assert moved.link == link
        assert moved.exposed_s == pytest.approx(rate.latency + BYTES / rate.rate.value)


def test_what_is_alike_is_told_together():
    found = read(entry(start("a"), done("a"), start("b"), done("b")))
    (moved,) = found.collectives
    assert (moved.count, found.ring_hops) == (2, 2)
    assert moved.seconds == pytest.approx(found.communication_s)
    assert found.to_json()["modelled"]["exposed_s"] == pytest.approx(moved.exposed_s)


def test_donated_outputs_take_no_memory_and_what_is_offloaded_takes_the_host_s():
    memory = read(entry(start("a"), done("a"))).memory
    assert memory.peak_bytes == 100 + 30 - 20 + 7
    assert memory.host_bytes == 8
    assert memory.fits


@pytest.mark.parametrize(("share", "fits"), [(0.89, True), (0.91, False)])
def test_a_tenth_of_the_gpu_is_left(share, fits):
    device = H200.memory_bytes
    assert report.Memory(int(share * device), 0, 0, 0, device).fits == fits


def test_the_busiest_device_sets_the_density():
    model, length = model_shape("llama3-8b"), 2**14
    # Zigzag gives each of 8 devices the same half; contiguous gives the last one nearly all.
    zigzag, contiguous = (
        report.busiest_density(model, length, 8, layout, 8) for layout in ("zigzag", "contiguous")
    )
    assert zigzag == pytest.approx(1 / 2, rel=1e-3)
    assert contiguous == pytest.approx(15 / 16, rel=1e-3)
