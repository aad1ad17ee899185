"""Compile a run for a cluster that is not available, and report what the program will do there.

The compiled program is the one that the cluster would run; `compiled.report` reads it. Memory,
bytes and the order of instructions are facts; seconds are modelled.
"""

import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from hcp_jax.attention.api import dot_product_attention
from hcp_jax.attention.strategy import compose
from hcp_jax.compiled.aot import compile_for, devices
from hcp_jax.compiled.report import Audit, busiest_density, read
from hcp_jax.cost.shape import ModelShape
from hcp_jax.hardware import Cluster
from hcp_jax.kernels.core import Problem, resolve
from hcp_jax.models.config import ModelConfig
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.parallel.mesh import xla_flags
from hcp_jax.parallel.microbatch import abstract_microbatch
from hcp_jax.sequence.mask import Intervals
from hcp_jax.sequence.placed_mask import PlacedMask
from hcp_jax.sequence.placement import Groups
from hcp_jax.train.config import TrainConfig
from hcp_jax.train.optimizer import make_optimizer
from hcp_jax.train.remat_choice import with_remat
from hcp_jax.train.step import abstract_state, make_train_step


def place(config: TrainConfig, cluster: Cluster) -> ContextParallel:
    """Return a config's `ContextParallel` on a mesh of a cluster's devices.

    Raises:
        ValueError: if mesh and cluster differ in their number of devices.
    """
    needed = config.parallel.num_devices
    if needed != cluster.size:
        raise ValueError(
            f"the config's mesh has {needed} devices, but {cluster} are {cluster.size}; change "
            "--hosts and --gpus-per-host, or the sizes under `parallel`."
        )
    return config.parallel.context_parallel(config.model.num_layers, devices=devices(cluster))


def chosen_flags(
    cluster: Cluster, given: list[str], library: bool = True
) -> dict[str, bool | int | str]:
    """Return XLA flags: those of the library, overridden by those of the command line.

    Args:
        cluster: the cluster.
        given: flags of the command line, as NAME=VALUE.
        library: False leaves the library's flags out.

    Raises:
        ValueError: if a given flag is not of the form NAME=VALUE.
    """
    # All clusters have NVIDIA GPUs, also those that a YAML file describes under another name.
    flags = xla_flags(f"NVIDIA {cluster.gpu.device_kind}") if library else {}
    for pair in given:
        name, equals, value = pair.lstrip("-").partition("=")
        if not equals:
            raise ValueError(f"--xla-flag must be NAME=VALUE, got {pair!r}.")
        flags[name] = value
    return flags


def compile_attention(
    cp: ContextParallel, model: ModelConfig, seq_len: int, rows: int, flags: dict[str, Any]
) -> jax.stages.Compiled:
    """Compile one layer's attention, forward and backward, for the devices of a mesh.

    Args:
        cp: context over a mesh of `aot.devices(cluster)`.
        model: gives heads, mask, dtype and implementation.
        seq_len: T, padded.
        rows: batch size B; with groups, the dp size.
        flags: XLA flags.
    """
    grouped = isinstance(cp.placement, Groups)
    mask = abstract_batch(cp, rows, seq_len)["mask"] if grouped else model.mask()
    sharding = NamedSharding(cp.mesh, PartitionSpec(cp.dp, cp.cp_axes or None, cp.tp))

    def array(heads: int) -> jax.ShapeDtypeStruct:
        shape = (rows, seq_len, heads, model.head_dim)
        return jax.ShapeDtypeStruct(shape, model.compute_dtype, sharding=sharding)

    def forward_and_backward(q: Any, k: Any, v: Any, dout: Any, mask: Any) -> Any:
        def attention(q: Any, k: Any, v: Any) -> Any:
            return dot_product_attention(
                q, k, v, cp=cp, mask=mask, implementation=model.implementation
            )

        out, pull_back = jax.vjp(attention, q, k, v)
        return out, *pull_back(dout)

    q, k = array(model.num_heads), array(model.num_kv_heads)
    return compile_for(forward_and_backward, q, k, k, q, mask, flags=flags)


def audit_attention(
    cp: ContextParallel,
    cluster: Cluster,
    model: ModelConfig,
    seq_len: int,
    rows: int,
    flags: dict[str, Any],
) -> Audit:
    """Compile one layer's attention, forward and backward, for a cluster, and audit the program.

    Args:
        cp: context over a mesh of `aot.devices(cluster)`.
        cluster: that cluster.
        model: gives heads, mask, dtype and implementation.
        seq_len: T.
        rows: batch size B.
        flags: XLA flags.
    """
    seq_len = cp.padded_length(seq_len)
    begin = time.perf_counter()
    compiled = compile_attention(cp, model, seq_len, rows, flags)
    return read_model(compiled, cp, cluster, model, seq_len, time.perf_counter() - begin)


def audit_step(
    cp: ContextParallel, cluster: Cluster, config: TrainConfig, flags: dict[str, Any]
) -> Audit:
    """Compile a config's whole training step for a cluster, and audit the program.

    Args:
        cp: context over a mesh of `aot.devices(cluster)`.
        cluster: that cluster.
        config: config of the run.
        flags: XLA flags.
    """
    config, _ = with_remat(config, cp, cluster.gpu.memory_bytes)
    fsdp = config.parallel.fsdp
    optimizer = make_optimizer(config.optimizer, config.steps)
    state = abstract_state(config.model, optimizer, cp, fsdp=fsdp)
    step = make_train_step(
        config.model,
        config.optimizer,
        config.steps,
        cp,
        fsdp=fsdp,
        accumulation=config.accumulation,
    )
    seq_len = cp.padded_length(config.seq_len)
    batch = abstract_batch(cp, config.batch_size, seq_len, config.model.mtp_depths)
    begin = time.perf_counter()
    compiled = compile_for(step, state, batch, flags=flags)
    return read_model(compiled, cp, cluster, config.model, seq_len, time.perf_counter() - begin)


def abstract_batch(
    cp: ContextParallel, rows: int, seq_len: int, mtp_depths: int = 0
) -> dict[str, Any]:
    """Return the shapes of a batch after `cp.shard_batch` (or `place_microbatch`)."""
    dtypes: dict[str, Any] = {"tokens": np.int32, "targets": np.int32, "weights": np.float32}

    grouped = isinstance(cp.placement, Groups)
    rows = cp.axis_size(cp.dp) if grouped else rows

    def array(dtype: Any, *more: int) -> jax.ShapeDtypeStruct:
        shape = (rows, seq_len, *more)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=cp.sharding(len(shape)))

    further = {"mtp_targets": np.int32, "mtp_weights": np.float32} if mtp_depths else {}
    ahead = {name: array(dtype, mtp_depths) for name, dtype in further.items()}
    if grouped:
        return abstract_microbatch(cp, seq_len // cp.size, dtypes) | ahead
    whole = NamedSharding(cp.mesh, PartitionSpec(cp.dp, None))
    number: Any = jax.ShapeDtypeStruct((rows, seq_len), np.int32, sharding=whole)
    mask = PlacedMask(Intervals(number, number), None, cp.placement, seq_len)
    dtypes["positions"] = np.int32
    return {name: array(dtype) for name, dtype in dtypes.items()} | ahead | {"mask": mask}


def read_model(
    compiled: jax.stages.Compiled,
    cp: ContextParallel,
    cluster: Cluster,
    model: ModelConfig,
    seq_len: int,
    compile_s: float = 0.0,
) -> Audit:
    """Read a compiled program, with the mask and the kernel rates of the model that it runs.

    With groups, the audit assumes that one document fills each block of the widest group.
    """
    size = model.head_dim
    problem = Problem(
        dtype=model.compute_dtype,
        query_heads=model.num_heads,
        kv_heads=model.num_kv_heads,
        head_size=size,
        v_head_size=size,
        platform=cp.platform,
        device_kind=cp.device_kind,
    )
    sharing = cp.placement.reach
    seq_len = seq_len // cp.size * sharing
    composed = compose(cp.for_layer(0), model.num_heads // cp.axis_size(cp.tp))
    ring = sharing // composed.lanes.size
    return read(
        compiled,
        cp.mesh,
        cluster,
        implementation=resolve(model.implementation, problem),
        density=busiest_density(ModelShape.from_config(model), seq_len, sharing, cp.layout, ring),
        compile_s=compile_s,
    )


def advice(found: Audit, flags: Mapping[str, Any], program: str = "step") -> list[str]:
    """Return advice about exposed transfers and memory; one line if nothing is wrong.

    Args:
        found: the audit.
        flags: XLA flags that the program was compiled with.
        program: what the program computes, in a word.
    """
    lines = []
    memory, step = found.memory, found.schedule.step_s
    if not memory.fits:
        lines.append(
            f"It does not fit: {memory.peak_bytes / 2**30:.1f} GiB of "
            f"{memory.device_bytes / 2**30:.0f}. Set parallel.fsdp=true, model.remat=full or a "
            "smaller model.loss_chunk, or cut the sequence over more GPUs."
        )
    exposed_hops = found.ring_hops - found.ring_hops_hidden
    if exposed_hops:
        lines.append(_about_hops(found, exposed_hops, flags))
    for what, words in _ABOUT.items():
        waits = sum(m.exposed_s for m in found.collectives if m.what == what)
        if what != "ring" and waits > 0.03 * step:
            lines.append(
                f"{words[0]} {duration(waits)}, {waits / step:.0%} of the {program}. {words[1]}"
            )
    return lines or [f"Everything fits, and what is exposed is less than 3 % of the {program}."]


_ABOUT = {
    "heads": (
        "The exchange of heads is not hidden; it takes",
        "Set parallel.head_groups, so that one group's exchange hides behind another's attention, "
        "or make cp_inner smaller and cp_outer larger, as long as the ring stays hidden.",
    ),
    "gather": (
        "The gather of K and V is not hidden; it takes",
        'Use comm_type "p2p" or "a2a+p2p", which hide it.',
    ),
    "states": (
        "The passing of states of recurrent layers is not hidden; it takes",
        "Its bytes do not depend on the length: use fewer devices along cp for short sequences, or "
        "more tokens per GPU.",
    ),
    "experts": (
        "Rows that travel to their experts are not hidden; they take",
        "Use a smaller ep, or one whose devices share a host.",
    ),
    "stages": (
        "What stages exchange (mostly sums of embeddings and outputs) is not hidden; it takes",
        "Use fewer virtual stages, or more layers per stage.",
    ),
    "": (
        "Waiting for weights, gradients and activations takes",
        "Use less tp, more tokens per GPU, or parallel.fsdp=false if the weights fit.",
    ),
}


def _about_hops(found: Audit, hops: int, flags: Mapping[str, Any]) -> str:
    ring = [m for m in found.collectives if m.what == "ring" and not m.hidden]
    waits = sum(moved.exposed_s for moved in ring)
    alone = [m for m in ring if m.exposed_s >= 0.9 * m.seconds]
    ours = xla_flags(f"NVIDIA {found.cluster.gpu.device_kind}")
    if alone and any(str(flags.get(name)).lower() != str(v).lower() for name, v in ours.items()):
        why = "no attention is scheduled beside them: set the flags of hcp.xla_flags"
    elif alone:
        why = (
            "the compiler schedules no attention beside them, with the flags of hcp.xla_flags set: "
            "make cp_inner larger, so that there are fewer hops"
        )
    else:
        why = (
            "attention beside them is too short: cut the sequence over fewer GPUs, or make "
            "cp_inner larger, so that each hop has more to compute"
        )
    return f"{hops} ring hops are not hidden ({duration(waits)} of waiting): {why}."


def duration(seconds: float) -> str:
    """Return seconds as text; in milliseconds if less than one second."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"
