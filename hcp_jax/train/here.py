"""Check that a run can start on this machine, before data are read or programs are compiled."""

import os
import pathlib

from hcp_jax.cost.shape import ModelShape
from hcp_jax.train.config import FILL_IN, TrainConfig, flatten

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def require_filled_in(config: TrainConfig) -> None:
    """Refuse a config of `hcp plan --write` in which the user has not filled in all values.

    Raises:
        ValueError: if values are missing; names their keys.
    """
    left = [key for key, value in flatten(config).items() if value == FILL_IN]
    if left:
        raise ValueError(
            f"{', '.join(left)}: still {FILL_IN}, as hcp plan wrote it; give a value in the file "
            f"or on the command line (--{left[0]} VALUE)."
        )


def require_runs_here(config: TrainConfig, simulated: int) -> None:
    """Refuse to simulate on a CPU a run that was made for GPUs, or one too large for its memory.

    Args:
        config: the run.
        simulated: number of devices that this machine would simulate; 0 if it has the GPUs.

    Raises:
        ValueError: if the run cannot start; says why, and what to do instead.
    """
    if not simulated:
        return
    if config.made_for is not None:
        raise ValueError(
            f"this config was made for {config.made_for}, and there is no GPU here that jax can "
            f"use: hcp train would simulate {simulated} devices on the CPU. On the cluster, start "
            "it on every host with --distributed; here, hcp audit compiles it for the cluster and "
            "hcp verify proves its numbers on a small model. To simulate it all the same: "
            "--made_for null."
        )
    needed, there = state_bytes(config, simulated), host_memory_bytes()
    if there is not None and needed > there:
        parameters = ModelShape.from_config(config.model).params
        raise ValueError(
            f"the state of training (parameters, moments and gradients) takes {_gib(needed)} for "
            f"{parameters / 1e6:,.0f} M parameters on {simulated} simulated devices, and this "
            f"machine has {_gib(there)} of memory. Use a smaller model or fewer devices, set "
            "--parallel.fsdp true if it is false, or look at it with hcp audit, which allocates "
            "nothing."
        )


def state_bytes(config: TrainConfig, simulated: int) -> int:
    """Return the bytes of parameters, moments and gradients on the simulated devices.

    Args:
        config: the run.
        simulated: number of its devices that are simulated here.
    """
    parallel = config.parallel.resolve()
    moments = 8 if config.optimizer.moments_dtype == "float32" else 4
    per_copy = ModelShape.from_config(config.model).params * (4 + moments + 4)
    # With fsdp there is one copy, cut over all devices; else one per group of tp and pp.
    each = config.parallel.num_devices if parallel.fsdp else parallel.tp * parallel.pp
    copies = simulated / each
    return round(per_copy * copies)


def host_memory_bytes() -> int | None:
    """Return the memory that this process may use; None if the system does not say."""
    limits = []
    try:
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):
        return None
    for name in _CGROUP_LIMITS:
        try:
            limits.append(int(pathlib.Path(name).read_text()))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return min(limits)


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"
