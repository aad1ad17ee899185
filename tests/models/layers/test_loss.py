import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import hcp_jax as hcp
from hcp_jax.models.layers.loss import cross_entropy_by_bin, summed_cross_entropy

B, T, D, V = 2, 48, 8, 32


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    return (
        rng.normal(size=(B, T, D)).astype(np.float32),
        rng.normal(size=(V, D)).astype(np.float32),
        rng.integers(0, V, (B, T)).astype(np.int32),
        rng.choice([0.0, 1.0, 0.5], (B, T)).astype(np.float32),
    )


def dense(hidden, unembedding, targets, weights, z_loss=0.0):
    logits = jnp.einsum("btd,vd->btv", hidden, unembedding, precision="highest")
    log_z = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * (log_z - chosen + z_loss * log_z**2))


def grads(loss, problem):
    value_and_grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    return jax.tree.leaves(value_and_grad(*problem))


def assert_same(got, expected, tolerance=2e-6):
    for a, b in zip(got, expected, strict=True):
        assert np.max(np.abs(a - b)) <= tolerance * np.max(np.abs(b))


@pytest.fixture(scope="module")
def expected(problem):
    return grads(functools.partial(dense, z_loss=0.01), problem)


@pytest.mark.parametrize("chunk", [1, 10, 1000])
def test_chunked_loss_is_the_unchunked_one(problem, expected, chunk):
    loss = functools.partial(summed_cross_entropy, chunk=chunk, z_loss=0.01)
    assert_same(grads(loss, problem), expected)


@pytest.mark.parametrize(
    "sizes",
    [{"cp_outer": 4, "cp_inner": 2}, {"dp": 2, "tp": 2, "cp_inner": 2}, {"tp": 4, "cp_outer": 2}],
    ids=str,
)
def test_loss_over_a_mesh_is_the_loss_of_one_device(problem, expected, sizes):
    cp = hcp.ContextParallel(hcp.make_mesh(**sizes), comm_type="p2p")
    hidden, unembedding, targets, weights = problem
    loss = functools.partial(summed_cross_entropy, cp=cp, chunk=8, z_loss=0.01)
    placed = (cp.shard(hidden), unembedding, cp.shard(targets), cp.shard(weights))
    total, dhidden, dunembedding = grads(loss, placed)
    assert_same((total, cp.unshard(dhidden), dunembedding), expected)


def test_gradient_of_the_output_matrix_adds_up_in_float32():
    ones = jnp.ones((1, 4096, 1), jnp.bfloat16)
    unembedding = jnp.zeros((2, 1), jnp.float32)
    loss = functools.partial(summed_cross_entropy, chunk=1)
    targets = jnp.zeros((1, 4096), jnp.int32)
    grad = jax.jit(jax.grad(loss, argnums=1))(ones, unembedding, targets, jnp.ones((1, 4096)))
    # 4096 times a half; a bf16 sum would stick at 256 of them.
    np.testing.assert_array_equal(grad, [[-2048.0], [2048.0]])


@pytest.mark.parametrize("cp_size", [1, 8])
def test_logits_of_a_sequence_never_exist(cp_size):
    length, vocabulary, chunk = 4096, 4096, 64
    cp = None
    if cp_size > 1:
        cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=cp_size), comm_type="p2p")
    loss = jax.grad(functools.partial(summed_cross_entropy, cp=cp, chunk=chunk), argnums=(0, 1))
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((1, length, D), jnp.float32),
            ((vocabulary, D), jnp.float32),
            ((1, length), jnp.int32),
            ((1, length), jnp.float32),
        )
    ]
    memory = jax.jit(loss).lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    of_one_chunk = 4 * chunk * vocabulary  # a device's own tokens have 8 times as much, or 64
    assert memory < 5 * of_one_chunk


def equations(jaxpr, inside=()):
    """Every equation of a program, with the names of the primitives around it."""
    for eqn in jaxpr.eqns:
        yield eqn, inside
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner, (*inside, eqn.primitive.name))


def test_gradient_of_the_output_matrix_crosses_devices_once_and_not_for_every_chunk(problem):
    cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=8), comm_type="p2p")
    loss = jax.grad(functools.partial(summed_cross_entropy, cp=cp, chunk=2), argnums=(0, 1))
    traced = jax.make_jaxpr(loss)(*problem)
    sums = [inside for eqn, inside in equations(traced.jaxpr) if "psum" in eqn.primitive.name]
    assert sums
    assert not [inside for inside in sums if "scan" in inside]


def test_weightless_tokens_count_nothing(problem):
    hidden, unembedding, targets, weights = problem
    other = np.where(weights == 0, (targets + 1) % V, targets)
    a, b = (summed_cross_entropy(hidden, unembedding, t, weights) for t in (targets, other))
    assert a == b


NUM_BINS = 5


@pytest.mark.parametrize(
    "sizes",
    [{}, {"cp_outer": 4, "cp_inner": 2}, {"dp": 2, "tp": 2, "cp_inner": 2}],
    ids=str,
)
def test_losses_by_bin_are_those_of_the_bins_tokens_on_any_mesh(problem, sizes):
    hidden, unembedding, targets, weights = problem
    bins = np.random.default_rng(1).integers(0, NUM_BINS, (B, T)).astype(np.int32)
    by_bin = functools.partial(cross_entropy_by_bin, num_bins=NUM_BINS, chunk=8)
    if sizes:
        cp = hcp.ContextParallel(hcp.make_mesh(**sizes), comm_type="p2p")
        placed = (cp.shard(x) for x in (targets, weights, bins))
        sums, counts = jax.jit(functools.partial(by_bin, cp=cp))(
            cp.shard(hidden), unembedding, *placed
        )
    else:
        sums, counts = jax.jit(by_bin)(hidden, unembedding, targets, weights, bins)
    # Every device of a row has summed its own tokens.
    assert sums.shape == (B, cp.size if sizes else 1, NUM_BINS)
    sums, counts = (np.sum(x, axis=1) for x in (sums, counts))
    for number in range(NUM_BINS):
        chosen = np.where(bins == number, weights, 0)
        for row in range(B):
            one = (x[row : row + 1] for x in (hidden, targets, chosen))
            expected = dense(next(one), unembedding, *one)
            np.testing.assert_allclose(sums[row, number], expected, rtol=2e-6)
        np.testing.assert_allclose(counts[:, number], chosen.sum(axis=1))
