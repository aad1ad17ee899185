"""What differs between the versions of JAX that the library supports (0.10.2 to 0.12).

It stands alone so that nothing else asks for a version, or for what jax has without promising to
keep it: when the oldest one is dropped, this is the file to shorten.
"""

import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

# Before, the interpreter of Mosaic GPU kernels on a CPU lacks most of what kernels use.
HAS_MOSAIC_INTERPRETER = jax.__version_info__ >= (0, 11)


def interpret_mosaic() -> Any:
    """What `plgpu.kernel` takes as `interpret` to run a kernel on a CPU.

    Two accesses to memory that no barrier orders are an error (from jax 0.12 on), whatever came of
    them.
    """
    return _mosaic_gpu().InterpretGPUParams(detect_races=True)


class Detected(NamedTuple):
    """What jax finds out of a cluster; None for what it does not know."""

    address: str | None
    processes: int | None
    process: int | None
    local_devices: Sequence[int] | None


def detect_cluster(
    address: str | None, processes: int | None, process: int | None, timeout: int
) -> Detected:
    """Asks jax's own detection of Slurm, Open MPI and Kubernetes for what is None.

    Raises:
        RuntimeError: if there is a cluster, but it does not say what is needed.
    """
    from jax._src import clusters

    address, processes, process, local = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        address, processes, process, None, None, timeout
    )
    return Detected(address, processes, process, local)


def key_value_store() -> Any:
    """The key-value store of the processes that `jax.distributed` has joined; None without it."""
    from jax._src import distributed

    return distributed.global_state.client


def tracks_variation() -> bool:
    """Return whether jax tracks here over which manual axes a value varies.

    It does inside a `jax.shard_map` with check_vma=True.
    """
    return bool(_config()._check_vma.value)


def varying_axes(x: Any) -> frozenset[str]:
    """Return the manual mesh axes over which jax believes an array to vary."""
    aval = jax.typeof(x)
    kind: Any = getattr(aval, "mat", None)
    return frozenset(getattr(aval, "vma", ()) if kind is None else kind.varying)


def untracked(function: Callable, *args: Any) -> Any:
    """Call a function with jax not tracking over which manual axes its values vary.

    It is traced on its own, for arguments that vary over nothing, so that loops find their carries
    to be of one type whatever is in them; the caller must declare what the results vary over.
    """
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.typeof(x).sharding), args
    )
    extend = importlib.import_module("jax.extend.core")
    with _config()._check_vma(False):
        traced, out = jax.make_jaxpr(function, return_shape=True)(*shapes)
        # What any operation makes here varies over nothing, as what was traced expects.
        leaves = [jax.lax.expand_dims(x, (0,)) for x in jax.tree.leaves(args)]
        leaves = [jax.lax.squeeze(x, (0,)) for x in leaves]
        leaves = jax.jit(extend.jaxpr_as_fun(traced))(*leaves)
    return jax.tree.unflatten(jax.tree.structure(out), leaves)


def _config() -> Any:
    return importlib.import_module("jax._src.config")


def expect_pallas_triton() -> None:
    """Silence JAX's notice that Pallas on Triton will go; that and no other warning.

    JAX 0.11 and later warn whenever such a kernel is *lowered*, which happens in the caller's
    `jit`, long after our code has returned. So the filter is set (again, if somebody has reset
    the filters) each time that a kernel is traced.
    """
    warnings.filterwarnings(
        "ignore",
        message="The Pallas Triton backend is deprecated",
        category=DeprecationWarning,
    )


def transpose_ref(ref: Any) -> Any:
    """A reference to the transpose of a matrix in shared memory."""
    if jax.__version_info__ < (0, 11):
        return _mosaic_gpu().transpose_ref(ref, (1, 0))
    return ref.transpose((1, 0))


def mosaic_load(ref: Any, layout: Any, optimized: bool = True) -> Any:
    """The array at a reference, in a layout; `optimized` must not be asked of device memory."""
    index = ((),) if jax.__version_info__ < (0, 11) else ()
    return _mosaic_gpu().load(ref, *index, layout=layout, optimized=optimized)


def _mosaic_gpu() -> Any:
    """Loaded when needed, and of any version to a type checker."""
    return importlib.import_module("jax.experimental.pallas.mosaic_gpu")
