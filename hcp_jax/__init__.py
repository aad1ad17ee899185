"""Provide hierarchical context parallelism for JAX on GPU device meshes.

    import hcp_jax as hcp

    mesh = hcp.make_mesh(dp=1, tp=1, cp_outer=2, cp_inner=4)
    cp = hcp.ContextParallel(mesh, comm_type="a2a+p2p")
    out = hcp.dot_product_attention(q, k, v, cp=cp, mask=hcp.causal())

The names below are the public interface. They are imported on first use, so that the command line
can set up the platform, and `hcp_jax.dynamic` can schedule, before anything imports jax.
"""

from typing import TYPE_CHECKING

from hcp_jax.base.lazy import lazy_names

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
    "ContextParallel": "hcp_jax.parallel.context",
    "Mask": "hcp_jax.sequence.mask",
    "attention_fn": "hcp_jax.attention.flax",
    "bidirectional": "hcp_jax.sequence.mask",
    "causal": "hcp_jax.sequence.mask",
    "check": "hcp_jax.verify.check",
    "chunked_local": "hcp_jax.sequence.mask",
    "context_parallel": "hcp_jax.parallel.with_buffers",
    "documents": "hcp_jax.sequence.mask",
    "dot_product_attention": "hcp_jax.attention.api",
    "dynamic": "hcp_jax.dynamic",
    "from_dense": "hcp_jax.sequence.dense_mask",
    "intervals": "hcp_jax.sequence.mask",
    "lengths": "hcp_jax.sequence.mask",
    "make_mesh": "hcp_jax.parallel.mesh",
    "place_microbatch": "hcp_jax.parallel.microbatch",
    "plan": "hcp_jax.planner.search",
    "prefix_lm": "hcp_jax.sequence.mask",
    "set_up_platform": "hcp_jax.cli",
    "sliding_window": "hcp_jax.sequence.mask",
    "viz": "hcp_jax.viz",
    "xla_flags": "hcp_jax.parallel.mesh",
}

__getattr__, __dir__, __all__ = lazy_names(__name__, _HOME)
