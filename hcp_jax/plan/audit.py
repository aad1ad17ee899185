"""`hcp audit`: compile a run for a cluster that is not here, and tell what it will do there.

    hcp audit configs/llama3-8b-1m.yaml --gpu h200 --hosts 8 --gpus-per-host 8
    hcp audit configs/llama3-8b-1m.yaml --gpu h200 --hosts 8 --gpus-per-host 8 --attention --json -

The compiled program is the one that the cluster would run; `program.py` reads it. Memory, bytes,
and the order of things are facts; seconds are modelled.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from hcp_jax.attention.api import dot_product_attention
from hcp_jax.attention.grouped import exchange_size
from hcp_jax.context import ContextParallel
from hcp_jax.kernels.core import Problem, resolve
from hcp_jax.mask import intervals
from hcp_jax.mesh import xla_flags
from hcp_jax.microbatch import abstract_microbatch
from hcp_jax.models.config import ModelConfig
from hcp_jax.models.flops import ModelShape
from hcp_jax.plan import hardware
from hcp_jax.plan.aot import compile_for, devices
from hcp_jax.plan.hardware import Cluster
from hcp_jax.plan.program import Audit, busiest_density, read
from hcp_jax.plan.timeline import draw
from hcp_jax.train import config as configuration
from hcp_jax.train.config import TrainConfig
from hcp_jax.train.step import abstract_state, make_optimizer, make_train_step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hcp audit`."""
    configuration.add_arguments(parser)
    hardware.add_arguments(parser)
    parser.add_argument(
        "--attention",
        action="store_true",
        help="one layer's attention, forward and backward, instead of the whole training step",
    )
    parser.add_argument(
        "--groups",
        type=int,
        nargs="+",
        metavar="SIZE",
        help="the program of one group layout, each device with its share of seq_len as places",
    )
    parser.add_argument(
        "--xla-flag",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an XLA flag to set besides (or in place of) the library's own; may be repeated",
    )
    parser.add_argument("--no-flags", action="store_true", help="leave the library's flags out")
    parser.add_argument("--json", metavar="FILE", help="write all figures there; - for the screen")
    parser.add_argument("--picture", metavar="FILE", help="draw the schedule there (.png or .svg)")


def run(args: argparse.Namespace) -> int:
    """Runs `hcp audit`; returns the exit code."""
    config = configuration.from_arguments(args)
    if config.parallel.dynamic.enabled and not args.groups:
        raise NotImplementedError(
            "hcp audit compiles one program, and parallel.dynamic has one for each layout: name "
            "one with --groups, or give --parallel.dynamic.enabled false."
        )
    cluster = Cluster(hardware.gpu(args.gpu), args.hosts, args.gpus_per_host)
    flags = chosen_flags(cluster, args.xla_flag, library=not args.no_flags)
    cp = place(config, cluster)
    if args.groups:
        cp = dataclasses.replace(cp, groups=tuple(args.groups))
    if args.attention:
        rows = max(cp.axis_size(cp.dp), config.batch_size // config.accumulation)
        found = audit_attention(cp, cluster, config.model, config.seq_len, rows, flags)
    else:
        found = audit_step(cp, cluster, config, flags)
    if args.picture:
        draw(found.schedule, pathlib.Path(args.picture), title(found, args.attention))
    text = json.dumps({"flags": flags} | found.to_json(), indent=2)
    if args.json == "-":
        print(text)
        return 0
    if args.json:
        pathlib.Path(args.json).write_text(text + "\n")
    tell(found, flags, args.attention)
    return 0


def place(config: TrainConfig, cluster: Cluster) -> ContextParallel:
    """A config's mesh, made of a cluster's devices.

    Raises:
        ValueError: if the mesh has another number of devices than the cluster.
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
    """XLA flags: the library's, and those of the command line, which win.

    Raises:
        ValueError: if one is not of the form NAME=VALUE.
    """
    flags = xla_flags(cluster.gpu.device_kind) if library else {}
    for pair in given:
        name, equals, value = pair.lstrip("-").partition("=")
        if not equals:
            raise ValueError(f"--xla-flag must be NAME=VALUE, got {pair!r}.")
        flags[name] = value
    return flags


def compile_attention(
    cp: ContextParallel, model: ModelConfig, seq_len: int, rows: int, flags: dict
) -> jax.stages.Compiled:
    """One layer's attention, forward and backward, for the devices of a mesh.

    Args:
        cp: over a mesh of `aot.devices(cluster)`.
        model: for its heads, mask, dtype and implementation.
        seq_len: T, padded.
        rows: batch size B; under groups, dp.
        flags: XLA flags.
    """
    mask = model.mask() if cp.groups is None else _abstract_batch(cp, rows, seq_len)["mask"]
    sharding = NamedSharding(cp.mesh, PartitionSpec(cp.dp, cp.cp_axes or None, cp.tp))

    def array(heads: int) -> jax.ShapeDtypeStruct:
        shape = (rows, seq_len, heads, model.head_dim)
        return jax.ShapeDtypeStruct(shape, model.compute_dtype, sharding=sharding)

    def both(q, k, v, dout, mask):
        def attention(q, k, v):
            return dot_product_attention(
                q, k, v, cp=cp, mask=mask, implementation=model.implementation
            )

        out, pull_back = jax.vjp(attention, q, k, v)
        return out, *pull_back(dout)

    q, k = array(model.num_heads), array(model.num_kv_heads)
    return compile_for(both, q, k, k, q, mask, flags=flags)


def audit_attention(
    cp: ContextParallel,
    cluster: Cluster,
    model: ModelConfig,
    seq_len: int,
    rows: int,
    flags: dict,
) -> Audit:
    """Compile one layer's attention, forward and backward, for a cluster, and read it.

    Args:
        cp: over a mesh of `aot.devices(cluster)`.
        cluster: that cluster.
        model: for its heads, mask, dtype and implementation.
        seq_len: T.
        rows: batch size B.
        flags: XLA flags.
    """
    seq_len = cp.padded_length(seq_len)
    begin = time.perf_counter()
    compiled = compile_attention(cp, model, seq_len, rows, flags)
    return read_model(compiled, cp, cluster, model, seq_len, time.perf_counter() - begin)


def audit_step(cp: ContextParallel, cluster: Cluster, config: TrainConfig, flags: dict) -> Audit:
    """Compile a config's whole training step for a cluster, and read it.

    Args:
        cp: a `ContextParallel` over a mesh of `aot.devices(cluster)`.
        cluster: that cluster.
        config: a `TrainConfig`.
        flags: XLA flags.
    """
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
    batch = _abstract_batch(cp, config.batch_size, seq_len)
    begin = time.perf_counter()
    compiled = compile_for(step, state, batch, flags=flags)
    return read_model(compiled, cp, cluster, config.model, seq_len, time.perf_counter() - begin)


def _abstract_batch(cp: ContextParallel, rows: int, seq_len: int) -> dict[str, Any]:
    """What `cp.shard_batch` makes of a batch (`place_microbatch` of a microbatch), as shapes."""
    dtypes = {"tokens": np.int32, "targets": np.int32, "weights": np.float32}
    if cp.groups is not None:
        return abstract_microbatch(cp, seq_len // cp.size, dtypes)

    def array(dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, seq_len), dtype, sharding=cp.sharding(2))

    whole = NamedSharding(cp.mesh, PartitionSpec(cp.dp, None))
    number: Any = jax.ShapeDtypeStruct((rows, seq_len), np.int32, sharding=whole)
    placement = cp.placement._replace(key_length=seq_len)
    mask = dataclasses.replace(intervals(number, number), placement=placement)
    dtypes["positions"] = np.int32
    return {name: array(dtype) for name, dtype in dtypes.items()} | {"mask": mask}


def read_model(
    compiled: jax.stages.Compiled,
    cp: ContextParallel,
    cluster: Cluster,
    model: ModelConfig,
    seq_len: int,
    compile_s: float = 0.0,
) -> Audit:
    """Read a program in which a model's attention runs, with its mask and its kernels' rates.

    Under groups, each is taken to be filled by one document.
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
    one, sharing = cp.for_layer(0), cp.size
    ring = cp.axis_size(one.strategy.move)
    if one.groups is not None:
        heads = model.num_heads // cp.axis_size(cp.tp)
        seq_len, sharing = seq_len // cp.size * max(one.groups), max(one.groups)
        ring = sharing // exchange_size(one, heads)
    return read(
        compiled,
        cp.mesh,
        cluster,
        implementation=resolve(model.implementation, problem),
        density=busiest_density(ModelShape.of(model), seq_len, sharing, cp.layout, ring),
        compile_s=compile_s,
    )


def title(found: Audit, attention: bool) -> str:
    """What was compiled, in a line."""
    what = "attention of one layer, forward and backward" if attention else "training step"
    return f"{what} on {found.cluster}"


def tell(found: Audit, flags: dict, attention: bool) -> None:
    """Print what was found: memory, collectives, time, advice."""
    import rich.console
    import rich.table

    width = None if sys.stdout.isatty() else 120
    console = rich.console.Console(file=sys.stdout, highlight=False, width=width, soft_wrap=True)
    console.print(f"{title(found, attention)}; compiled in {found.compile_s:.0f} s")
    for name, value in flags.items():
        console.print(f"  --{name}={str(value).lower()}")
    gib = {name: size / 2**30 for name, size in found.to_json()["memory"].items()}
    console.print(
        f"memory per GPU   {gib['peak_bytes']:.2f} of {gib['device_bytes']:.0f} GiB: arguments "
        f"{gib['argument_bytes']:.2f}, outputs {gib['output_bytes']:.2f} ({gib['alias_bytes']:.2f}"
        f" of them in place), temporaries {gib['temp_bytes']:.2f}"
    )
    if found.memory.host_bytes:
        console.print(f"offloaded        {gib['host_bytes']:.2f} GiB to the host's memory, per GPU")
    console.print(f"ring hops        {found.ring_hops_hidden} of {found.ring_hops} hidden")
    table = rich.table.Table(
        "collective", "over", "link", "MiB", "count", "seconds", "hidden behind"
    )
    for column in (3, 4, 5):
        table.columns[column].justify = "right"
    for moved in found.collectives:
        name = f"{moved.what}: {moved.kind}" if moved.what else moved.kind
        hidden = ", ".join(moved.behind) if moved.hidden else f"exposed {_time(moved.exposed_s)}"
        size, count = f"{moved.bytes / 2**20:.1f}", str(moved.count)
        axes = " x ".join(moved.axes) or "-"
        table.add_row(name, axes, moved.link, size, count, _time(moved.seconds), hidden)
    console.print(table)
    compute = found.schedule.compute_s
    console.print(
        f"modelled         step {_time(found.schedule.step_s)} = attention "
        f"{_time(compute['attention'])} + products {_time(compute['product'])} + other "
        f"{_time(compute['other'])} + waiting {_time(found.schedule.exposed_s)}; "
        f"bound by {_bound(found)}"
    )
    for line in advice(found):
        console.print(f"- {line}")


def advice(found: Audit) -> list[str]:
    """What to do about what is exposed or does not fit; one line of praise if there is nothing."""
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
        lines.append(_about_hops(found, exposed_hops))
    for what, words in _ABOUT.items():
        waits = sum(m.exposed_s for m in found.collectives if m.what == what)
        if what != "ring" and waits > 0.03 * step:
            lines.append(f"{words[0]} {_time(waits)}, {waits / step:.0%} of the step. {words[1]}")
    return lines or ["Everything fits, and what is exposed is less than 3 % of the step."]


_ABOUT = {
    "heads": (
        "The exchange of heads stands alone for",
        "Set parallel.head_groups, so that one group's exchange hides behind another's attention, "
        "or make cp_inner smaller and cp_outer larger, as long as the ring stays hidden.",
    ),
    "gather": (
        "The gather of K and V stands alone for",
        'Use comm_type "p2p" or "a2a+p2p", which hide it.',
    ),
    "": (
        "Weights, gradients and activations are waited for during",
        "Less tp, more tokens per GPU, or parallel.fsdp=false where the weights fit.",
    ),
}


def _about_hops(found: Audit, hops: int) -> str:
    ring = [m for m in found.collectives if m.what == "ring" and not m.hidden]
    waits = sum(moved.exposed_s for moved in ring)
    alone = [m for m in ring if m.exposed_s >= 0.9 * m.seconds]
    if alone:
        why = "no attention is scheduled beside them: set the flags of hcp.xla_flags"
    else:
        why = (
            "attention beside them is too short: cut the sequence over fewer GPUs, or make "
            "cp_inner larger, so that each hop has more to compute"
        )
    return f"{hops} ring hops are not hidden ({_time(waits)} of waiting): {why}."


def _bound(found: Audit) -> str:
    parts = dict(found.schedule.compute_s) | {"waiting": found.schedule.exposed_s}
    names = {"attention": "attention", "product": "matrix products", "other": "memory bandwidth"}
    most = max(parts, key=lambda part: parts[part])
    return names.get(most, "communication")


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"
