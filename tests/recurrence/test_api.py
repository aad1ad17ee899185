"""Recurrences over devices are those of one token after the other, in float64."""

import zlib

import jax
import numpy as np
import pytest

import hcp_jax as hcp
from hcp_jax.recurrence.api import delta_rule, state_space
from tests.recurrence.sequential import sequential

TOLERANCE = 1e-5
RULES = ("state_space", "delta", "delta_per_channel")
# Log decays: none to speak of, all at once, and everything between within one stream.
DECAYS = {"near 1": (-12, -6), "near 0": (1, 4), "mixed": (-8, 4)}


def context(sizes, layout="zigzag"):
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    return hcp.ContextParallel(hcp.make_mesh(**sizes, devices=devices), "p2p", layout=layout)


def random_positions(rng, rows, length):
    """Positions in documents of random lengths, some of one token; row 0 has no border."""
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    for row in positions[1:]:
        starts = np.flatnonzero(rng.random(length) < rng.choice([0.03, 0.3]))
        for start in starts:
            row[start:] = np.arange(length - start)
    return positions


def problem(rule, *, seed, rows=2, length=45, groups=2, heads=4, key=4, value=3, decays="mixed"):
    """Arrays in the order (q, k, v, beta, log_decay), positions and a cotangent."""
    rng = np.random.default_rng(seed)
    q, k, v, dout = (
        rng.standard_normal((rows, length, *size), np.float32)
        for size in ((groups, key), (groups, key), (heads, value), (heads, value))
    )
    if rule != "state_space":
        k /= np.linalg.norm(k, axis=-1, keepdims=True)
    beta = rng.random((rows, length, heads), np.float32)
    if rule == "state_space":
        beta = np.ones_like(beta)
    shape = (rows, length, heads, *([key] if rule == "delta_per_channel" else []))
    log_decay = -np.exp(rng.uniform(*DECAYS[decays], shape)).astype(np.float32)
    return (q, k, v, beta, log_decay), random_positions(rng, rows, length), dout


def op(rule, arrays, positions, **options):
    q, k, v, beta, log_decay = arrays
    if rule == "state_space":
        return state_space(q, k, v * beta[..., None], log_decay, positions, **options)
    return delta_rule(q, k, v, beta, log_decay, positions, **options)


def on_devices(rule, cp, chunk, arrays, positions, dout):
    """Outputs and gradients in natural order, from arrays in cp's layout."""
    length = dout.shape[1]

    @jax.jit
    def run(arrays, positions, dout):
        out, vjp = jax.vjp(lambda *x: op(rule, x, positions, cp=cp, chunk=chunk), *arrays)
        return out, vjp(dout)

    if cp is None:
        return run(arrays, positions, dout)
    placed = [cp.shard(x) for x in arrays]
    return jax.tree.map(
        lambda x: np.asarray(cp.unshard(x, length=length)),
        run(placed, cp.shard(positions), cp.shard(dout)),
    )


def worst(got, expected):
    """The largest error of any array, relative to the array's largest element."""
    errors = jax.tree.map(lambda a, b: np.abs(a - b).max() / np.abs(b).max(), got, expected)
    return max(jax.tree.leaves(errors))


def check(rule, cp, chunk, **sizes):
    arrays, positions, dout = problem(rule, **sizes)
    out, grads = on_devices(rule, cp, chunk, arrays, positions, dout)
    expected_out, expected = sequential(rule != "state_space", arrays, positions, dout)
    if rule == "state_space":  # beta is not an argument of it
        grads, expected = (g[:3] + g[4:] for g in (tuple(grads), tuple(expected)))
    error = worst((out, tuple(grads)), (expected_out, tuple(expected)))
    assert error < TOLERANCE, error


# One device; both layouts; numbers of devices that are no power of two; heads that C does not
# divide, so that columns of a head are shared out; runs shorter than a chunk, and much longer.
CASES = [
    ("state_space", None, "zigzag", 16, {}),
    ("state_space", {"cp_outer": 2, "cp_inner": 3}, "zigzag", 4, {"decays": "near 1"}),
    ("state_space", {"cp_outer": 8}, "contiguous", 64, {"heads": 6, "decays": "near 0"}),
    ("delta", None, "zigzag", 16, {"decays": "near 1"}),
    ("delta", {"cp_inner": 3}, "contiguous", 4, {}),
    ("delta", {"cp_outer": 4, "cp_inner": 2}, "zigzag", 2, {"decays": "near 0", "length": 65}),
    ("delta_per_channel", {"cp_outer": 2, "dp": 2, "tp": 2}, "zigzag", 8, {}),
    ("delta_per_channel", {"cp_inner": 4}, "zigzag", 16, {"decays": "near 1", "length": 130}),
]


@pytest.mark.parametrize(("rule", "sizes", "layout", "chunk", "other"), CASES)
def test_outputs_and_gradients_are_those_of_one_token_after_the_other(
    rule, sizes, layout, chunk, other
):
    cp = None if sizes is None else context(sizes, layout)
    check(rule, cp, chunk, seed=zlib.crc32(repr((rule, sizes)).encode()), **other)
