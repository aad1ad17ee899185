"""Run user programs for `hcp.check` on a mesh or on one device, and compare their results."""

import contextlib
import dataclasses
import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from hcp_jax.parallel.context import ContextParallel
from hcp_jax.parallel.padding import PaddingWarning
from hcp_jax.verify.repairs import Order, Trial


class Subject(NamedTuple):
    """Program under check, in a common form.

    Attributes:
        call: function of (params, batch, cp) that returns the outputs.
        params: parameters for `call`, on the host.
        is_model: True if it takes a batch that is already in the layout.
    """

    call: Callable[[Any, Any, ContextParallel], Any]
    params: Any
    is_model: bool


def make_subject(program: Callable[..., Any], params: Any, cp: ContextParallel) -> Subject:
    """Return a program in the common form; `hcp.check` lists the accepted signatures.

    Raises:
        ValueError: if the program has another signature.
    """
    count = _arguments(program)
    is_module = isinstance(program, nnx.Module)
    if params is not None:
        if count != 3 or is_module:
            raise ValueError(
                "with params, hcp.check needs a function f(params, batch, cp), got "
                f"{_named(program)} with {count} arguments."
            )
        return Subject(program, params, False)
    if is_module and count == 2:
        graph, state = nnx.split(program)
        return Subject(lambda s, batch, cp: nnx.merge(graph, s)(batch, cp), state, True)
    if not is_module and count == 2:
        return Subject(lambda _, batch, cp: program(batch, cp), (), False)
    if is_module or count != 1:
        raise ValueError(
            f"hcp.check cannot run {_named(program)}, which takes {count} arguments, on one device "
            "and on the mesh: it needs a function f(batch, cp), or f(params, batch, cp) with "
            "params=..., a model called as model(batch, cp), or build(cp) that returns a model "
            "called as model(batch), such as lambda cp: Model(cp, rngs=nnx.Rngs(0))."
        )
    return _built(program, cp)


def _built(build: Callable[..., Any], cp: ContextParallel) -> Subject:
    """Build a model for each mesh; both must have the same parameters."""
    made = {c: build(c) for c in (cp, one_device(cp))}
    if not all(isinstance(model, nnx.Module) for model in made.values()):
        return Subject(lambda _, batch, cp: made[cp](batch), (), True)
    graphs, states = {}, []
    for c, model in made.items():
        graphs[c], state = nnx.split(model)
        states.append([on_host(x) for x in jax.tree.leaves(state)])
    for here, alone in zip(*states, strict=True):
        if isinstance(here, np.ndarray) and not np.array_equal(here, alone, equal_nan=True):
            raise ValueError(
                "hcp.check built the model twice and got different parameters; build it from a "
                "fixed seed, such as lambda cp: Model(cp, rngs=nnx.Rngs(0))."
            )
    return Subject(lambda s, batch, cp: nnx.merge(graphs[cp], s)(batch), state, True)


class Ran(NamedTuple):
    """Results of a program.

    Attributes:
        outputs: output arrays by name.
        inputs: names of the arrays that gradients are taken of.
        pull: returns the gradients, from a cotangent for each output (None for an integer output).
    """

    outputs: dict[str, np.ndarray]
    inputs: list[str]
    pull: Callable[[list[Any]], list[np.ndarray]]


def ran(
    subject: Subject, batch: Any, cp: ContextParallel, trial: Trial, batch_gradients: bool = True
) -> Ran:
    """Run a program, and prepare its gradients.

    Args:
        subject: the program.
        batch: batch on the host in natural order, or in the layout if the program needs it so.
        cp: context to run under.
        trial: repairs applied to the program.
        batch_gradients: also take gradients of the arrays in the batch.
    """
    paths, structure = jax.tree.flatten_with_path((subject.params, batch))
    leaves = [leaf for _, leaf in paths]
    number = len(jax.tree.leaves(subject.params))
    varied = [i for i, x in enumerate(leaves) if is_float(x) and (batch_gradients or i < number)]

    def program(values: list[Any]) -> Any:
        given = list(leaves)
        for i, value in zip(varied, values, strict=True):
            given[i] = value
        params, batch = jax.tree.unflatten(structure, given)
        outputs = subject.call(params, _placed(batch, cp) if subject.is_model else batch, cp)
        return jax.tree.map(jnp.asarray, outputs)

    with _on(cp):
        values = [jnp.asarray(leaves[i]) for i in varied]
        closed, shape = jax.make_jaxpr(program, return_shape=True)(values)
        run = jax.jit(functools.partial(trial.run, closed))
        outputs = run(*values)

    def gradients(cotangents: list[Any]) -> list[np.ndarray]:
        filled = [
            np.zeros(x.shape, jax.dtypes.float0) if c is None else jnp.asarray(c)
            for x, c in zip(outputs, cotangents, strict=True)
        ]
        with _on(cp):
            grads = [np.asarray(x) for x in jax.vjp(run, *values)[1](filled)]
        # A weight of 0 hides a token, such as the one that wraps around at the stream's end; its
        # gradient would tell what stands there.
        return [
            g if i < number else np.where(leaves[i] == 0, np.zeros_like(g), g)
            for i, g in zip(varied, grads, strict=True)
        ]

    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(shape)]
    inputs = [
        ("params" if i < number else "batch") + jax.tree_util.keystr(paths[i][0][1:])
        for i in varied
    ]
    return Ran(dict(zip(names, map(np.asarray, outputs), strict=True)), inputs, gradients)


def compare(here: Ran, alone: Ran, order: Order, tolerance: float) -> dict[str, float]:
    """Return the largest error over the largest value, for every output and gradient.

    Arrays on the mesh may be in the layout or in natural order; the order that fits better counts.
    Gradients are compared only if the outputs agree.

    Raises:
        ValueError: if the names of the outputs differ.
    """
    if here.outputs.keys() != alone.outputs.keys():
        raise ValueError(
            f"the outputs are {list(here.outputs)}, but on one device {list(alone.outputs)}."
        )
    rng = np.random.default_rng(0)
    differences, cotangents = {}, []
    for name, want in alone.outputs.items():
        got = here.outputs[name]
        differences[f"output {name}".rstrip()], best = _best(got, want, order)
        own = rng.normal(size=want.shape).astype(want.dtype) if is_float(want) else None
        cotangents.append((own, own if own is None else _in_layout(own, got, order, best)))
    if any(error > tolerance for error in differences.values()):
        return differences
    mine = here.pull([c for _, c in cotangents])
    theirs = alone.pull([c for c, _ in cotangents])
    # Some gradients are zero except for rounding (such as that of the keys' bias), so their own
    # largest value is no scale for errors.
    least = 1e-3 * max((np.abs(want).max(initial=0) for want in theirs), default=0)
    for name, got, want in zip(alone.inputs, mine, theirs, strict=True):
        differences[f"gradient of {name}"], _ = _best(got, want, order, float(least))
    return differences


def one_device(cp: ContextParallel) -> ContextParallel:
    """Return a context with the same axes, all of size 1."""
    mesh = cp.mesh
    grid = np.asarray(mesh.devices.flat[:1]).reshape((1,) * len(mesh.axis_names))
    alone = Mesh(grid, mesh.axis_names, axis_types=mesh.axis_types)
    comm_type: Any = "p2p" if isinstance(cp.comm_type, str) else ("p2p",) * len(cp.comm_type)
    return dataclasses.replace(
        cp, mesh=alone, comm_type=comm_type, layout="contiguous", head_groups=1
    )


def on_host(x: Any) -> Any:
    """Return an array on the host; random number keys are returned unchanged."""
    if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return x
    return np.asarray(x)


def is_float(x: Any) -> bool:
    """Return whether `x` is an array of floating-point numbers."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)


def _placed(batch: Any, cp: ContextParallel) -> Any:
    """Return a batch in the layout; its arrays may be traced."""
    if not isinstance(batch, dict):
        return cp.shard(batch, dim=1)
    traced = {k: x for k, x in batch.items() if isinstance(x, jax.core.Tracer)}
    placed = cp.shard_batch({k: x for k, x in batch.items() if k not in traced})
    return placed | {k: cp.shard(x, dim=1) if x.ndim > 1 else x for k, x in traced.items()}


@contextlib.contextmanager
def _on(cp: ContextParallel) -> Iterator[None]:
    """Use `cp`'s mesh, and ignore the padding warning: the comparison covers it."""
    outside = jax.sharding.get_abstract_mesh()
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", PaddingWarning)
        if not outside.empty:
            stack.enter_context(jax.set_mesh(cp.mesh))
        yield


def _best(
    got: np.ndarray, want: np.ndarray, order: Order, least: float = 0
) -> tuple[float, int | None]:
    """Return the error in the order that fits better, and the dim that is in the layout or None."""
    dims: list[int | None] = [None]
    if got.ndim == want.ndim:
        dims += [d for d, size in enumerate(got.shape) if size == order.length >= want.shape[d]]
    return min(
        ((_error(_natural(got, want, order, dim), want, least), dim) for dim in dims),
        key=lambda pair: pair[0],
    )


def _natural(got: np.ndarray, want: np.ndarray, order: Order, dim: int | None) -> np.ndarray:
    """Return an output in natural order without padding; unchanged if `dim` is None."""
    if dim is None:
        return got
    return np.take(got, np.argsort(order.index)[: want.shape[dim]], axis=dim)


def _in_layout(x: np.ndarray, like: np.ndarray, order: Order, dim: int | None) -> np.ndarray:
    """Return a natural-order array in the order of an output on the mesh; inverse of `_natural`."""
    if dim is None:
        return x
    more = [(0, like.shape[d] - size if d == dim else 0) for d, size in enumerate(x.shape)]
    return np.take(np.pad(x, more), order.index, axis=dim)


def _error(got: np.ndarray, want: np.ndarray, least: float) -> float:
    """Return the largest error over the largest value, or over `least` if that is larger.

    Return inf if the shapes differ, or if NaNs or infinities are at different positions.
    """
    if got.shape != want.shape:
        return math.inf
    if not is_float(want):
        return float(np.any(got != want))
    got, want = got.astype(np.float64), want.astype(np.float64)
    finite = np.isfinite(want)
    if not np.array_equal(finite, np.isfinite(got)):
        return math.inf
    scale = max(np.abs(want[finite]).max(initial=0), least) or 1.0
    return float(np.abs(got[finite] - want[finite]).max(initial=0) / scale)


def _arguments(program: Callable[..., Any]) -> int:
    """Return the number of required positional arguments of a program."""
    given = inspect.signature(program).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in given)


def _named(program: Any) -> str:
    return getattr(program, "__name__", type(program).__name__)
