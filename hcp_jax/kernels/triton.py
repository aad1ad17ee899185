"""The blockwise core as Pallas kernels on the Triton backend: NVIDIA GPUs from Ampere on.

FlashAttention-2 (Dao, 2023) in three kernels. The forward keeps a block of queries and walks over
key blocks with an online softmax; dq walks the same way; dk and dv keep a block of keys and walk
over query blocks and over all the query heads of their kv head, so that GQA's sum needs no buffer
and nothing is added atomically: the same call gives the same bits.

This is the door: what the kernels can do, and which arrays they get. `triton_kernels` is the
arithmetic, `walks` says which blocks are visited, `tiles` how large they are.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hcp_jax.kernels.block_map import key_blocks, query_blocks, walk_over_keys, walk_over_queries
from hcp_jax.kernels.core import CoreSpec, Problem
from hcp_jax.kernels.merge import Partial
from hcp_jax.kernels.triton_call import GREATEST_HEAD, LEAST_PART, Call
from hcp_jax.kernels.triton_kernels import LOG2_E, attention_dkv, attention_dq, attention_forward
from hcp_jax.sequence.layout import KeyRuns
from hcp_jax.sequence.mask import Intervals

_DTYPES = ("bfloat16", "float16", "float32")


def unsupported(problem: Problem) -> str | None:
    """Why these kernels cannot do `problem`, or None."""
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


def forward(spec: CoreSpec, q, k, v, intervals: Intervals, runs: KeyRuns) -> Partial:
    """See `hcp_jax.kernels.core.attend`."""
    c = Call.of(spec, q, k, v, intervals, runs, "forward")
    queries, keys = query_blocks(intervals, c.tile.block_q), key_blocks(runs, c.s, c.tile.block_k)
    out, lse = c.run(
        attention_forward,
        grid=(c.blocks_q, c.n, c.b),
        inputs=[(q, c.of_head(c.h)), (k, c.of_kv_head(c.h)), (v, c.of_kv_head(c.hv))],
        masks=c.masks(queries, keys, walk_over_keys(queries, keys, c.one_run)),
        outputs=[(c.like_q(c.hv), c.of_head(c.hv)), (c.like_q(), c.of_head())],
    )
    return Partial(out, lse)


def backward(spec: CoreSpec, q, k, v, intervals: Intervals, runs: KeyRuns, dout, lse, delta):
    """See `hcp_jax.kernels.core.attend_grads`."""
    arrays = (q, k, v, dout.astype(v.dtype), lse, delta)
    return _dq(spec, intervals, runs, *arrays), *_dkv(spec, intervals, runs, *arrays)


def _dq(spec: CoreSpec, intervals: Intervals, runs: KeyRuns, q, k, v, dout, lse, delta):
    c = Call.of(spec, q, k, v, intervals, runs, "dq")
    queries, keys = query_blocks(intervals, c.tile.block_q), key_blocks(runs, c.s, c.tile.block_k)
    less_lse, delta = _stats(c, intervals, lse, delta)
    [dq] = c.run(
        attention_dq,
        grid=(c.blocks_q, c.n, c.b),
        inputs=[
            (q, c.of_head(c.h)),
            (k, c.of_kv_head(c.h)),
            (v, c.of_kv_head(c.hv)),
            (dout, c.of_head(c.hv)),
            (less_lse, c.stats_of_head),
            (delta, c.stats_of_head),
        ],
        masks=c.masks(queries, keys, walk_over_keys(queries, keys, c.one_run)),
        outputs=[(c.like_q(c.h), c.of_head(c.h))],
    )
    return dq


def _dkv(spec: CoreSpec, intervals: Intervals, runs: KeyRuns, q, k, v, dout, lse, delta):
    c = Call.of(spec, q, k, v, intervals, runs, "dkv")
    queries, keys = query_blocks(intervals, c.tile.block_q), key_blocks(runs, c.s, c.tile.block_k)
    less_lse, delta = _stats(c, intervals, lse, delta)
    return c.run(
        attention_dkv,
        grid=(c.blocks_k, c.k, c.b),
        inputs=[
            (q, c.of_group(c.h)),
            (k, c.of_key_head(c.h)),
            (v, c.of_key_head(c.hv)),
            (dout, c.of_group(c.hv)),
            (less_lse, c.stats_of_group),
            (delta, c.stats_of_group),
        ],
        masks=c.masks(queries, keys, walk_over_queries(queries, keys)),
        outputs=[(c.like_k(c.h), c.of_key_head(c.h)), (c.like_k(c.hv), c.of_key_head(c.hv))],
    )


def _stats(
    c: Call, intervals: Intervals, lse: Float[Array, "B T N"], delta: Float[Array, "B T N"]
) -> tuple[Float[Array, "B N Tp"], Float[Array, "B N Tp"]]:
    """(-lse in log2, delta); -inf where a query sees nothing, so that all its weights are 0."""
    empty = (intervals.end <= intervals.start)[..., None] | (lse == -jnp.inf)
    less_lse = jnp.where(empty, -jnp.inf, lse * -LOG2_E).swapaxes(1, 2)
    tail = ((0, 0), (0, 0), (0, c.padded_t - c.t))
    return (
        jnp.pad(less_lse, tail, constant_values=-jnp.inf),
        jnp.pad(delta.swapaxes(1, 2), tail),
    )
