"""Audit a pipeline for a cluster that is not available: one tick with both passes.

A step of m microbatches is m + (pp - 1) / v such ticks' worth of time (`cost/stages.py`); its other
programs, ticks of one pass and the update, have less to compute and less to hold.
"""

import dataclasses
import math
import time
from typing import Any

import jax

from hcp_jax.compiled.aot import compile_for
from hcp_jax.compiled.report import Audit
from hcp_jax.hardware import Cluster
from hcp_jax.pipeline.ticks import Pipeline
from hcp_jax.planner.audit import abstract_batch, read_model


def audit_tick(
    pipeline: Pipeline, cluster: Cluster, seq_len: int, rows: int, flags: dict[str, Any]
) -> Audit:
    """Compile a tick with both passes for a cluster, and audit the program.

    Its memory has the optimizer's moments besides, which the program does not get.

    Args:
        pipeline: pipeline over a mesh of `aot.devices(cluster)`.
        cluster: that cluster.
        seq_len: T.
        rows: streams of a microbatch, over all of dp.
        flags: XLA flags.
    """
    cp, model = pipeline.cp, pipeline.stages.model
    padded = cp.padded_length(seq_len)
    program, arguments = pipeline.abstract_tick(abstract_batch(cp, rows, padded))
    begin = time.perf_counter()
    compiled = compile_for(program, *arguments, flags=flags)
    found = read_model(compiled, cp, cluster, model, padded, time.perf_counter() - begin)
    moments = 2 * sum(_device_bytes(x) for x in jax.tree.leaves(arguments[0]))
    return dataclasses.replace(
        found, memory=dataclasses.replace(found.memory, beside_bytes=moments)
    )


def _device_bytes(x: jax.ShapeDtypeStruct) -> int:
    assert x.sharding is not None
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
