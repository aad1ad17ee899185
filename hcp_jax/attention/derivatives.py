"""Raise a clear error for derivatives that attention does not support, when a program is traced.

Attention has first derivatives in reverse mode. For others, JAX alone would raise the error of the
first primitive that has no rule: an assertion, or a message about while loops. Errors are raised
while a program is traced or lowered, before it runs.
"""

from typing import Any, NoReturn

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_MESSAGE = (
    "hcp_jax attention has first derivatives in reverse mode only (grad, vjp, jacrev). {} is not "
    "supported: its kernels have no such derivative. On one device and for short sequences use "
    "jax.nn.dot_product_attention there."
)


def refuse(what: str) -> NoReturn:
    """Raise NotImplementedError for a derivative that is not supported."""
    raise NotImplementedError(_MESSAGE.format(what))


def reverse_only(x: Any) -> Any:
    """Return `x` unchanged, with a tangent that can be transposed but not computed.

    Reverse mode never computes a tangent, it only transposes its computation, so this costs
    nothing there. Forward mode raises: at once outside `jit`, and at lowering inside.

    Raises:
        NotImplementedError: in forward mode.
    """
    return _identity.bind(x) if isinstance(x, jax.core.Tracer) else x


@jax.custom_jvp
def first_order(x: Any) -> Any:
    """Return a pytree `x` of a forward or backward rule unchanged, without a derivative.

    Raises:
        NotImplementedError: as soon as the rule itself is differentiated.
    """
    return x


@first_order.defjvp
def _refuse_second(*_: Any) -> NoReturn:
    refuse("A derivative of second order (hessian, grad of grad)")


def _refuse_forward(*_: Any, **__: Any) -> NoReturn:
    refuse("Forward mode (jvp, jacfwd, linearize, hessian)")


def _define(name: str) -> Primitive:
    primitive = Primitive(name)
    primitive.def_abstract_eval(lambda x: x)
    batching.defvectorized(primitive)
    return primitive


_identity = _define("hcp_jax_reverse_only")
_identity.def_impl(lambda x: x)
mlir.register_lowering(_identity, lambda _, x: [x])

# An identity for tangents that can be neither executed nor batched. Only forward mode would batch
# it, since `_identity` is batched before it is differentiated.
_tangent = _define("hcp_jax_reverse_only_tangent")
_tangent.def_impl(_refuse_forward)
mlir.register_lowering(_tangent, _refuse_forward)
batching.primitive_batchers[_tangent] = _refuse_forward

ad.deflinear2(_tangent, lambda cotangent, _: [cotangent])
ad.defjvp(_identity, lambda tangent, _: _tangent.bind(tangent))
