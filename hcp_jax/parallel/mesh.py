"""Build the device mesh with its named axes, and tell which links each axis uses.

Devices are ordered dp, cp_outer, cp_inner, tp from the slowest to the fastest. So the axes that
communicate most (tp: every layer's products; cp_inner: the all-to-alls) stay inside a host. The
ring of cp_outer crosses hosts; it is hidden behind attention:

    host 0                      host 1
    tp tp | tp tp               tp tp | tp tp
    inner 0  inner 1            inner 0  inner 1
    ------ outer 0 ------       ------ outer 1 ------

In the mesh itself the axes are in the order ("dp", "tp", "cp_outer", "cp_inner"). A pipeline's axis
"pp" stands before them, and is the slowest of all: its stages are on different hosts.
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
    pp: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Return a mesh with axes ("dp", "tp", "cp_outer", "cp_inner"), each of any size; maybe "pp".

    Args:
        dp: data parallelism.
        tp: tensor parallelism: attention heads and weight matrices.
        cp_outer: P, the ring between hosts.
        cp_inner: A, the all-to-all inside a host.
        pp: stages of a pipeline; the mesh has an axis "pp" if there are several.
        devices: devices of the mesh; all of `jax.devices()` if None.

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
    pp = checks.integer("pp", pp, least=1)
    sizes = sizes if pp == 1 else {"pp": pp, **sizes}
    needed = math.prod(sizes.values())
    if needed != len(devices):
        product = " * ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(
            f"the mesh {product} needs {needed} devices, but there are {len(devices)}. Change the "
            "sizes, pass devices=jax.devices()[:n], or simulate more on a CPU with "
            f"jax.config.update('jax_num_cpu_devices', {needed}) before jax starts."
        )
    ordered = sorted(devices, key=lambda d: (d.process_index, d.id))
    grid = np.array(ordered).reshape(pp, dp, cp_outer, cp_inner, tp).transpose(0, 1, 4, 2, 3)
    names = AXES if pp == 1 else ("pp", *AXES)
    mesh = Mesh(grid if pp > 1 else grid[0], names, axis_types=(AxisType.Auto,) * len(names))
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
    """Return the devices that communicate along `axis`: one row per group."""
    dim = mesh.axis_names.index(axis)
    return np.moveaxis(mesh.devices, dim, -1).reshape(-1, mesh.devices.shape[dim])


def axis_link(mesh: Mesh, axis: str) -> str:
    """Return the link that `axis` uses: "no link" (size 1), "inside a host" or "between hosts".

    A host is a JAX slice if JAX knows slices (on GPUs: a machine, or the machines of one NVLink
    domain), else a process. On CPUs it is always a process, so that several processes on one
    machine can simulate several hosts.
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
            `hcp plan --gpu` takes it, such as "h200". Case does not matter.

    Returns:
        Flag names without their dashes, and values; empty for CPUs, TPUs and AMD's GPUs.

    Raises:
        ValueError: for an unknown name.

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
    """Return whether a device kind or short name is an NVIDIA GPU; raise for an unknown device."""
    if not isinstance(device_kind, str):
        raise ValueError(
            f"a device kind is a string, got {device_kind!r}; pass jax.devices()[0].device_kind."
        )
    first, *rest = device_kind.lower().replace("-", " ").split() or [""]
    if first in ("cpu", "tpu", "amd"):
        return False
    # A GPU may be missing from our list, but its driver name always begins with a brand.
    if first in GPU_NAMES or (first in ("nvidia", "tesla", "quadro", "geforce") and rest):
        return True
    near = difflib.get_close_matches(first, (*GPU_NAMES, "cpu"), 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(
        f"unknown device kind {device_kind!r}: {hint}Pass jax.devices()[0].device_kind, such as "
        f"'NVIDIA H200' or 'cpu', or one of {', '.join(GPU_NAMES)}."
    )


def host_of(device: jax.Device) -> tuple[str, int]:
    """Return a key that identifies the host of a device; `axis_link` defines a host."""
    # On GPUs a slice is a host, or the hosts of one NVLink domain, with any number of processes.
    # The devices of a cluster that is only compiled for all have the same slice.
    domain = getattr(device, "slice_index", None)
    if (
        domain is None
        or device.platform == "cpu"
        or device.client.runtime_type == "compile_only_runtime"
    ):
        return ("process", device.process_index)
    return ("domain", domain)


def as_tuple(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the names of one, several or no mesh axes as a tuple.

    >>> as_tuple("dp"), as_tuple(None)
    (('dp',), ())
    """
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else tuple(axes)
