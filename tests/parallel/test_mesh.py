"""The mesh: tp and cp_inner side by side, any sizes, clear refusals."""

import dataclasses
import types

import jax
import pytest

import hcp_jax as hcp
from hcp_jax.hardware import GPUS, PEAK_FLOPS
from hcp_jax.parallel.mesh import AXES, axis_groups, axis_link


def test_tp_is_innermost_then_cp_inner_then_cp_outer_then_dp():
    mesh = hcp.make_mesh(dp=1, tp=2, cp_outer=2, cp_inner=2)
    ids = {axis: [[d.id for d in g] for g in axis_groups(mesh, axis)] for axis in AXES}
    assert ids["tp"] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert ids["cp_inner"] == [[0, 2], [4, 6], [1, 3], [5, 7]]
    assert ids["cp_outer"] == [[0, 4], [2, 6], [1, 5], [3, 7]]


def test_stages_of_a_pipeline_are_outside_of_all_other_axes():
    mesh = hcp.make_mesh(pp=2, cp_outer=2, cp_inner=2)
    assert mesh.axis_names == ("pp", *AXES)
    assert [[d.id for d in group] for group in axis_groups(mesh, "pp")] == [
        [0, 4],
        [1, 5],
        [2, 6],
        [3, 7],
    ]
    assert hcp.ContextParallel(mesh).size == 4
    with pytest.raises(ValueError, match=r"pp=2 \* dp=1.*needs 2 devices, but there are 8"):
        hcp.make_mesh(pp=2)


def test_axes_are_auto_whatever_jax_makes_by_default():
    assert set(hcp.make_mesh(cp_outer=8).axis_types) == {jax.sharding.AxisType.Auto}


def test_sizes_need_not_be_powers_of_two():
    assert hcp.make_mesh(cp_outer=3, cp_inner=2, devices=jax.devices()[:6]).size == 6


def test_an_axis_of_one_device_has_no_link():
    mesh = hcp.make_mesh(cp_outer=8)
    assert axis_link(mesh, "tp") == "no link"
    assert axis_link(mesh, "cp_outer") == "inside a host"


@dataclasses.dataclass(frozen=True)
class Device:
    """As much of a `jax.Device` as a mesh is made of."""

    id: int
    process_index: int
    slice_index: int
    platform: str = "gpu"
    client = types.SimpleNamespace(runtime_type="pjrt_ifrt")


def two_processes(of_one_slice=False, platform="gpu"):
    """Four devices in each; ids of the second begin anew far away, as jax gives them on CPUs."""
    return [
        Device(2048 * p + i, p, 0 if of_one_slice else p, platform)
        for p in (1, 0)
        for i in range(4)
    ]


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_the_ring_runs_between_hosts_and_the_all_to_all_inside(platform, caplog):
    mesh = hcp.make_mesh(cp_outer=4, cp_inner=2, devices=two_processes(platform=platform))
    assert axis_link(mesh, "cp_outer") == "between hosts"
    assert axis_link(mesh, "cp_inner") == "inside a host"
    assert not caplog.records


@pytest.mark.parametrize("axis", ["cp_inner", "tp"])
def test_an_axis_that_should_stay_inside_a_host_and_crosses_is_warned_of(axis, caplog):
    mesh = hcp.make_mesh(**{axis: 8}, devices=two_processes())
    assert axis_link(mesh, axis) == "between hosts"
    (record,) = caplog.records
    assert f"{axis}=8 crosses hosts" in record.getMessage()


def test_gpus_of_one_slice_are_one_host_however_many_processes_drive_them(caplog):
    mesh = hcp.make_mesh(cp_inner=8, devices=two_processes(of_one_slice=True))
    assert axis_link(mesh, "cp_inner") == "inside a host"
    assert not caplog.records


def test_processes_on_cpus_stand_for_hosts_though_one_machine_runs_them():
    devices = two_processes(of_one_slice=True, platform="cpu")
    mesh = hcp.make_mesh(cp_outer=2, cp_inner=4, devices=devices)
    assert axis_link(mesh, "cp_outer") == "between hosts"
    assert axis_link(mesh, "cp_inner") == "inside a host"


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"cp_outer": 3}, r"cp_outer=3 \* cp_inner=1 needs 3 devices, but there are 8"),
        ({"tp": 0}, "tp must be a positive integer, got 0"),
        ({"dp": 2.0}, "dp must be a positive integer, got 2.0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        hcp.make_mesh(**sizes)


def test_flags_are_recommended_for_gpus_by_any_of_their_names_and_for_nothing_else():
    flags = hcp.xla_flags("NVIDIA H200")
    assert flags["xla_gpu_enable_latency_hiding_scheduler"] is True
    kinds = [
        "NVIDIA H100 80GB HBM3",
        "Tesla V100-SXM2-16GB",
        "nvidia a10",
        "H200",
        "A100-PCIE-40GB",
    ]
    names = [name for gpu in GPUS.values() for name in (gpu.name, gpu.device_kind)]
    for kind in [*kinds, *names, *PEAK_FLOPS]:
        assert hcp.xla_flags(kind) == flags, kind
    for kind in ("cpu", "CPU", "TPU v5 lite", "AMD Instinct MI300X"):
        assert hcp.xla_flags(kind) == {}, kind


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("h20O", "unknown device kind 'h20O': did you mean 'h20'"),
        ("hopper", "unknown device kind 'hopper': .* or one of a10, a100, .*h200"),
        ("", "unknown device kind ''"),
        ("NVIDIA", "unknown device kind 'NVIDIA'"),
        (None, r"a device kind is a string, got None; pass jax.devices\(\)\[0\].device_kind"),
    ],
)
def test_flags_for_an_unknown_device_are_refused(kind, message):
    """Once they were silently empty: the collectives then stood exposed."""
    with pytest.raises(ValueError, match=message):
        hcp.xla_flags(kind)
