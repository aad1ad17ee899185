"""Implement the blockwise core as Pallas kernels on Triton, for NVIDIA GPUs from Ampere on.

This is FlashAttention-2 (Dao, 2023) in three kernels. The forward keeps a block of queries and
visits key blocks with an online softmax; dq visits the same blocks. The kernel of dk and dv keeps a
block of keys and visits query blocks of all query heads of its kv head. So the sum over query heads
needs no buffer and no atomic additions, and the same call gives the same bits.

This module is the entry point: it says which calls are supported and passes arrays to the kernels.
`triton_kernels` has the arithmetic, `block_map` says which blocks are visited, `tiles` how large
they are.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hcp_jax.kernels.block_map import key_blocks, map_over_keys, map_over_queries, query_blocks
from hcp_jax.kernels.core import CoreSpec, Problem
from hcp_jax.kernels.merge import Partial, merge_all
from hcp_jax.kernels.triton_call import GREATEST_HEAD, LEAST_PART, Call
from hcp_jax.kernels.triton_kernels import LOG2_E, attention_dkv, attention_dq, attention_forward
from hcp_jax.sequence.layout import KeyRuns
from hcp_jax.sequence.mask import Intervals

_DTYPES = ("bfloat16", "float16", "float32")


def unsupported(problem: Problem) -> str | None:
    """Return why these kernels do not support `problem`, or None."""
    if problem.platform not in ("gpu", "cuda", "cpu"):
        return f"it runs on NVIDIA GPUs and, interpreted, on CPUs, not on {problem.platform}"
    if problem.dtype not in _DTYPES:
        return f"it takes {', '.join(_DTYPES)}, not {problem.dtype}"
    if problem.platform == "cpu" and jax.dtypes.canonicalize_dtype(np.int64) == np.int64:
        return "its interpreter on CPUs does not run with jax_enable_x64"
    for name, size in (("head", problem.head_size), ("v head", problem.v_head_size)):
        if size % LEAST_PART or not 0 < size <= GREATEST_HEAD:
            return (
                f"it takes {name} sizes that are multiples of {LEAST_PART} up to "
                f"{GREATEST_HEAD}, not {size}"
            )
    return None


def forward(spec: CoreSpec, q: Any, k: Any, v: Any, intervals: Intervals, runs: KeyRuns) -> Partial:
    """See `hcp_jax.kernels.core.attend`."""
    c = Call.from_arrays(spec, q, k, v, intervals, runs, "forward")
    queries, keys = query_blocks(intervals, c.tile.block_q), key_blocks(runs, c.s, c.tile.block_k)
    out, lse = c.run(
        attention_forward,
        inputs=[(q, c.head(c.h)), (k, c.shared_kv_head(c.h)), (v, c.shared_kv_head(c.hv))],
        masks=c.masks(queries, keys, map_over_keys(queries, keys, c.one_run)),
        outputs=[(c.like_q(c.hv), c.head(c.hv)), (c.like_q(), c.head())],
    )
    return merge_all(Partial(out, lse)) if c.grid.cut else Partial(out, lse)


def backward(
    spec: CoreSpec,
    q: Any,
    k: Any,
    v: Any,
    intervals: Intervals,
    runs: KeyRuns,
    dout: Any,
    lse: Any,
    delta: Any,
) -> Any:
    """See `hcp_jax.kernels.core.attend_grads`."""
    arrays = (q, k, v, dout.astype(v.dtype), lse, delta)
    return _dq(spec, intervals, runs, *arrays), *_dkv(spec, intervals, runs, *arrays)


def _dq(
    spec: CoreSpec,
    intervals: Intervals,
    runs: KeyRuns,
    q: Any,
    k: Any,
    v: Any,
    dout: Any,
    lse: Any,
    delta: Any,
) -> Any:
    c = Call.from_arrays(spec, q, k, v, intervals, runs, "dq")
    queries, keys = query_blocks(intervals, c.tile.block_q), key_blocks(runs, c.s, c.tile.block_k)
    minus_lse, delta = _stats(c, intervals, lse, delta)
    [dq] = c.run_and_add(
        attention_dq,
        inputs=[
            (q, c.head(c.h)),
            (k, c.shared_kv_head(c.h)),
            (v, c.shared_kv_head(c.hv)),
            (dout, c.head(c.hv)),
            (minus_lse, c.head_stats),
            (delta, c.head_stats),
        ],
        masks=c.masks(queries, keys, map_over_keys(queries, keys, c.one_run)),
        outputs=[(c.like_q(c.h), c.head(c.h))],
    )
    return dq


def _dkv(
    spec: CoreSpec,
    intervals: Intervals,
    runs: KeyRuns,
    q: Any,
    k: Any,
    v: Any,
    dout: Any,
    lse: Any,
    delta: Any,
) -> Any:
    c = Call.from_arrays(spec, q, k, v, intervals, runs, "dkv")
    queries, keys = query_blocks(intervals, c.tile.block_q), key_blocks(runs, c.s, c.tile.block_k)
    minus_lse, delta = _stats(c, intervals, lse, delta)
    return c.run_and_add(
        attention_dkv,
        inputs=[
            (q, c.query_heads(c.h)),
            (k, c.kv_head(c.h)),
            (v, c.kv_head(c.hv)),
            (dout, c.query_heads(c.hv)),
            (minus_lse, c.query_heads_stats),
            (delta, c.query_heads_stats),
        ],
        masks=c.masks(queries, keys, map_over_queries(queries, keys)),
        outputs=[(c.like_k(c.h), c.kv_head(c.h)), (c.like_k(c.hv), c.kv_head(c.hv))],
    )


def _stats(
    c: Call, intervals: Intervals, lse: Float[Array, "B T N"], delta: Float[Array, "B T N"]
) -> tuple[Float[Array, "B N Tp"], Float[Array, "B N Tp"]]:
    """Return (-lse in log2, delta); -inf where a query sees nothing, so that its weights are 0."""
    empty = (intervals.end <= intervals.start)[..., None] | (lse == -jnp.inf)
    minus_lse = jnp.where(empty, -jnp.inf, lse * -LOG2_E).swapaxes(1, 2)
    tail = ((0, 0), (0, 0), (0, c.padded_t - c.t))
    return (
        jnp.pad(minus_lse, tail, constant_values=-jnp.inf),
        jnp.pad(delta.swapaxes(1, 2), tail),
    )
