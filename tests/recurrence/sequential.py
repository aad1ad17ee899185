"""What recurrent ops must equal: one token after the other, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def _step(delta, state, token):
    q, k, v, beta, decay, start = token
    state = jnp.where(start[:, None, None, None], 0, state) * decay[..., None]
    new = v - jnp.einsum("bhkv,bhk->bhv", state, k) if delta else v
    state = state + jnp.einsum("bhk,bhv->bhkv", k, new * beta[..., None])
    return state, jnp.einsum("bhkv,bhk->bhv", state, q)


def _run(delta, arrays, starts):
    q, k, v, beta, log_decay = arrays
    if log_decay.ndim == 3:
        log_decay = log_decay[..., None] * jnp.ones((1, 1, 1, q.shape[-1]))
    q, k = (jnp.repeat(x, v.shape[2] // q.shape[2], axis=2) for x in (q, k))
    tokens = [jnp.moveaxis(x, 1, 0) for x in (q, k, v, beta, jnp.exp(log_decay), starts)]
    state = jnp.zeros((v.shape[0], v.shape[2], q.shape[-1], v.shape[-1]))
    return jnp.moveaxis(jax.lax.scan(functools.partial(_step, delta), state, tokens)[1], 0, 1)


@functools.partial(jax.jit, static_argnums=0)
def _with_grads(delta, arrays, starts, cotangent):
    out, vjp = jax.vjp(lambda *x: _run(delta, x, starts), *arrays)
    return out, vjp(cotangent)


def sequential(delta, arrays, positions, cotangent):
    """Outputs, and the gradients of (q, k, v, beta, log_decay), in float64.

    `delta`: the delta rule; otherwise what a token writes is added (then `beta` is ones).
    """
    with jax.enable_x64(True):
        arrays = [jnp.asarray(np.asarray(x, np.float64)) for x in arrays]
        starts = np.broadcast_to(np.asarray(positions) == 0, arrays[0].shape[:2])
        out, grads = _with_grads(delta, arrays, starts, jnp.asarray(cotangent, jnp.float64))
        return np.asarray(out), [np.asarray(g) for g in grads]
