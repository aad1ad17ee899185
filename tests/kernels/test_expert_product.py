"""Products of experts against every row alone, in float64: interpreted anywhere, compiled on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hcp_jax.kernels.expert_product import How, describe, product, resolve
from hcp_jax.kernels.expert_triton import tiles_of_rows

TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}
M, K, N, E = 29, 11, 70, 5  # no multiple of any tile; 9 blocks of columns, so two chunks of them
LOADS = {
    "uneven": [10, 0, 7, 1, 11],
    "padding": [3, 4, 0, 9, 2],
    "one expert": [0, 29, 0, 0, 0],
    "no rows": [0, 0, 0, 0, 0],
}
COMPILED = pytest.param("compiled", marks=pytest.mark.gpu)


def how_of(name: str) -> How:
    if name == "compiled":
        return How("triton", jax.devices()[0].device_kind)
    return How(name, "cpu", interpret=True)


@functools.partial(jax.jit, static_argnums=0)
def values(how, x, weights, sizes, dout):
    out, back = jax.vjp(lambda x, weights: product(how, x, weights, sizes), x, weights)
    return out, *back(dout)


@functools.cache
def arrays(dtype):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=s), dtype) for s in ((M, K), (E, K, N), (M, N))]


def exact(x, weights, sizes, dout):
    """Return out, dx and dw of rows in float64, expert by expert."""
    x, weights, dout = (np.asarray(a, np.float64) for a in (x, weights, dout))
    out, dx, dw = (np.zeros(s) for s in ((M, N), (M, K), (E, K, N)))
    ends = np.cumsum(sizes)
    for e, (first, end) in enumerate(zip(ends - sizes, ends, strict=True)):
        rows = slice(first, end)
        out[rows], dx[rows] = x[rows] @ weights[e], dout[rows] @ weights[e].T
        dw[e] = x[rows].T @ dout[rows]
    return out, dx, dw


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ["triton", COMPILED])
def test_output_and_gradients_are_those_of_each_row_alone(name, dtype, load):
    x, weights, dout = arrays(dtype)
    sizes = jnp.asarray(LOADS[load], jnp.int32)
    found = values(how_of(name), x, weights, sizes, dout)
    for got, right in zip(found, exact(x, weights, LOADS[load], dout), strict=True):
        assert got.dtype == dtype
        error = np.max(np.abs(np.asarray(got, np.float64) - right))
        assert error <= TOLERANCE[dtype] * np.max(np.abs(right))
    again = values(how_of(name), x, weights, sizes, dout)
    assert all(map(np.array_equal, found, again))


def test_rows_behind_the_experts_and_their_neighbours_do_not_mix():
    """What is not finite in one expert's rows stays there; products with zero would spread it."""
    x, weights, dout = arrays("float32")
    sizes = jnp.asarray([3, 4, 0, 9, 2], jnp.int32)
    bad = jnp.full((), jnp.nan)
    x, dout = x.at[3:7].set(bad).at[18:].set(bad), dout.at[18:].set(bad)
    out, dx, dw = values(how_of("triton"), x, weights, sizes, dout)
    assert np.array_equal(np.isnan(out).any(1), (np.arange(M) >= 3) & (np.arange(M) < 7))
    assert not np.isnan(dx).any()
    assert not np.any(out[18:])
    assert not np.any(dx[18:])
    assert np.array_equal(np.isnan(dw).any((1, 2)), [False, True, False, False, False])


@pytest.mark.parametrize("tile", [1, 4, 64])
def test_tiles_cover_every_row_once_and_are_few(tile):
    rng = np.random.default_rng(tile)
    for rows in (1, 57):
        for _ in range(5):
            sizes = rng.multinomial(rows, rng.dirichlet(np.full(7, 0.3)))[:6]
            tiles = np.asarray(tiles_of_rows(jnp.asarray(sizes, jnp.int32), rows, tile))
            assert len(tiles) <= rows / tile + 7
            covered = np.concatenate(
                [
                    np.stack([np.full(n, e), np.arange(f, f + n)], 1)
                    for e, f, end in tiles
                    for n in [max(0, min(tile, end - f))]
                ]
            )
            owner = np.repeat(np.arange(7), [*sizes, rows - sizes.sum()])
            assert np.array_equal(covered[np.argsort(covered[:, 1])].T, [owner, np.arange(rows)])
            # A program of an expert computes its products: no more tiles than its rows need.
            assert sum(tiles[:, 0] < 6) == sum(-(-sizes // tile))


def test_what_is_named_is_taken_or_refused():
    """`None` on GPUs: see test_trust.py."""
    assert resolve(None, "bfloat16", "cpu", "cpu").implementation == "ragged_dot"
    assert resolve("triton", "float32", "cpu", "cpu").interpret
    assert resolve("triton", "bfloat16", "cuda", "NVIDIA H200").implementation == "triton"
    told = describe("triton", "bfloat16", "gpu", "NVIDIA H200")
    assert told.startswith("triton (tiles of 128 rows")
    assert "all experts" in describe("ragged_dot", "bfloat16", "gpu", "NVIDIA H200")
    with pytest.raises(ValueError, match="there are triton, ragged_dot"):
        resolve("cublas", "bfloat16", "gpu", "NVIDIA H200")
    with pytest.raises(NotImplementedError, match=r"float64.*Use 'ragged_dot'"):
        resolve("triton", "float64", "gpu", "NVIDIA H200")


@pytest.mark.parametrize(
    ("x", "weights", "sizes", "words"),
    [
        ((4, 3), (2, 5, 6), (2,), "do not fit"),
        ((4, 3), (2, 3, 6), (3,), "do not fit"),
        ((4, 3), (3, 6), (3,), r"weights \[E, K, N\]"),
        ((0, 3), (2, 3, 6), (2,), "at least one row"),
    ],
)
def test_bad_shapes_are_refused(x, weights, sizes, words):
    with pytest.raises(ValueError, match=words):
        product(How("ragged_dot"), jnp.ones(x), jnp.ones(weights), jnp.ones(sizes, jnp.int32))


def test_two_dtypes_are_refused():
    x, weights = jnp.ones((4, 3), jnp.bfloat16), jnp.ones((2, 3, 6))
    with pytest.raises(ValueError, match="one dtype, got bfloat16 and float32"):
        product(How("ragged_dot"), x, weights, jnp.ones(2, jnp.int32))
    with pytest.raises(ValueError, match="int32, got float32"):
        product(How("ragged_dot"), weights[0, :, :3], weights, jnp.ones(2))
