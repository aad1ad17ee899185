"""First derivatives in reverse mode; all others are refused in words, in jit and outside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hcp_jax as hcp

X = jax.random.normal(jax.random.key(0), (1, 16, 2, 16))


def loss(x, implementation):
    return jnp.sum(
        hcp.dot_product_attention(x, x, x, is_causal=True, implementation=implementation) ** 2
    )


REFUSED = {
    "jvp": ("Forward mode", lambda f: lambda x: jax.jvp(f, (x,), (x,))),
    "jacfwd": ("Forward mode", jax.jacfwd),
    "jacfwd of jit": ("Forward mode", lambda f: jax.jacfwd(jax.jit(f))),
    "linearize": ("Forward mode", lambda f: lambda x: jax.linearize(f, x)[1](x)),
    "hessian": ("mode|second order", jax.hessian),
    "hessian product": (
        "mode|second order",
        lambda f: lambda x: jax.jvp(jax.grad(f), (x,), (x,))[1],
    ),
    "grad of grad": (
        "second order",
        lambda f: jax.grad(lambda x: jnp.sum(jax.grad(f)(x) ** 2)),
    ),
    "by the cotangent": (
        "second order",
        lambda f: lambda x: jax.grad(lambda c: jnp.sum(jax.vjp(f, x)[1](c)[0]))(jnp.ones(())),
    ),
}


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("implementation", ["reference", "blockwise", "triton"])
@pytest.mark.parametrize("what", REFUSED)
def test_derivatives_that_attention_lacks_are_refused_in_words(what, implementation, jit):
    message, transform = REFUSED[what]
    derivative = transform(lambda x: loss(x, implementation))
    with pytest.raises(NotImplementedError, match=message):
        (jax.jit(derivative) if jit else derivative)(X)


def test_refusing_them_does_not_change_the_gradient():
    def plain(x):
        return loss(x, "blockwise")

    want = jax.grad(plain)(X)
    two = jnp.stack([X, X])
    ways = {
        "jit": jax.jit(jax.grad(plain))(X),
        "remat": jax.grad(jax.checkpoint(plain))(X),
        "grad of vmap": jax.grad(lambda x: jnp.sum(jax.vmap(plain)(x)))(two)[0],
        "vmap of grad": jax.vmap(jax.grad(jax.jit(plain)))(two)[1],
        "scan": jax.grad(
            lambda x: jax.lax.scan(lambda c, _: (c + plain(x), None), 0.0, None, length=1)[0]
        )(X),
        "jacrev": jax.jacrev(plain)(X),
    }
    for way, got in ways.items():
        assert np.allclose(got, want, atol=1e-5), way
