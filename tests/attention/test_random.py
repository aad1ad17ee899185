"""Random masks, lengths and windows against the dense oracle; one compile per strategy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hcp_jax as hcp
from tests import oracle

T = 21
X = oracle.inputs(T, 4, 2, 8, 8)


@st.composite
def cases(draw):
    """A mask of two rows as the library builds it and as a boolean matrix."""
    i, j = np.arange(T)[:, None], np.arange(T)[None]
    ids = np.array([np.repeat(draw(st.permutations([1, 0, 2, 3])), [2, 4, 9, 6]) for _ in range(2)])
    left, right = draw(st.integers(0, T)), draw(st.integers(0, T))
    lengths = np.array([draw(st.integers(0, T)) for _ in range(2)])
    mask = hcp.sliding_window(left + 1, right=right) & hcp.lengths(lengths)
    dense = np.broadcast_to((j >= i - left) & (j <= i + right), (2, T, T))
    dense = dense & (np.maximum(i, j) < lengths[:, None, None])
    if draw(st.booleans()):
        mask = mask & hcp.documents(ids, padding_id=0)
        dense = dense & (ids[:, :, None] == ids[:, None]) & (ids != 0)[:, :, None]
    return (hcp.from_dense(dense[:, None]) if draw(st.booleans()) else mask), dense


@functools.cache
def program(comm_type):
    """The op and its gradients on eight devices, for numbers of any mask."""
    cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=4, cp_inner=2), comm_type)

    @jax.jit
    def run(x, mask):
        def loss(q, k, v, sinks):
            out, lse = hcp.dot_product_attention(
                q, k, v, cp=cp, mask=mask, sinks=sinks, logits_soft_cap=3.0, return_residual=True
            )
            seen = jnp.where(lse == -jnp.inf, 0, lse)
            return jnp.sum(out * x.dout) + jnp.sum(seen * x.dlse), (out, lse)

        (_, aux), grads = jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)(*x[:4])
        return *aux, *grads

    return cp, run


@pytest.mark.slow
@pytest.mark.parametrize("comm_type", ["p2p", "a2a+all_gather"])
@settings(max_examples=25)
@given(case=cases(), sinks=st.booleans())
def test_random_masks_are_exact(comm_type, case, sinks):
    mask, dense = case
    cp, run = program(comm_type)
    x = X._replace(sinks=X.sinks if sinks else np.full_like(X.sinks, -np.inf))
    cut = oracle.Inputs(*(cp.shard(a) if a.ndim > 1 else a for a in x))
    *got, dsinks = run(cut, cp.place(mask, T))
    want = oracle.attention(X, dense, soft_cap=3.0, sinks=sinks)
    for name, a in zip(want._fields, got, strict=False):
        error = oracle.relative(cp.unshard(a, 1, T), getattr(want, name))
        assert error <= 3e-6, f"{name}: {error}"
    if sinks:
        assert oracle.relative(dsinks, want.dsinks) <= 3e-6
