"""Provide hierarchical context parallelism for JAX on GPU device meshes.

    import hcp_jax as hcp

    mesh = hcp.make_mesh(dp=1, tp=1, cp_outer=2, cp_inner=4)
    cp = hcp.ContextParallel(mesh, comm_type="a2a+p2p")
    out = hcp.dot_product_attention(q, k, v, cp=cp, mask=hcp.causal())

The names below are the public interface. They are imported on first use, so that the command line
can set up the platform, and `hcp_jax.dynamic` can schedule, before anything imports jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hcp_jax import dynamic as dynamic
    from hcp_jax import viz as viz
    from hcp_jax.attention.api import dot_product_attention as dot_product_attention
    from hcp_jax.attention.flax import attention_fn as attention_fn
    from hcp_jax.cli import set_up_platform as set_up_platform
    from hcp_jax.parallel.context import ContextParallel as ContextParallel
    from hcp_jax.parallel.mesh import make_mesh as make_mesh
    from hcp_jax.parallel.mesh import xla_flags as xla_flags
    from hcp_jax.parallel.microbatch import place_microbatch as place_microbatch
    from hcp_jax.parallel.with_buffers import context_parallel as context_parallel
    from hcp_jax.planner.search import plan as plan
    from hcp_jax.sequence.dense_mask import from_dense as from_dense
    from hcp_jax.sequence.mask import Mask as Mask
    from hcp_jax.sequence.mask import bidirectional as bidirectional
    from hcp_jax.sequence.mask import causal as causal
    from hcp_jax.sequence.mask import chunked_local as chunked_local
    from hcp_jax.sequence.mask import documents as documents
    from hcp_jax.sequence.mask import intervals as intervals
    from hcp_jax.sequence.mask import lengths as lengths
    from hcp_jax.sequence.mask import prefix_lm as prefix_lm
    from hcp_jax.sequence.mask import sliding_window as sliding_window
    from hcp_jax.verify.check import check as check

__version__ = "0.1.0"

_HOME = {
    "ContextParallel": "parallel.context",
    "Mask": "sequence.mask",
    "attention_fn": "attention.flax",
    "bidirectional": "sequence.mask",
    "causal": "sequence.mask",
    "check": "verify.check",
    "chunked_local": "sequence.mask",
    "context_parallel": "parallel.with_buffers",
    "documents": "sequence.mask",
    "dot_product_attention": "attention.api",
    "from_dense": "sequence.dense_mask",
    "intervals": "sequence.mask",
    "lengths": "sequence.mask",
    "make_mesh": "parallel.mesh",
    "place_microbatch": "parallel.microbatch",
    "plan": "planner.search",
    "prefix_lm": "sequence.mask",
    "set_up_platform": "cli",
    "sliding_window": "sequence.mask",
    "xla_flags": "parallel.mesh",
}

_ROOMS = ("dynamic", "viz")

__all__ = sorted([*_HOME, *_ROOMS])


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"hcp_jax.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'hcp_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"hcp_jax.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
