"""Recurrences and convolutions under groupings: every document comes out as if it were alone."""

import functools

import jax
import numpy as np
import pytest

import hcp_jax as hcp
from hcp_jax import dynamic
from hcp_jax.dynamic import Microbatch
from hcp_jax.parallel.halo import short_conv
from hcp_jax.parallel.microbatch import place_microbatch
from hcp_jax.recurrence.api import delta_rule, state_space
from tests.recurrence.sequential import sequential

M = 13
# Documents on four devices, on two, on one, and a device without any.
DOCUMENTS = Microbatch((4, 2, 1, 1), ((0, 3), (1, 2), (), (4, 5, 6)))
LENGTHS = (30, 17, 6, 16, 7, 1, 4)
POSITIONS = np.concatenate([np.arange(n) for n in LENGTHS])[None]
NO_TOKEN = 50.0  # in empty slots; nothing may come of it


@functools.cache
def context(widest):
    mesh = hcp.make_mesh(dp=2, cp_outer=2, cp_inner=2)
    return hcp.ContextParallel(mesh, "a2a+p2p", widest_group=widest)


def slots():
    """The packed buffers, and the token in each slot, -1 for none."""
    packed = dynamic.pack(DOCUMENTS, LENGTHS, M)
    begins = np.append(np.cumsum(LENGTHS) - LENGTHS, -1)
    return packed, begins[packed.document] + packed.position


def placed(cp, arrays):
    packed, index = slots()
    held = index >= 0
    buffers = {
        name: np.where(
            held.reshape(*held.shape, *[1] * (x.ndim - 1)),
            x[index],
            0 if name == "dout" else NO_TOKEN,
        ).astype(np.float32)
        for name, x in arrays.items()
    }
    return place_microbatch(cp, packed, buffers)


def check(found, expected, tolerance=1e-5):
    index = slots()[1]
    held = index >= 0
    got = np.asarray(found).reshape(*index.shape, *found.shape[2:])[held]
    want = expected[index[held]]
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


@pytest.mark.parametrize(
    ("rule", "widest"),
    [("delta_per_channel", 4), pytest.param("state_space", 8, marks=pytest.mark.slow)],
)
def test_a_document_of_a_group_comes_out_as_if_alone(rule, widest):
    cp, delta = context(widest), rule != "state_space"
    rng = np.random.default_rng(3)
    tokens, groups, heads, key, value = sum(LENGTHS), 1, 3, 4, 5  # neither divides the block
    q, k = (rng.standard_normal((tokens, groups, key)) for _ in range(2))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v, dout = (rng.standard_normal((tokens, heads, value)) for _ in range(2))
    beta = rng.random((tokens, heads)) if delta else np.ones((tokens, heads))
    decay = -np.exp(rng.uniform(-8, 3, (tokens, heads, *([key] if delta else []))))
    arrays = {"q": q, "k": k, "v": v, "beta": beta, "decay": decay}
    batch = placed(cp, {**arrays, "dout": dout})

    @jax.jit
    def step(batch):
        def run(q, k, v, beta, decay):
            options = {"cp": cp, "order": batch["mask"].intervals.end, "chunk": 8}
            if delta:
                return delta_rule(q, k, v, beta, decay, batch["positions"], **options)
            return state_space(q, k, v, decay, batch["positions"], **options)

        out, vjp = jax.vjp(run, *(batch[name] for name in arrays))
        return out, vjp(batch["dout"])

    out, grads = step(batch)
    exact, exact_grads = sequential(
        delta, [x[None] for x in arrays.values()], POSITIONS, dout[None]
    )
    check(out, exact[0])
    for name, got, want in zip(arrays, grads, exact_grads, strict=True):
        if delta or name != "beta":
            check(got, want[0])


def test_a_short_convolution_sees_nothing_of_another_document():
    cp = context(4)
    rng = np.random.default_rng(4)
    x = rng.standard_normal((sum(LENGTHS), 3, 2))  # 6 channels on 4 devices
    weight = rng.standard_normal((4, 3, 2)).astype(np.float32)
    bias = rng.standard_normal((3, 2)).astype(np.float32)
    batch = placed(cp, {"x": x, "dout": np.ones_like(x)})

    @jax.jit
    def step(weight, bias, batch):
        def conv(x, weight, bias):
            order = batch["mask"].intervals.end
            return short_conv([x], [weight], batch["positions"], cp=cp, order=order, biases=[bias])

        (y,), vjp = jax.vjp(conv, batch["x"], weight, bias)
        return y, vjp([batch["dout"]])

    y, (dx, dweight, dbias) = step(weight, bias, batch)
    expected, dx_expected, dw_expected = np.zeros_like(x), np.zeros_like(x), np.zeros((4, 3, 2))
    for i, position in enumerate(POSITIONS[0]):
        expected[i] = bias
        for back in range(min(position + 1, 4)):
            expected[i] += weight[3 - back] * x[i - back]
            dx_expected[i - back] += weight[3 - back]
            dw_expected[3 - back] += x[i - back]
    check(y, expected)
    check(dx, dx_expected)
    np.testing.assert_allclose(dweight, dw_expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dbias, np.full((3, 2), len(x)), rtol=1e-5)


def test_an_order_is_needed_with_groups_and_refused_without():
    x, weight = np.ones((1, 8, 1, 1), np.float32), np.ones((4, 1, 1), np.float32)
    positions = np.arange(8, dtype=np.int32)[None]
    with pytest.raises(ValueError, match=r"give order=mask\.intervals\.end"):
        short_conv([x], [weight], positions, cp=context(4))
    with pytest.raises(ValueError, match="order is for contexts with groups"):
        short_conv([x], [weight], positions, order=positions + 1)
