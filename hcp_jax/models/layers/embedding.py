"""Look up token embeddings in a table that may be cut over tp.

Each device looks up the tokens whose rows it holds, and the results are summed over tp. This is
written per device (`shard_map`): with a table cut by FSDP, XLA's partitioner would move the whole
activations instead. The gradient is written here as well: it is summed in the table's dtype, on the
device and then over devices, while the table itself travels in the dtype in which it is used.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, Int32

from hcp_jax.parallel import spmd
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.parallel.mesh import as_tuple


def lookup(
    table: Float[Array, "V D"],
    tokens: Int32[Array, "B T"],
    dtype: str,
    cp: ContextParallel | None = None,
) -> Float[Array, "B T D"]:
    """Return the embedding of every token in `dtype`; the gradient is summed in the table's dtype.

    Args:
        table: one row per token of the vocabulary; cut over tp if there is a tp axis.
        tokens: token ids, cut over dp and the cp axes.
        dtype: dtype of the result.
        cp: context; None for one device.
    """
    spec = _Table(table.shape, table.dtype, dtype, cp)
    if cp is None:
        return _lookup(spec, table, tokens)
    look = functools.partial(_lookup, spec)
    return spmd.run(cp.mesh, cp.axes, look, cp.spec(3), table, tokens)


class _Table(NamedTuple):
    """Static facts of a lookup."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    in_dtype: str
    cp: ContextParallel | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lookup(spec: _Table, table, tokens):
    # Cast before it is gathered, so that a table that is cut travels in the dtype of the result.
    table, cp = table.astype(spec.in_dtype), spec.cp
    if cp is None:
        return jnp.take(table, tokens, axis=0)
    tp = live_tp(cp)

    def on_device(table, tokens):
        row, here = _own_rows(table.shape[0], tokens, tp)
        rows = jnp.where(here[..., None], jnp.take(table, row, axis=0), 0)
        return jax.lax.psum(rows, tp) if tp else rows

    table_spec = PartitionSpec(tp or None, None)
    return spmd.shard_map(cp.mesh, cp.axes, on_device, (table_spec, cp.spec(2)), cp.spec(3))(
        table, tokens
    )


def _forward(spec: _Table, table, tokens):
    return _lookup(spec, table, tokens), tokens


def _backward(spec: _Table, tokens, cotangent):
    cp = spec.cp
    tp = live_tp(cp)
    sum_over = () if cp is None else live_axes(cp, cp.dp) + live_axes(cp, cp.cp_axes)

    def on_device(tokens, cotangent):
        size = spec.shape[0] // (1 if cp is None else cp.axis_size(tp))
        # The barrier makes the zeros wait for the cotangent. Otherwise XLA writes them before the
        # layers' backward pass, and holds the memory of a table throughout it.
        zero, cotangent = jax.lax.optimization_barrier((jnp.zeros((), spec.dtype), cotangent))
        row, here = _own_rows(size, tokens, tp)
        rows = jnp.where(here[..., None], cotangent, 0).astype(spec.dtype)
        grads = jnp.broadcast_to(zero, (size, spec.shape[1])).at[row].add(rows)
        return jax.lax.psum(grads, sum_over) if sum_over else grads

    if cp is None:
        return on_device(tokens, cotangent), None
    table_spec = PartitionSpec(tp or None, None)
    grads = spmd.shard_map(cp.mesh, cp.axes, on_device, (cp.spec(2), cp.spec(3)), table_spec)
    return grads(tokens, cotangent), None


_lookup.defvjp(_forward, _backward)


def _own_rows(size: int, tokens, tp: tuple[str, ...]):
    """Return each token's row in this device's part of the table, and whether it is there."""
    if not tp:
        return tokens, jnp.ones_like(tokens, bool)
    row = tokens - jax.lax.axis_index(tp) * size
    here = (row >= 0) & (row < size)
    return jnp.where(here, row, 0), here


def live_axes(cp: ContextParallel, axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Return those of `axes` that cut arrays here: axes of several devices that are not Manual.

    >>> import hcp_jax as hcp
    >>> live_axes(hcp.ContextParallel(hcp.make_mesh(cp_outer=8)), ("cp_outer", "cp_inner"))
    ('cp_outer',)
    """
    names = as_tuple(axes)
    manual = spmd.manual_axes(cp.mesh_in_context, names)
    return tuple(name for name in names if cp.mesh.shape[name] > 1 and name not in manual)


def live_tp(cp: ContextParallel | None) -> tuple[str, ...]:
    """Return the mesh axes that weights are cut over for tensor parallelism.

    Every part of a model calls this first, so that unsupported cases are refused in all of them.

    Raises:
        NotImplementedError: if a `shard_map` around the call has made one of them Manual, because
            the part of a weight that is here would be unknown; or if it leaves other axes Explicit,
            because jax cannot yet differentiate `auto_axes` inside a `shard_map`.
    """
    if cp is None:
        return ()
    if spmd.inside_shard_map() and AxisType.Explicit in cp.mesh_in_context.axis_types:
        raise NotImplementedError(
            "models cannot run inside a shard_map that leaves other axes Explicit; make the mesh's "
            "axes Auto (hcp.make_mesh does), or call the model outside of the shard_map."
        )
    manual = spmd.manual_axes(cp.mesh_in_context, as_tuple(cp.tp))
    if any(cp.mesh.shape[name] > 1 for name in manual):
        raise NotImplementedError(
            f"the model was called inside a shard_map over its tp axis ({', '.join(manual)}). "
            "Leave tp out of the shard_map's axis_names; attention itself takes it."
        )
    return live_axes(cp, cp.tp)
