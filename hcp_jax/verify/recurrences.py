"""Measure the error of recurrences over a mesh, against one token after the other in float64."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hcp_jax.cost.recurrence import Recurrence
from hcp_jax.models.config import ModelConfig
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.recurrence.api import delta_rule, state_space
from hcp_jax.verify import measures
from hcp_jax.verify.measures import Check

EXACT = 1e-5  # float32 against float64, largest error over largest value


def checks(cp: ContextParallel, model: ModelConfig, length: int) -> Iterator[Check]:
    """Compare outputs and gradients of each kind of recurrent layer, for packed documents.

    Args:
        cp: context over the mesh.
        model: gives the layers.
        length: tokens of a stream, without padding.
    """
    rng = np.random.default_rng(0)
    layers: dict[tuple[str, Recurrence], list[int]] = {}
    for layer, spec in enumerate(model.specs):
        if spec.mixer.recurrence is not None:
            layers.setdefault((spec.mixer.kind, spec.mixer.recurrence), []).append(layer)
    rows = cp.axis_size(cp.dp)
    cuts = np.sort(rng.integers(1, length, (rows, 7)), axis=1)
    begins = np.concatenate([np.zeros((rows, 1), np.int64), cuts], axis=1)
    which = np.stack([np.searchsorted(row, np.arange(length), side="right") for row in cuts])
    positions = np.arange(length) - np.take_along_axis(begins, which, axis=1)
    for (kind, recurrence), numbers in layers.items():
        inputs = random_inputs(rng, recurrence, (rows, length))
        exact = sequential(recurrence, inputs, positions == 0)
        placed = {name: cp.shard(x.astype(np.float32)) for name, x in inputs.items()}
        found = computed(cp, recurrence, placed, cp.shard(positions.astype(np.int32)))
        errors = {
            name: measures.relative(
                np.asarray(cp.unshard(found[name], dim=1, length=length), np.float64), want
            )
            for name, want in exact.items()
        }
        cells = {"layers": ", ".join(map(str, numbers)), "mixer": kind}
        cells |= {name: f"{error:.1e}" for name, error in errors.items()}
        yield Check(cells, max(errors.values()) <= EXACT)


def random_inputs(
    rng: np.random.Generator, recurrence: Recurrence, shape: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Return inputs of a recurrence in float64, with strong and weak decays, and a cotangent."""
    heads, key_heads = recurrence.heads, recurrence.key_heads
    q, k = (rng.normal(size=(*shape, key_heads, recurrence.key_size)) for _ in range(2))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    q /= recurrence.key_size**0.5
    v, dout = (rng.normal(size=(*shape, heads, recurrence.value_size)) for _ in range(2))
    channels = (recurrence.key_size,) if recurrence.channel_decays else ()
    inputs = {"q": q, "k": k, "v": v, "dout": dout}
    inputs["decay"] = -np.exp(rng.uniform(-7, 2, (*shape, heads, *channels)))
    if recurrence.matrix:
        inputs["beta"] = rng.uniform(0, 1, (*shape, heads))
    return inputs


def sequential(
    recurrence: Recurrence, inputs: dict[str, np.ndarray], starts: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the output, and the gradients of the inputs, one token after the other in float64."""
    with jax.enable_x64(True):
        found = _sequential(recurrence, {n: jnp.asarray(x) for n, x in inputs.items()}, starts)
        return {name: np.asarray(x) for name, x in found.items()}


@functools.partial(jax.jit, static_argnums=0)
def _sequential(recurrence: Recurrence, inputs: Any, starts: Any) -> Any:
    def token(state: Any, now: Any) -> tuple[Any, Any]:
        q, k, v, beta, decay, start = now
        state = jnp.where(start[:, None, None, None], 0, state) * jnp.exp(decay)
        known = jnp.einsum("bhkv,bhk->bhv", state, k) if recurrence.matrix else 0
        state = state + jnp.einsum("bhk,bhv->bhkv", k, (v - known) * beta[..., None])
        return state, jnp.einsum("bhkv,bhk->bhv", state, q)

    def run(q: Any, k: Any, v: Any, decay: Any, beta: Any) -> Any:
        q, k = (jnp.repeat(x, recurrence.heads // recurrence.key_heads, axis=2) for x in (q, k))
        decay = decay.reshape(*decay.shape[:3], -1, 1)
        state = jnp.zeros((*v.shape[::2], recurrence.key_size, recurrence.value_size), v.dtype)
        tokens = [jnp.moveaxis(x, 1, 0) for x in (q, k, v, beta, decay, starts)]
        return jnp.moveaxis(jax.lax.scan(token, state, tokens)[1], 0, 1)

    return _with_gradients(run, inputs)


@functools.partial(jax.jit, static_argnums=(0, 1))
def computed(
    cp: ContextParallel, recurrence: Recurrence, inputs: Any, positions: Any, order: Any = None
) -> Any:
    """Return the output, and the gradients of the inputs, over the mesh.

    Args:
        cp: context.
        recurrence: kind and sizes.
        inputs: arrays of `random_inputs`, on the devices.
        positions: position of each token in its document.
        order: with groups, one past the global index of each token.
    """
    options: Any = {"cp": cp, "order": order, "chunk": recurrence.chunk}

    def run(q: Any, k: Any, v: Any, decay: Any, beta: Any) -> Any:
        if recurrence.matrix:
            return delta_rule(q, k, v, beta, decay, positions, **options)
        return state_space(q, k, v, decay, positions, **options)

    return _with_gradients(run, inputs)


def _with_gradients(run: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return `run`'s output, and the gradients of its inputs by name; beta is 1 if not given."""
    beta = jnp.ones(inputs["v"].shape[:3], inputs["v"].dtype)
    names = [name for name in ("q", "k", "v", "decay", "beta") if name in inputs]

    def loss(*arrays: Any) -> Any:
        out = run(**({"beta": beta} | dict(zip(names, arrays, strict=True))))
        return jnp.sum(out * inputs["dout"]), out

    grads, out = jax.grad(loss, range(len(names)), has_aux=True)(*(inputs[n] for n in names))
    return {"out": out} | {f"d{name}": g for name, g in zip(names, grads, strict=True)}
