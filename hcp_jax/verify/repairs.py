"""Run a traced program with suspected mistakes repaired.

A mistake in the order of tokens, such as `np.arange` for positions, is visible in the program's
jaxpr: a value along the sequence is in natural order while the arrays around it are in a layout.
`Trial` evaluates the jaxpr with such values repaired. If the difference from one device disappears,
that was the mistake. The library's own functions are left unchanged.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from hcp_jax.parallel.context import ContextParallel
from hcp_jax.sequence.layout import global_index

# Names of the library's jitted functions in a jaxpr.
_ATTENTION = "_jitted"
_OWN = (_ATTENTION, "_reorder", "_restore", "_roll")

ALONE, POSITIONS, SHIFTS = "attention without cp", "positions in natural order", "shifts"


@dataclasses.dataclass(frozen=True)
class Order:
    """Order of a padded stream of `length` tokens in the layout of `cp`."""

    cp: ContextParallel
    length: int

    @functools.cached_property
    def index(self) -> np.ndarray:
        """Global index of each token, in layout order."""
        return global_index(self.length, self.cp.size, self.cp.layout)

    def to_layout(self, x: Any) -> Any:
        """Reorder `x` from natural to layout order, along every dim as long as the stream."""
        return self._taken(x, self.index)

    def to_natural(self, x: Any) -> Any:
        """Reorder `x` from layout to natural order, along every dim as long as the stream."""
        return self._taken(x, np.argsort(self.index))

    def _taken(self, x: Any, index: np.ndarray) -> Any:
        for dim, size in enumerate(x.shape):
            if size == self.length:
                x = jnp.take(x, index, axis=dim)
        return x


@dataclasses.dataclass
class Trial:
    """Evaluation of a jaxpr with some kinds of mistakes repaired.

    Attributes:
        order: order of the tokens in the layout.
        repairs: kinds of mistakes to repair, out of `ALONE`, `POSITIONS` and `SHIFTS`.
        found: kinds of mistakes that the jaxpr shows signs of; filled in by `run`.
    """

    order: Order
    repairs: frozenset[str] = frozenset()
    found: set[str] = dataclasses.field(default_factory=set)

    def run(self, closed: core.ClosedJaxpr, *args: Any) -> list[Any]:
        """Evaluate the repaired program and return its outputs."""
        return self._evaluate(closed.jaxpr, closed.consts, args)

    def _evaluate(self, jaxpr: core.Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        values |= dict(zip(jaxpr.invars, args, strict=True))

        constants = set(jaxpr.constvars)

        def read(atom: Any, own: bool = False) -> Any:
            is_literal = isinstance(atom, core.Literal)
            value = atom.val if is_literal else values[atom]
            return self._constant(value) if not own and (is_literal or atom in constants) else value

        for equation in jaxpr.eqns:
            own = equation.primitive.name == "shard_map" or equation.params.get("name") in _OWN
            results = self._apply(equation, [read(atom, own) for atom in equation.invars])
            values |= dict(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _apply(self, equation: core.JaxprEqn, args: list[Any]) -> list[Any]:
        name = equation.params.get("name")
        inner: Any = equation.params.get("jaxpr")
        if name == _ATTENTION and self._is_alone(equation):
            if self._wanted(ALONE):
                results = _bind(equation, [self.order.to_natural(x) for x in args])
                return [self.order.to_layout(x) for x in results]
        elif equation.primitive.name in ("jit", "pjit") and name not in _OWN:
            return self.run(inner, *args)
        elif equation.primitive.name in ("scan", "while", "cond", "checkpoint", "remat2"):
            return _bind(equation, args, self._repaired)
        elif equation.primitive.name == "iota" and self._runs_along(equation):
            if self._wanted(POSITIONS):
                return [self.order.to_layout(x) for x in _bind(equation, args)]
        elif equation.primitive.name in ("slice", "dynamic_slice", "pad", "concatenate"):
            return self._shifted(equation, args)
        return _bind(equation, args)

    def _constant(self, x: Any) -> Any:
        """Return a constant; reorder it to the layout if it is a table indexed by position."""
        placed = isinstance(x, jax.Array) and len(x.sharding.device_set) > 1
        if placed or self.order.length not in np.shape(x) or not self._wanted(POSITIONS):
            return x
        return self.order.to_layout(x)

    def _shifted(self, equation: core.JaxprEqn, args: list[Any]) -> list[Any]:
        """Evaluate a cut or join along the sequence in natural order, and return its results."""
        length, result = self.order.length, _shape(equation.outvars[0])
        shapes = [x.shape for x in args if np.ndim(x) == len(result)]
        along = [
            (any(shape[d] == length for shape in shapes), size == length)
            for d, size in enumerate(result)
            if any(shape[d] != size for shape in shapes)
        ]
        cuts = any(before and not after for before, after in along)
        joins = any(after and not before for before, after in along)
        if not (cuts or joins) or not self._wanted(SHIFTS):
            return _bind(equation, args)
        if cuts:
            return _bind(equation, [self.order.to_natural(x) for x in args])
        return [self.order.to_layout(x) for x in _bind(equation, args)]

    def _wanted(self, kind: str) -> bool:
        self.found.add(kind)
        return kind in self.repairs

    def _runs_along(self, equation: core.JaxprEqn) -> bool:
        length: int = equation.params["shape"][equation.params["dimension"]]
        return length == self.order.length

    def _is_alone(self, equation: core.JaxprEqn) -> bool:
        """Return whether this attention call covers the whole stream without using the mesh."""
        over = any(self.order.length in _shape(atom)[:2] for atom in equation.invars)
        return over and not any(set(self.order.cp.cp_axes) & axes for axes in _mapped(equation))

    def _repaired(self, closed: Any) -> Any:
        """Return an inner jaxpr with repairs applied."""
        is_closed = isinstance(closed, core.ClosedJaxpr)
        jaxpr, consts = (closed.jaxpr, closed.consts) if is_closed else (closed, ())
        shapes = [jax.ShapeDtypeStruct(_shape(v), v.aval.dtype) for v in jaxpr.invars]
        body = functools.partial(self._evaluate, jaxpr, consts)
        traced = jax.make_jaxpr(lambda *args: body(args))(*shapes)
        if traced.consts:
            return closed  # the body contains a table; this repair is not supported
        return traced if is_closed else traced.jaxpr


def _bind(
    equation: core.JaxprEqn, args: list[Any], repaired: Callable[[Any], Any] | None = None
) -> list[Any]:
    params: Any = dict(equation.params)
    for key, value in equation.params.items():
        if repaired is None:
            break
        if isinstance(value, core.ClosedJaxpr | core.Jaxpr):
            params[key] = repaired(value)
        elif isinstance(value, tuple) and value and isinstance(value[0], core.ClosedJaxpr):
            params[key] = tuple(map(repaired, value))
    params = equation.primitive.get_bind_params(params)
    with equation.ctx.manager:
        results = equation.primitive.bind(*args, **params)
    return list(results) if equation.primitive.multiple_results else [results]


def _shape(atom: Any) -> tuple[int, ...]:
    shape: tuple[int, ...] = atom.aval.shape
    return shape


def _mapped(equation: core.JaxprEqn) -> list[set[str]]:
    """Return the axes of every shard_map inside an equation."""
    axes = []
    if equation.primitive.name == "shard_map":
        axes.append(set(equation.params["newly_manual_axes"]))
    inner: Any
    for inner in jax.tree.leaves(equation.params, is_leaf=_is_jaxpr):
        if _is_jaxpr(inner):
            for deeper in getattr(inner, "jaxpr", inner).eqns:
                axes += _mapped(deeper)
    return axes


def _is_jaxpr(x: Any) -> bool:
    return isinstance(x, core.ClosedJaxpr | core.Jaxpr)
