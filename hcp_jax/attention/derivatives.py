"""Refuse derivatives that attention does not have, in words, when a program is traced or compiled.

Attention has a first derivative in reverse mode. Left to itself JAX raises whatever the first
primitive without a rule raises: an assertion, or a remark about while loops.
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
    """Return `x`; its tangent can be transposed, but not computed.

    Reverse mode never computes a tangent: it transposes what would. So this costs nothing there,
    and forward mode is refused: outside `jit` at once, inside when the program is lowered.

    Raises:
        NotImplementedError: as above.
    """
    return _identity.bind(x) if isinstance(x, jax.core.Tracer) else x


@jax.custom_jvp
def first_order(x: Any) -> Any:
    """Return a pytree `x` of what a forward or backward rule works with; it has no derivative.

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

# The identity again, of a tangent: nothing can execute it or batch it. It is batched in forward
# mode alone, since `_identity` is batched before it is differentiated.
_tangent = _define("hcp_jax_reverse_only_tangent")
_tangent.def_impl(_refuse_forward)
mlir.register_lowering(_tangent, _refuse_forward)
batching.primitive_batchers[_tangent] = _refuse_forward

ad.deflinear2(_tangent, lambda cotangent, _: [cotangent])
ad.defjvp(_identity, lambda tangent, _: _tangent.bind(tangent))
