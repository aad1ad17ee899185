"""The embedding table's lookup, when the vocabulary is cut over tp.

Each device looks up the tokens whose rows it has and the devices of tp add up. It is written per
device (`shard_map`) because left to the partitioner, a table that FSDP has cut makes it move the
activations instead, and whole.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32

from hcp_jax.context import ContextParallel


def lookup(
    table: Float[Array, "V D"],
    tokens: Int32[Array, "B T"],
    dtype: str,
    cp: ContextParallel | None = None,
) -> Float[Array, "B T D"]:
    """The row of every token, in `dtype`; the gradient adds up in the table's own.

    Args:
        table: one row per token of the vocabulary; cut over tp if there is one.
        tokens: ids, cut over dp and the cp axes.
        dtype: of the result.
        cp: None for one device.
    """
    if cp is None:
        return jnp.take(table, tokens, axis=0).astype(dtype)
    tp = live_axes(cp, cp.tp)

    def on_device(table, tokens):
        if not tp:
            return jnp.take(table, tokens, axis=0).astype(dtype)
        row = tokens - jax.lax.axis_index(tp) * table.shape[0]
        here = (row >= 0) & (row < table.shape[0])
        rows = jnp.take(table, jnp.where(here, row, 0), axis=0).astype(dtype)
        return jax.lax.psum(jnp.where(here[..., None], rows, 0), tp)

    return jax.shard_map(
        on_device,
        mesh=cp.mesh,
        in_specs=(PartitionSpec(tp or None, None), cp.spec(2)),
        out_specs=cp.spec(3),
        check_vma=False,
    )(table, tokens)


def live_axes(cp: ContextParallel, axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Those of `axes` that run over more than one device.

    >>> import hcp_jax as hcp
    >>> live_axes(hcp.ContextParallel(hcp.make_mesh(cp_outer=8)), ("cp_outer", "cp_inner"))
    ('cp_outer',)
    """
    names = (axes,) if isinstance(axes, str) else tuple(axes or ())
    return tuple(name for name in names if cp.mesh.shape[name] > 1)
