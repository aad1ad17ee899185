"""Compile for a cluster that is not available, from shapes alone.

    hcp.set_up_platform()  # before jax starts
    cluster = Cluster(hardware.gpu("h200"), hosts=8, gpus_per_host=8)
    mesh = hcp.make_mesh(cp_outer=8, cp_inner=8, devices=devices(cluster))
    q = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=...)      # on that mesh
    compiled = compile_for(f, q, flags=hcp.xla_flags("NVIDIA H200"))

No array is created and no GPU is needed: the wheels of the CUDA plugin contain the whole compiler,
also for Pallas kernels. The result is the program that the cluster would run, so its memory, its
collectives and their schedule are facts (`report.py` reads them).
"""

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.experimental import topologies

from hcp_jax.hardware import GPU, Cluster
from hcp_jax.parallel import host_memory

_PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")


def devices(cluster: Cluster) -> list[jax.Device]:
    """Return the devices of a cluster, for a mesh; they hold no arrays and run nothing.

    Args:
        cluster: any number of hosts, and any number of GPUs in each.

    Returns:
        The devices, host by host; `process_index` is the number of the host.

    Raises:
        NotImplementedError: if the CUDA compiler is not installed, or jax has started without it;
            the error says what to do.
    """
    if not any(_installed(plugin) for plugin in _PLUGINS):
        raise NotImplementedError(
            "compiling for GPUs needs the CUDA plugin of jax (no GPU and no CUDA libraries): "
            f"pip install 'jax-cuda13-plugin~={jax.__version__}' "
            f"'jax-cuda13-pjrt~={jax.__version__}'"
        )
    try:
        topology = topologies.get_topology_desc(
            platform="cuda",
            topology_name=cluster.gpu.name,
            target_config=target_config(cluster.gpu),
            topology=f"1x{cluster.hosts}x{cluster.gpus_per_host}",
        )
    except NotImplementedError as error:  # the plugin found no GPU when jax started
        raise NotImplementedError(
            "jax started with its CUDA plugin, which found no GPU and was dropped: call "
            "hcp.set_up_platform() before any other use of jax, or set JAX_PLATFORMS=cpu."
        ) from error
    return list(topology.devices)


def compile_for(
    f: Callable[..., Any],
    *shapes: Any,
    flags: Mapping[str, bool | int | str] | None = None,
    donate: tuple[int, ...] = (),
) -> jax.stages.Compiled:
    """Compile a function for the devices that its arguments' shardings name.

    Args:
        f: a function, jitted or not.
        *shapes: its arguments: numbers, and pytrees of `jax.ShapeDtypeStruct` with shardings over
            a mesh of `devices(cluster)`.
        flags: XLA flags without dashes, such as `hcp.xla_flags(kind)`.
        donate: positions of the arguments whose memory the results may reuse; ignored for a jitted
            function, which declares its own.

    Returns:
        The compiled program, with `as_text()` and `memory_analysis()`. It cannot be called here.

    Raises:
        ValueError: if no shape has a sharding.
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
            "sharding over a mesh of compiled.aot.devices(cluster)."
        )
    jitted = f if hasattr(f, "trace") else jax.jit(f, donate_argnums=donate)
    lowering = tuple("cuda" if platform == "gpu" else platform for platform in platforms)
    lowered = jitted.trace(*shapes).lower(lowering_platforms=lowering)
    with host_memory.compiling():
        compiled: jax.stages.Compiled = lowered.compile(compiler_options=dict(flags or {}))
        return compiled


def target_config(gpu: GPU) -> str:
    """Return the text proto that describes a GPU to XLA, for compiling on a machine without one."""
    major, minor = gpu.compute_capability
    extension = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_core: {gpu.shared_bytes_per_core}
  shared_memory_per_block_optin: {gpu.shared_bytes_per_block}
  core_count: {gpu.core_count}  fpus_per_core: {gpu.fpus_per_core}
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
  memory_bandwidth: {int(gpu.memory_bandwidth)}  l2_cache_size: {gpu.l2_bytes}
  clock_rate_ghz: {gpu.clock_ghz}  device_memory_size: {gpu.memory_bytes}
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  device_vendor: "NVIDIA Corporation"  device_address_bits: 64  ecc_enabled: true
  platform_version: "Compute Capability {major}.{minor}{"a" if major >= 9 else ""}"
  pcie_bandwidth: 34359738368  name: "{gpu.device_kind}"
  driver_version: "13.0.0"  runtime_version: "13.0.0"  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{gpu.device_kind}"
"""


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
