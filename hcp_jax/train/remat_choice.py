"""Choose what backward recomputes by the memory of the GPU: `model.remat: auto`."""

import dataclasses
from typing import get_args

from hcp_jax.cost import stages
from hcp_jax.cost.memory import remat_that_fits
from hcp_jax.cost.shape import ModelShape
from hcp_jax.cost.split import Split
from hcp_jax.cost.traffic import Remat
from hcp_jax.hardware import GPUS
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.train.config import TrainConfig


def memory_by_kind(device_kind: str) -> int | None:
    """Return the memory of a known GPU in bytes, by its data sheet; None for other devices.

    Not what the driver reports: all hosts must choose the same program.
    """
    known = {gpu.device_kind: gpu.memory_bytes for gpu in GPUS.values()}
    return known.get(device_kind)


def with_remat(
    config: TrainConfig, cp: ContextParallel, memory_bytes: int | None
) -> tuple[TrainConfig, list[str]]:
    """Return the config with a policy in place of "auto", and lines about it for the log.

    Args:
        config: the run.
        cp: its context.
        memory_bytes: memory of a GPU; None if unknown, then attention's outputs are kept, as in
            pipelines that the model of memory does not know.
    """
    model = config.model
    if model.remat != "auto":
        return config, []
    shape, sizes = ModelShape.from_config(model), dict(cp.mesh.shape)
    split = Split(
        **{axis: sizes.get(axis, 1) for axis in ("pp", "dp", "tp", "cp_outer", "cp_inner")},
        comm_type=cp.for_layer(0).comm_type,  # type: ignore[arg-type]
        fsdp=config.parallel.fsdp,
        ep=cp.ep,
        virtual_stages=config.parallel.virtual_stages,
    )
    among: tuple[Remat, ...] = tuple(
        remat
        for remat in get_args(Remat)
        if not (remat == "none" and model.offload_activations)
        and not (remat == "mlp" and model.mlp_chunk is not None)
    )
    chosen: Remat = "attention"
    if memory_bytes is None:
        why = f"the memory of {cp.device_kind} is not known"
    elif stages.cut(shape, split.pp, split.virtual_stages) is None:
        why = stages.refusal(shape) or "the model of memory knows no such stages"
    else:
        rows = max(1, config.batch_size // config.accumulation // split.dp)
        chosen = remat_that_fits(shape, split, config.seq_len, rows, memory_bytes, among)
        why = f"by the model of memory, for {memory_bytes / 2**30:.0f} GiB per GPU"
    resolved = dataclasses.replace(config, model=dataclasses.replace(model, remat=chosen))
    return resolved, [f"remat: auto is {chosen} ({why})"]
