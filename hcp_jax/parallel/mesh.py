"""The device mesh: four named axes, and what each of them runs over.

Devices are ordered dp, cp_outer, cp_inner, tp from the slowest to the fastest, so that the axes
that talk most (tp: every layer's products; cp_inner: the all-to-alls) stay inside a host, and the
ring of cp_outer, which hides behind attention, is what crosses hosts:

    host 0                      host 1
    tp tp | tp tp               tp tp | tp tp
    inner 0  inner 1            inner 0  inner 1
    ------ outer 0 ------       ------ outer 1 ------

The axes keep their names' order in the mesh, ("dp", "tp", "cp_outer", "cp_inner").
"""

import difflib
import logging
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from hcp_jax.base import checks
from hcp_jax.hardware import GPU_NAMES

AXES = ("dp", "tp", "cp_outer", "cp_inner")

_log = logging.getLogger("hcp_jax")


def make_mesh(
    dp: int = 1,
    tp: int = 1,
    cp_outer: int = 1,
    cp_inner: int = 1,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh with axes ("dp", "tp", "cp_outer", "cp_inner"), each of any size.

    Args:
        dp: data parallelism.
        tp: tensor parallelism: attention heads and weight matrices.
        cp_outer: P, the ring between hosts.
        cp_inner: A, the all-to-all inside a host.
        devices: all of `jax.devices()` if None.

    Returns:
        A mesh whose axes are of type Auto.

    Raises:
        ValueError: if the sizes are not positive or their product is not the number of devices.

    >>> make_mesh(cp_outer=4, cp_inner=2).shape["cp_outer"]
    4
    """
    sizes = {"dp": dp, "tp": tp, "cp_outer": cp_outer, "cp_inner": cp_inner}
    for name, size in sizes.items():
        sizes[name] = checks.integer(name, size, least=1)
    devices = list(jax.devices() if devices is None else devices)
    needed = math.prod(sizes.values())
    if needed != len(devices):
        product = " * ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(
            f"the mesh {product} needs {needed} devices, but there are {len(devices)}. Change the "
            "sizes, pass devices=jax.devices()[:n], or simulate more on a CPU with "
            f"jax.config.update('jax_num_cpu_devices', {needed}) before jax starts."
        )
    ordered = sorted(devices, key=lambda d: (d.process_index, d.id))
    grid = np.array(ordered).reshape(dp, cp_outer, cp_inner, tp).transpose(0, 3, 1, 2)
    mesh = Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    for axis in ("tp", "cp_inner"):
        if axis_link(mesh, axis) == "between hosts":
            _log.warning(
                "%s=%d crosses hosts: its collectives are not hidden and will run at the speed of "
                "the network. Keep tp * cp_inner within the devices of a host.",
                axis,
                sizes[axis],
            )
    return mesh


def axis_groups(mesh: Mesh, axis: str) -> np.ndarray:
    """The devices that talk to each other along `axis`: one row per group."""
    dim = mesh.axis_names.index(axis)
    return np.moveaxis(mesh.devices, dim, -1).reshape(-1, mesh.devices.shape[dim])


def axis_link(mesh: Mesh, axis: str) -> str:
    """What the groups of `axis` talk over: "no link" (size 1), "inside a host" or "between hosts".

    A host is what JAX calls a slice where it knows of slices (GPUs: a machine, or the machines of
    one NVLink domain), else a process; on CPUs always a process, so that several on one machine
    stand for several hosts.
    """
    groups = axis_groups(mesh, axis)
    if groups.shape[1] == 1:
        return "no link"
    crosses = any(len({host_of(device) for device in group}) > 1 for group in groups)
    return "between hosts" if crosses else "inside a host"


def xla_flags(device_kind: str) -> dict[str, bool | int | str]:
    """Return the XLA flags that the library recommends for devices of this kind.

    They must be set before jax starts (in `XLA_FLAGS`, or as `compiler_options` of one `jit`).
    `hcp train` sets them; importing the library never does.

    Args:
        device_kind: `jax.Device.device_kind`, such as "NVIDIA H200"; or a GPU's short name, as
            `hcp plan --gpu` takes it, such as "h200". Upper and lower case are the same.

    Returns:
        Flag names without their dashes, and values; empty for CPUs, TPUs and AMD's GPUs.

    Raises:
        ValueError: for a name that is none of these.

    >>> xla_flags("h200") == xla_flags("NVIDIA H200") != xla_flags("cpu") == {}
    True
    """
    if not _is_nvidia(device_kind):
        return {}
    return {
        # Schedules a collective's start early and its end late, with compute between.
        "xla_gpu_enable_latency_hiding_scheduler": True,
        # K, V and their gradients travel at the same time.
        "xla_gpu_experimental_parallel_collective_overlap_limit": 4,
    }


def _is_nvidia(device_kind: str) -> bool:
    """Return whether a device kind or short name is an NVIDIA GPU; refuse what is no device."""
    if not isinstance(device_kind, str):
        raise ValueError(
            f"a device kind is a string, got {device_kind!r}; pass jax.devices()[0].device_kind."
        )
    first, *rest = device_kind.lower().replace("-", " ").split() or [""]
    if first in ("cpu", "tpu", "amd"):
        return False
    # Drivers name GPUs that no list here knows, always after a brand.
    if first in GPU_NAMES or (first in ("nvidia", "tesla", "quadro", "geforce") and rest):
        return True
    near = difflib.get_close_matches(first, (*GPU_NAMES, "cpu"), 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(
        f"unknown device kind {device_kind!r}: {hint}Pass jax.devices()[0].device_kind, such as "
        f"'NVIDIA H200' or 'cpu', or one of {', '.join(GPU_NAMES)}."
    )


def host_of(device: jax.Device) -> tuple[str, int]:
    """What tells the host of a device from others; see `axis_link` for what a host is."""
    # On GPUs a slice is a host, or the hosts of one NVLink domain, however many processes run
    # there. Devices of a cluster that is only compiled for are all of one slice.
    domain = getattr(device, "slice_index", None)
    if (
        domain is None
        or device.platform == "cpu"
        or device.client.runtime_type == "compile_only_runtime"
    ):
        return ("process", device.process_index)
    return ("domain", domain)


def as_tuple(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The names of one mesh axis, of several or of none.

    >>> as_tuple("dp"), as_tuple(None)
    (('dp',), ())
    """
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else tuple(axes)
