"""What a call shows of a mistake is refused at the call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import hcp_jax as hcp
from hcp_jax.attention.refusals import CutSequenceError
from hcp_jax.parallel.placing import MaskLengthError


def _cut(spec, explicit=False, length=32):
    kind = AxisType.Explicit if explicit else AxisType.Auto
    mesh = jax.make_mesh((2, 4), ("rows", "cols"), axis_types=(kind,) * 2)
    x = jnp.ones((2, length, 4, 8))
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_arrays_that_are_cut_along_the_sequence_need_cp(which, explicit):
    """Without cp the layout's order would be taken for the natural one."""
    arrays = [jnp.ones((2, 32, 4, 8)) for _ in range(3)]
    arrays[which] = _cut((None, "cols"), explicit)
    with pytest.raises(CutSequenceError, match=f"^{'qkv'[which]} is cut along its sequence"):
        hcp.dot_product_attention(*arrays)


def test_tracers_over_explicit_axes_are_checked_too():
    x = _cut((None, "cols"), explicit=True)
    with jax.set_mesh(x.sharding.mesh), pytest.raises(CutSequenceError, match="Pass cp=cp"):
        jax.jit(lambda x: hcp.dot_product_attention(x, x, x))(x)


@pytest.mark.parametrize("spec", [("rows",), (None, None, "cols"), ("rows", None, "cols")])
def test_arrays_that_are_cut_over_rows_and_heads_need_none(spec):
    x = _cut(spec)
    assert hcp.dot_product_attention(x, x, x, is_causal=True).shape == x.shape


@pytest.mark.parametrize(
    ("ids", "tokens", "devices"), [(100, 128, None), (100, 128, 8), (9, 32, 8)]
)
def test_a_mask_of_another_length_is_refused_unless_padding_explains_it(ids, tokens, devices):
    cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=devices)) if devices else None
    mask = hcp.causal() & hcp.documents(np.zeros(ids, np.int32))
    q = jnp.ones((1, tokens, 1, 8))
    q = q if cp is None else cp.shard(q)
    for call in (
        hcp.dot_product_attention,
        jax.jit(hcp.dot_product_attention, static_argnames="cp"),
    ):
        with pytest.raises(
            MaskLengthError, match=f"written for {ids} queries.* but there are {tokens}"
        ):
            call(q, q, q, cp=cp, mask=mask)


def test_a_mask_of_the_length_before_padding_is_taken():
    cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=8))
    mask = hcp.causal() & hcp.documents(np.zeros(27, np.int32))
    q = cp.shard(jnp.ones((1, 27, 1, 8)))
    assert hcp.dot_product_attention(q, q, q, cp=cp, mask=mask).shape == (1, 32, 1, 8)
