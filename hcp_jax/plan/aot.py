"""Compile for a cluster that is not here: its devices, and its programs from shapes alone.

    hcp.set_up_platform()  # before jax starts
    cluster = Cluster(hardware.gpu("h200"), hosts=8, gpus_per_host=8)
    mesh = hcp.make_mesh(cp_outer=8, cp_inner=8, devices=devices(cluster))
    q = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=...)      # on that mesh
    compiled = compile_for(f, q, flags=hcp.xla_flags("NVIDIA H200"))

No array is made and no GPU is asked for: the CUDA plugin's wheels hold the whole compiler, Pallas
kernels included. What comes back is the very program that the cluster would run, so its memory, its
collectives and their schedule are facts (`audit.py` reads them).
"""

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.experimental import topologies

from hcp_jax import host_memory
from hcp_jax.plan.hardware import Cluster, target_config

_PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")


def devices(cluster: Cluster) -> list[jax.Device]:
    """Return the devices of a cluster, to make a mesh of; they hold no arrays and run nothing.

    Args:
        cluster: any number of hosts and of GPUs in each.

    Returns:
        Host by host; `process_index` tells the host.

    Raises:
        NotImplementedError: if the CUDA compiler is not installed, or jax has started without it;
            says what to do.
    """
    if not any(_installed(plugin) for plugin in _PLUGINS):
        raise NotImplementedError(
            "compiling for GPUs needs the CUDA plugin of jax (no GPU and no CUDA libraries): "
            "pip install 'hcp_jax[aot]'"
        )
    try:
        topology = topologies.get_topology_desc(
            platform="cuda",
            topology_name=cluster.gpu.name,
            target_config=target_config(cluster.gpu),
            topology=f"1x{cluster.hosts}x{cluster.gpus_per_host}",
        )
    except NotImplementedError as error:  # the plugin looked for a GPU, and gave up
        raise NotImplementedError(
            "jax started with its CUDA plugin, which found no GPU and left: call "
            "hcp.set_up_platform() before anything else of jax, or set JAX_PLATFORMS=cpu."
        ) from error
    return list(topology.devices)


def compile_for(
    f: Callable,
    *shapes: Any,
    flags: Mapping[str, bool | int | str] | None = None,
    donate: tuple[int, ...] = (),
) -> jax.stages.Compiled:
    """Compile a function for the devices that its arguments' shardings name.

    Args:
        f: a function, or one that `jax.jit` has wrapped already.
        *shapes: its arguments: pytrees of `jax.ShapeDtypeStruct` with shardings over a mesh of
            `devices(cluster)`, and numbers.
        flags: XLA flags without dashes, such as `hcp.xla_flags(kind)`.
        donate: positions of the arguments whose memory the results may take; of a function that is
            jitted already, it says so itself.

    Returns:
        The compiled program: `as_text()`, `memory_analysis()`. It cannot be called here.

    Raises:
        ValueError: if no shape says on which devices it lies.
    """
    leaves = jax.tree.leaves(shapes)
    platforms = {
        device.platform
        for leaf in leaves
        if getattr(leaf, "sharding", None) is not None
        for device in leaf.sharding.device_set
    }
    if not platforms:
        raise ValueError(
            "none of the arguments says on which devices it lies: give jax.ShapeDtypeStruct a "
            "sharding over a mesh of plan.aot.devices(cluster)."
        )
    jitted = f if hasattr(f, "trace") else jax.jit(f, donate_argnums=donate)
    lowering = tuple("cuda" if platform == "gpu" else platform for platform in platforms)
    lowered = jitted.trace(*shapes).lower(lowering_platforms=lowering)
    with host_memory.compiling():
        return lowered.compile(compiler_options=dict(flags or {}))


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
