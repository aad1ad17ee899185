"""Provide `with hcp.context_parallel(...)`, for those who know it from PyTorch."""

import contextlib
from collections.abc import Iterator
from typing import Any

from hcp_jax.parallel.context import ContextParallel


@contextlib.contextmanager
def context_parallel(cp: ContextParallel, buffers: Any, seq_dims: Any) -> Iterator[Any]:
    """Yield `cp.shard_buffers(buffers, seq_dims)`; switch nothing on or off.

    PyTorch's context manager of this name cuts its buffers in place, and replaces attention inside
    the `with`. Here the buffers keep their values, the sharded ones are what the `with` yields, and
    attention runs over `cp` where it is called with `cp=cp`, inside or outside. So it is
    a way of writing `sharded = cp.shard_buffers(buffers, seq_dims)`, no more.

    Args:
        cp: the context parallelism.
        buffers: tree of arrays in natural order.
        seq_dims: see `ContextParallel.shard_buffers`.

    Raises:
        ValueError: see `ContextParallel.shard_buffers`.

    >>> import hcp_jax as hcp, jax, numpy as np
    >>> cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=4, cp_inner=2))
    >>> x = np.random.default_rng(0).normal(size=(1, 64, 8, 16)).astype(np.float32)
    >>> with hcp.context_parallel(cp, [x, np.arange(64)], [1, 0]) as (y, positions):
    ...     out = hcp.dot_product_attention(y, y, y, cp=cp, is_causal=True)
    >>> positions[:8].tolist()  # of the first device: the first and the last chunk
    [0, 1, 2, 3, 60, 61, 62, 63]
    >>> alone = jax.nn.dot_product_attention(x, x, x, is_causal=True)
    >>> bool(abs(cp.unshard_buffers(out, 1) - alone).max() < 1e-5)
    True
    """
    if not isinstance(cp, ContextParallel):
        raise ValueError(
            f"cp must be a hcp_jax.ContextParallel, got {type(cp).__name__}. (PyTorch's takes a "
            "device mesh: make a context of it, hcp.ContextParallel(mesh, ...).)"
        )
    yield cp.shard_buffers(buffers, seq_dims)
