"""Audit a run with a pipeline for a cluster that is not available: one tick with both passes.

A step of m microbatches is m + (pp - 1) / v such ticks' worth of time (`cost/stages.py`); its other
programs, ticks of one pass and the update, have less to compute and less to hold.
"""

import dataclasses
import math
import time
from typing import Any, NamedTuple

import jax

from hcp_jax.compiled.aot import compile_for
from hcp_jax.compiled.report import Audit
from hcp_jax.cost.stages import lockstep
from hcp_jax.dynamic.pipeline import make_schedule
from hcp_jax.hardware import Cluster
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.planner.audit import abstract_batch, audit_step, read_model
from hcp_jax.train.config import TrainConfig
from hcp_jax.train.pipelined import make_pipeline
from hcp_jax.train.remat_choice import with_remat
from hcp_jax.train.state_form import StateForm


def audit_run(
    cp: ContextParallel, cluster: Cluster, config: TrainConfig, flags: dict[str, Any]
) -> Audit:
    """Audit a config's whole training step, or, if it has a pipeline, one tick of it.

    Args:
        cp: context over a mesh of `aot.devices(cluster)`.
        cluster: that cluster.
        config: config of the run.
        flags: XLA flags.
    """
    program = audit_tick if config.parallel.pp > 1 else audit_step
    return program(cp, cluster, config, flags)


def audit_tick(
    cp: ContextParallel, cluster: Cluster, config: TrainConfig, flags: dict[str, Any]
) -> Audit:
    """Compile a tick with both passes of a config's pipeline for a cluster, and audit the program.

    Its memory has the optimizer's moments besides, which the program does not get.

    Args:
        cp: context of a stage, over a mesh of `aot.devices(cluster)`.
        cluster: that cluster.
        config: config of the run.
        flags: XLA flags.

    Raises:
        ValueError: if the stages cannot cut the model.
        NotImplementedError: for what pipelines do not support.
    """
    config, _ = with_remat(config, cp, cluster.gpu.memory_bytes)
    model, rows = config.model, config.batch_size // config.accumulation
    pipeline = make_pipeline(config, cp)
    cp = pipeline.cp
    seq_len = cp.padded_length(config.seq_len)
    batch = abstract_batch(cp, rows, seq_len, model.mtp_depths)
    program, arguments = pipeline.abstract_tick(batch)
    begin = time.perf_counter()
    compiled = compile_for(program, *arguments, flags=flags)
    found = read_model(compiled, cp, cluster, model, seq_len, time.perf_counter() - begin)
    moments = sum(map(_device_bytes, jax.tree.leaves(StateForm(config, cp).trained.opt_state)))
    return dataclasses.replace(
        found, memory=dataclasses.replace(found.memory, beside_bytes=moments)
    )


class StepInTicks(NamedTuple):
    """A step of a pipeline, in ticks.

    Attributes:
        microbatches: microbatches of the step.
        forward: number of ticks with forward passes alone.
        both: number of ticks with both passes.
        backward: number of ticks with backward passes alone.
        ticks_of_time: the time of all of them, in times of one with both passes.
        modelled_s: this time in seconds, without the update.
    """

    microbatches: int
    forward: int
    both: int
    backward: int
    ticks_of_time: float
    modelled_s: float

    @property
    def ticks(self) -> int:
        """Number of all ticks."""
        return self.forward + self.both + self.backward


def step_in_ticks(config: TrainConfig, tick: Audit) -> StepInTicks:
    """Return what a config's step is in ticks; not for dynamic context parallelism.

    Args:
        config: config of the run.
        tick: the audit of a tick with both passes.
    """
    number, pp, v = config.accumulation, config.parallel.pp, config.parallel.virtual_stages
    passes = [(any(t.forward), any(t.backward)) for t in make_schedule(number, pp, v).ticks]
    times = v * lockstep(number, pp, v)[0]
    return StepInTicks(
        number,
        passes.count((True, False)),
        passes.count((True, True)),
        passes.count((False, True)),
        times,
        times * tick.schedule.step_s,
    )


def _device_bytes(x: jax.ShapeDtypeStruct) -> int:
    assert x.sharding is not None
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
