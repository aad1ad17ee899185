"""Implement the blockwise core as Pallas kernels on Mosaic GPU, for wgmma and TMA (H100, H200).

This module is the entry point and says which calls are supported. `mosaic_forward` and
`mosaic_backward` are the kernels. `mosaic_call` divides their work among programs, `mosaic_blocks`
has the operations on a block, `block_map` says which blocks are visited, `tiles` how large they
are.
"""

from typing import Any

from hcp_jax import compat
from hcp_jax.kernels.core import CoreSpec, Problem
from hcp_jax.kernels.merge import Partial
from hcp_jax.kernels.tiles import MOSAIC_HEAD_SIZES, has_wgmma
from hcp_jax.sequence.layout import KeyRuns
from hcp_jax.sequence.mask import Intervals

_DTYPES = ("bfloat16", "float16")


def unsupported(problem: Problem) -> str | None:
    """Return why these kernels do not support `problem`, or None."""
    if problem.platform == "cpu":
        if not compat.HAS_MOSAIC_INTERPRETER:
            return "on CPUs it is interpreted, which needs jax 0.11 or later"
    elif problem.platform not in ("gpu", "cuda"):
        return f"it runs on Hopper GPUs and, interpreted, on CPUs, not on {problem.platform}"
    elif not has_wgmma(problem.device_kind):
        return f"it needs wgmma and TMA (H100, H200), which {problem.device_kind!r} has not"
    if problem.dtype not in _DTYPES:
        return f"it takes {' and '.join(_DTYPES)}, not {problem.dtype}"
    if problem.head_size not in MOSAIC_HEAD_SIZES:
        sizes = ", ".join(map(str, MOSAIC_HEAD_SIZES))
        return f"it takes head sizes {sizes}, not {problem.head_size}"
    if problem.v_head_size != problem.head_size:
        return f"it takes v heads as large as k's ({problem.head_size}), not {problem.v_head_size}"
    return None


def forward(spec: CoreSpec, q: Any, k: Any, v: Any, intervals: Intervals, runs: KeyRuns) -> Partial:
    """See `hcp_jax.kernels.core.attend`."""
    from hcp_jax.kernels import mosaic_forward

    return mosaic_forward.forward(spec, q, k, v, intervals, runs)


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
    from hcp_jax.kernels import mosaic_backward

    return mosaic_backward.backward(spec, q, k, v, intervals, runs, dout, lse, delta)
