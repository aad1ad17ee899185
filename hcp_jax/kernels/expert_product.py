"""Multiply rows with the weights of their experts; rows are sorted by expert.

    product(how, x, weights, sizes) -> out      # x [M, K], weights [E, K, N], sizes [E], out [M, N]

The number of rows of each expert is data, so a compiled program serves every load. Two
implementations:

    triton      Pallas kernels for NVIDIA GPUs (`expert_triton.py`): the FLOPs are those of the rows
    ragged_dot  `jax.lax.ragged_dot`. On CPUs it is exact and fast. On GPUs XLA (jax 0.12) makes it
                a dense product over all experts: FLOPs and memory grow with E

On GPUs the kernels are taken once they have passed their check there (`trust.py`), or by name.
"""

import dataclasses
import functools
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hcp_jax.kernels import expert_triton, trust
from hcp_jax.kernels.tiles import Product, ProductTiles, product_tiles_for


@dataclasses.dataclass(frozen=True)
class How:
    """How `product` computes; static, hashable.

    Attributes:
        implementation: what multiplies.
        device_kind: `jax.Device.device_kind` of the devices to run on; it selects tile sizes.
        interpret: run the Pallas kernels in their interpreter (on CPU devices).
        tiles: tile sizes of the Pallas kernels; from the device kind's table if None.
    """

    implementation: Product
    device_kind: str = ""
    interpret: bool = False
    tiles: ProductTiles | None = None


def resolve(name: str | None, dtype: str, platform: str, device_kind: str) -> How:
    """Return how to multiply: by the implementation named, or by the best for these devices.

    Args:
        name: "triton", "ragged_dot", or None for Triton on GPUs where its kernels have passed their
            check, and `ragged_dot` elsewhere; the log says why they are not taken.
        dtype: of rows and weights.
        platform: "cpu" or "gpu".
        device_kind: `jax.Device.device_kind`.

    Raises:
        ValueError: if there is no implementation of that name.
        NotImplementedError: if the named one cannot run there.

    >>> resolve("triton", "bfloat16", "gpu", "NVIDIA H200").implementation
    'triton'
    """
    if name is not None and name not in get_args(Product):
        raise ValueError(
            f"unknown product {name!r} of experts: there are {', '.join(get_args(Product))}."
        )
    why_not = expert_triton.unsupported(dtype, platform)
    if name == "triton" and why_not is not None:
        raise NotImplementedError(
            f"product 'triton' of experts cannot run here: {why_not}. Use 'ragged_dot', or None "
            "for the best."
        )
    on_gpu = platform in ("gpu", "cuda")
    chosen = name == "triton" or (
        name is None
        and on_gpu
        and why_not is None
        and trust.why_not(trust.EXPERT_PRODUCT, device_kind) is None
    )
    return How("triton" if chosen else "ragged_dot", device_kind, interpret=not on_gpu)


def describe(name: str | None, dtype: str, platform: str, device_kind: str) -> str:
    """Return one line on what multiplies; arguments and errors as in `resolve`.

    >>> describe(None, "bfloat16", "cpu", "cpu")
    'ragged_dot'
    """
    how = resolve(name, dtype, platform, device_kind)
    if how.implementation == "triton":
        tile = (how.tiles or product_tiles_for("" if how.interpret else device_kind, dtype)).rows
        return f"triton (tiles of {tile.rows} rows and {tile.columns} columns)"
    if platform not in ("gpu", "cuda"):
        return "ragged_dot"
    dense = "ragged_dot (on GPUs, the FLOPs of all experts for each row"
    if name is not None or expert_triton.unsupported(dtype, platform) is not None:
        return f"{dense})"
    why_not = trust.why_not(trust.EXPERT_PRODUCT, device_kind)
    return f"{dense}; Triton's kernels are not taken: {why_not})"


def product(how: How, x: Array, weights: Array, sizes: Array) -> Array:
    """Multiply each row with the weights of its expert.

    Products are added in float32 and rounded once, to the dtype of `x`. Calls repeat bit by bit.

    Args:
        how: what multiplies; see `resolve`.
        x: rows `[M, K]`, those of the first expert first; rows behind those of the last expert
            get zeros.
        weights: `[E, K, N]` of all experts, in the dtype of `x`.
        sizes: number of rows of each expert, `[E]`, int32; at most M together.

    Returns:
        The products, `[M, N]`.

    Raises:
        ValueError: if shapes or dtypes do not fit each other.

    >>> import jax.numpy as jnp
    >>> x, weights = jnp.ones((3, 2)), jnp.stack([jnp.ones((2, 1)), jnp.full((2, 1), 5.0)])
    >>> product(How("ragged_dot"), x, weights, jnp.array([2, 1], jnp.int32)).tolist()
    [[2.0], [2.0], [10.0]]
    """
    _check(x, weights, sizes)
    # The compiled program contains this scope name; `hcp audit` finds these products by it.
    with jax.named_scope(expert_triton.SCOPE):
        if how.implementation == "ragged_dot":
            return jax.lax.ragged_dot(x, weights, sizes)
        return _triton(how, x, weights, sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _triton(how: How, x: Any, weights: Any, sizes: Any) -> Any:
    call = expert_triton.Call.from_arrays(how.device_kind, how.interpret, how.tiles, x, weights)
    return call.multiply(x, weights, sizes, transposed=False)


def _triton_forward(how: How, x: Any, weights: Any, sizes: Any) -> Any:
    return _triton(how, x, weights, sizes), (x, weights, sizes)


def _triton_backward(how: How, saved: Any, dout: Any) -> Any:
    x, weights, sizes = saved
    call = expert_triton.Call.from_arrays(how.device_kind, how.interpret, how.tiles, x, weights)
    with jax.named_scope(expert_triton.SCOPE):
        dx = call.multiply(dout, weights, sizes, transposed=True)
        return dx, call.weight_gradients(x, dout, sizes), None


_triton.defvjp(_triton_forward, _triton_backward)


def _check(x: Array, weights: Array, sizes: Array) -> None:
    shapes = f"x {x.shape}, weights {weights.shape}, sizes {sizes.shape}"
    if (x.ndim, weights.ndim, sizes.ndim) != (2, 3, 1):
        raise ValueError(f"experts multiply x [M, K], weights [E, K, N], sizes [E]; got {shapes}.")
    if x.shape[1] != weights.shape[1] or sizes.shape[0] != weights.shape[0]:
        raise ValueError(f"x [M, K], weights [E, K, N] and sizes [E] do not fit: got {shapes}.")
    if 0 in (*x.shape, *weights.shape):
        raise ValueError(f"experts need at least one row, column and expert; got {shapes}.")
    if x.dtype != weights.dtype:
        raise ValueError(
            f"x and weights must have one dtype, got {x.dtype} and {weights.dtype}: cast one."
        )
    if sizes.dtype != jnp.int32:
        raise ValueError(f"sizes must be int32, got {sizes.dtype}.")
