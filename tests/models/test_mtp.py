"""Multi-token prediction against its definition, token by token, and on every mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hcp_jax as hcp
from hcp_jax.models.mtp import MTP, look_ahead, losses_by_depth
from hcp_jax.parallel.halo import short_conv
from hcp_jax.parallel.placing import Gathered

T, D, V, DEPTHS = 29, 8, 12, 2
SIZES = [(1, 2, 7, 12), (T,)]  # the documents of each row; the first row ends with padding


def batch(seed=0):
    rng = np.random.default_rng(seed)
    tokens, targets = rng.integers(1, V, (2, 2, T)).astype(np.int32)
    positions, weights = np.zeros((2, T), np.int32), np.zeros((2, T), np.float32)
    for row, sizes in enumerate(SIZES):
        positions[row, : sum(sizes)] = np.concatenate([np.arange(n) for n in sizes])
        weights[row, : sum(sizes)] = 1
    return tokens, targets, weights, positions


def expected(depth):
    """Token by token: the place further on if it is in the same document."""
    tokens, targets, weights, _ = batch()
    found = np.zeros((3, 2, T))
    for row, sizes in enumerate(SIZES):
        first = 0
        for size in sizes:
            for i in range(first, first + size - depth):
                found[:, row, i] = [x[row, i + depth] for x in (tokens, targets, weights)]
            first += size
    return found


@pytest.mark.parametrize("depth", [1, 2, 8])
def test_places_further_on_are_of_the_same_document(depth):
    got = look_ahead(*batch(), depth)
    np.testing.assert_array_equal(np.stack(got), expected(depth))
    tokens, *others = batch()
    lazy = look_ahead(Gathered(tokens, lambda places: 10 * places), *others, depth)
    np.testing.assert_array_equal(lazy.tokens.whole(), 10 * expected(depth)[0])


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_on_devices_they_are_rolled_across_borders(layout):
    cp = hcp.ContextParallel(hcp.make_mesh(dp=2, cp_outer=2, cp_inner=2), "p2p", layout=layout)
    placed = [cp.shard(x) for x in batch()]
    got = jax.jit(lambda *x: [look_ahead(*x, depth, cp=cp) for depth in (1, 5)])(*placed)
    for ahead, depth in zip(got, (1, 5), strict=True):
        np.testing.assert_array_equal(
            np.stack([cp.unshard(x, length=T) for x in ahead]), expected(depth)
        )


class Layer(nnx.Module):
    """A convolution along the stream, so that documents and borders count."""

    def __init__(self, rngs):
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (3, 1, D)))

    def __call__(self, x, positions, cp):
        (y,) = short_conv([x[:, :, None]], [self.weight[...]], positions, cp=cp)
        return x + jnp.tanh(y[:, :, 0])


class Model(nnx.Module):
    """Embedding and depths."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (V, D)))
        self.mtp = MTP(D, DEPTHS, Layer, rngs=rngs)

    def losses(self, hidden, aheads, positions, cp):
        table = self.embedding[...]
        embedded = [table[ahead.tokens] for ahead in aheads]
        outputs = self.mtp(
            hidden, embedded, lambda layer, x: x + layer(x, positions=positions, cp=cp)
        )
        return losses_by_depth(outputs, table, aheads, cp=cp, chunk=4), outputs


@functools.cache
def model():
    graph, state = nnx.split(Model())
    return graph, nnx.to_pure_dict(state)


def run(cp):
    graph, params = model()
    hidden = np.random.default_rng(3).standard_normal((2, T, D), np.float32)
    tokens, targets, weights, positions = batch()
    aheads = [look_ahead(tokens, targets, weights, positions, d) for d in range(1, DEPTHS + 1)]
    put = (lambda x: x) if cp is None else cp.shard
    arrays = jax.tree.map(put, (hidden, aheads, positions))

    @jax.jit
    def step(params, hidden, aheads, positions):
        def mean(params, hidden):
            (sums, counts), outputs = nnx.merge(graph, params).losses(hidden, aheads, positions, cp)
            return jnp.mean(sums / counts), (sums, counts, outputs)

        return jax.value_and_grad(mean, (0, 1), has_aux=True)(params, hidden)

    (loss, (sums, counts, outputs)), (dparams, dhidden) = step(params, *arrays)
    if cp is not None:
        outputs, dhidden = jax.tree.map(lambda x: cp.unshard(x, length=T), (outputs, dhidden))
    return loss, sums, counts, outputs, dparams, dhidden


@functools.cache
def alone():
    return run(None)


def test_losses_are_those_of_the_definition():
    _, sums, counts, outputs, *_ = alone()
    table = np.asarray(model()[1]["embedding"], np.float64)
    for depth, (got, count, output) in enumerate(zip(sums, counts, outputs, strict=True), 1):
        _, targets, weights = expected(depth)
        logits = np.asarray(output, np.float64) @ table.T
        log_z = np.log(np.exp(logits).sum(-1))
        target = np.take_along_axis(logits, targets[..., None].astype(int), -1)[..., 0]
        np.testing.assert_allclose(got, ((log_z - target) * weights).sum(), rtol=1e-5)
        assert count == weights.sum()


def test_every_depth_feeds_the_next():
    # The last depth's loss has gradients in all depths' parameters.
    _, _, _, _, dparams, _ = alone()
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(dparams["mtp"]))


def test_losses_and_gradients_are_the_same_on_devices():
    cp = hcp.ContextParallel(hcp.make_mesh(tp=2, cp_outer=2, cp_inner=2), "p2p")
    for got, want in zip(jax.tree.leaves(run(cp)), jax.tree.leaves(alone()), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


def test_wrong_calls_are_refused():
    with pytest.raises(ValueError, match="depth"):
        look_ahead(*batch(), 0)
    mtp = MTP(4, 2, lambda rngs: nnx.Linear(4, 4, rngs=rngs), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="MTP has 2 depths, but there are embeddings for 1"):
        mtp(jnp.ones((1, 2, 4)), [jnp.ones((1, 2, 4))], lambda layer, x: layer(x))
