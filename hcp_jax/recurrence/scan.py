"""Pass the state of a recurrence over chunks, runs and devices: the whole scan is on this page.

What a chunk of tokens does to the state S [K, V] of a head is an affine map of fixed size,
S_out = A S_in + B, with A a matrix [K, K] (delta rules) or one number (state-space models). Maps
compose: (A2, B2) after (A1, B1) is (A2 A1, A2 B1 + B2). So the scan has three steps:

    1. fold      each device composes the maps of its chunks into one map per run
    2. devices   all-to-all: each device gets the maps of *all* runs for a share of the heads (or of
                 a head's columns, which do not mix); it scans them in stream order, log2 deep, and
                 a second all-to-all returns to each run the state that enters it
    3. replay    from that state, each device computes the state before each of its chunks

    stream order   run 0      run 1      run 2      run 3        layouts are a static permutation
    state          0 ──(A,B)── S1 ──(A,B)── S2 ──(A,B)── S3      of the runs in step 2

Two collectives each way, whose size does not depend on the number of tokens. A document start
inside a chunk gives A = 0: the state before it has no effect after it. The gradient is the same
scan in reverse order with Aᵀ: with G the gradient of the state before a chunk, the gradient of the
state *after* it is L = G' + A'ᵀ L', summed over later chunks; then dB = L and dA = L Sᵀ.

All of it is in float32 and its order of operations is fixed.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hcp_jax.cost.traffic import STATE_SCAN
from hcp_jax.parallel.stream import StreamOrder

Matrix = Float[Array, "n R B H Ka Kb"]  # [K, K], or [1, 1] for a number
State = Float[Array, "n R B H K V"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def states_before(a: Matrix, b: State, stream: StreamOrder) -> State:
    """Return the state before every chunk of every run; call it inside `shard_map`.

    Args:
        a: what the chunk multiplies the state by, `[K, K]`, or `[1, 1]` for one number per head.
        b: what the chunk adds to the state.
        stream: the order of the R runs over the devices.
    """
    return _sweep(a, b, stream, reverse=False)


def _forward(a: Matrix, b: State, stream: StreamOrder) -> tuple[State, Any]:
    states = _sweep(a, b, stream, reverse=False)
    return states, (a, states)


def _backward(stream: StreamOrder, residuals: Any, cotangent: State) -> tuple[Matrix, State]:
    a, states = residuals
    after = _sweep(jnp.swapaxes(a, -1, -2), cotangent, stream, reverse=True)
    if _is_number(a):
        return jnp.sum(after * states, axis=(-2, -1), keepdims=True), after
    return _matmul(after, jnp.swapaxes(states, -1, -2)), after


states_before.defvjp(_forward, _backward)


def _sweep(a: Matrix, b: State, stream: StreamOrder, *, reverse: bool) -> State:
    entering = jnp.zeros_like(b[0])
    if stream.devices * stream.runs > 1:
        run_a, run_b = _fold(a, b, reverse)
        with jax.named_scope(STATE_SCAN):
            entering = _entering(run_a, run_b, stream, reverse)

    def replay(state: Any, chunk: Any) -> tuple[Any, Any]:
        a, b = chunk
        return _act(a, state) + b, state

    return jax.lax.scan(replay, entering, (a, b), reverse=reverse)[1]


def _fold(a: Matrix, b: State, reverse: bool) -> Any:
    """Compose the maps of the chunks of each run into one."""
    first = -1 if reverse else 0
    rest = slice(None, -1) if reverse else slice(1, None)
    chunks = (a[rest], b[rest])
    return jax.lax.scan(
        lambda run, chunk: (_then(run, chunk), None), (a[first], b[first]), chunks, reverse=reverse
    )[0]


def _entering(
    a: Float[Array, "R B H Ka Kb"], b: Float[Array, "R B H K V"], stream: StreamOrder, reverse: bool
) -> Float[Array, "R B H K V"]:
    """Return the state that enters each run, from the maps of the runs of all devices."""
    heads, columns = b.shape[2], b.shape[-1]
    blocks = stream.devices // math.gcd(stream.devices, heads)  # of the columns of one head
    b = jnp.pad(b, [(0, 0)] * 4 + [(0, -columns % blocks)])
    shares = b.reshape(*b.shape[:4], blocks, -1)  # [R, B, H, K, blocks, v]
    shares = jnp.moveaxis(shares, 4, 3).reshape(*b.shape[:2], heads * blocks, b.shape[3], -1)
    exchange = functools.partial(jax.lax.all_to_all, axis_name=stream.axes, tiled=True)
    if stream.devices > 1:
        a = exchange(jnp.repeat(a, blocks, axis=2), split_axis=2, concat_axis=0)
        shares = exchange(shares, split_axis=2, concat_axis=0)

    in_order = np.argsort(stream.order)[:: -1 if reverse else 1]
    prefix = jax.lax.associative_scan(_then, (a[in_order], shares[in_order]))[1]
    before = jnp.concatenate([jnp.zeros_like(prefix[:1]), prefix[:-1]])[np.argsort(in_order)]

    if stream.devices > 1:
        before = exchange(before, split_axis=0, concat_axis=2)
    before = before.reshape(*b.shape[:3], blocks, b.shape[3], -1)
    return jnp.moveaxis(before, 3, 4).reshape(b.shape)[..., :columns]


def _then(first: Any, second: Any) -> Any:
    """Compose two maps: `first` is earlier in the direction of the scan."""
    return _act(second[0], first[0]), _act(second[0], first[1]) + second[1]


def _act(a: Array, x: Array) -> Array:
    return a * x if _is_number(a) else _matmul(a, x)


def _is_number(a: Array) -> bool:
    return a.shape[-2:] == (1, 1)


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")
