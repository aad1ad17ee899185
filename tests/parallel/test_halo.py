"""Neighbours in stream order, and convolutions over them, against NumPy."""

import itertools

import jax
import numpy as np
import pytest

import hcp_jax as hcp
from hcp_jax.compiled.hlo import collectives
from hcp_jax.cost import traffic
from hcp_jax.parallel.halo import short_conv


def context(sizes, layout):
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    return hcp.ContextParallel(hcp.make_mesh(**sizes, devices=devices), "p2p", layout=layout)


def convolved(x, weight, bias, positions):
    """y_i = bias + Σ_w weight[W-1-w] x[i-w] over the tokens of i's own document."""
    y, width = np.zeros(x.shape) + bias, weight.shape[0]
    for row, i, w in itertools.product(*map(range, (*x.shape[:2], width))):
        if positions[row % len(positions), i] >= w and i >= w:
            y[row, i] += weight[width - 1 - w] * x[row, i - w]
    return y


def problem(length, width, seed=0):
    rng = np.random.default_rng(seed)
    x, dy = rng.standard_normal((2, 2, length, 4, 3), np.float32)
    weight, bias = (
        rng.standard_normal((width, 4, 3), np.float32),
        rng.standard_normal((4, 3), np.float32),
    )
    positions = np.tile(np.arange(length, dtype=np.int32), (2, 1))
    for start in np.flatnonzero(rng.random(length) < 0.2):
        positions[1, start:] = np.arange(length - start)
    return x, dy, weight, bias, positions


# (mesh, layout, tokens, width); in the last three, a run is shorter than the halo.
CASES = [
    ({"cp_outer": 2, "cp_inner": 4}, "zigzag", 53, 4),
    ({"dp": 2, "cp_outer": 2, "tp": 2}, "contiguous", 24, 3),
    pytest.param({"cp_outer": 3}, "zigzag", 11, 5, marks=pytest.mark.slow),
    ({"cp_inner": 8}, "zigzag", 16, 6),
    ({"cp_inner": 6}, "contiguous", 12, 4),
]


@pytest.mark.parametrize(("sizes", "layout", "length", "width"), CASES)
def test_a_convolution_sees_the_tokens_before_its_run_and_no_other_document(
    sizes, layout, length, width
):
    cp = context(sizes, layout)
    x, dy, weight, bias, positions = problem(length, width)

    @jax.jit
    def run(x, weight, bias, positions, dy):
        def conv(x, weight, bias):
            return short_conv([x], [weight], positions, cp=cp, biases=[bias])[0]

        y, vjp = jax.vjp(conv, x, weight, bias)
        return y, *vjp(dy)

    y, dx, dweight, dbias = run(cp.shard(x), weight, bias, cp.shard(positions), cp.shard(dy))
    expected = convolved(x, weight, bias, positions)
    np.testing.assert_allclose(cp.unshard(y, length=length), expected, rtol=1e-5, atol=1e-5)
    # The convolution is bilinear, so its gradients are its values on unit vectors.
    unit = np.zeros_like(x)
    for row, i in ((1, 0), (1, length // 2), (0, length - 1)):
        unit[:] = 0
        unit[row, i] = 1
        effect = (convolved(unit, weight, 0 * bias, positions) * dy).sum((0, 1))
        np.testing.assert_allclose(
            cp.unshard(dx, length=length)[row, i], effect, rtol=1e-4, atol=1e-5
        )
    for w in range(width):
        tap = np.zeros_like(weight)
        tap[w] = 1
        effect = (convolved(x, tap, 0 * bias, positions) * dy).sum((0, 1))
        np.testing.assert_allclose(dweight[w], effect, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dbias, dy.sum((0, 1)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_a_halo_moves_what_the_list_says(layout):
    cp = context({"cp_outer": 2, "cp_inner": 4}, layout)
    x, _, weight, _, positions = problem(64, 4)
    shapes = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=cp.sharding(a.ndim)) for a in (x, positions)
    ]
    step = jax.jit(lambda x, positions: short_conv([x], [weight], positions, cp=cp)[0])
    found = collectives(step.lower(*shapes).compile().as_text())
    (listed, _) = traffic.halo_traffic(
        cp.cp_axes,
        cp.mesh.shape,
        runs=2 if layout == "zigzag" else 1,
        rows=2,
        halo=3,
        channels=(12,),
        item_bytes=4,
    )
    assert {(c.kind, c.bytes) for c in found} == {(listed.kind, listed.bytes)}
    assert sum(c.count for c in found) == listed.count * listed.arrays


def test_wrong_calls_are_refused():
    x, _, weight, _, positions = problem(8, 4)
    with pytest.raises(ValueError, match="positions must have the shape"):
        short_conv([x], [weight], positions[:, :5])
    with pytest.raises(ValueError, match=r"needs arrays \[B, T, H, D\] and weights"):
        short_conv([x], [weight[:, :3]], positions)
    with pytest.raises(ValueError, match="8 tokens are not a whole layout"):
        short_conv([x], [weight], positions, cp=context({"cp_outer": 8}, "zigzag"))
