"""Ask what arrays are, where jax may be absent: masks are NumPy programs that jax can trace too."""

import importlib.util
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING or importlib.util.find_spec("jax") is not None:
    import jax
    import jax.numpy as jnp

    Array: TypeAlias = jax.Array | np.ndarray
    here: ModuleType = jnp
else:
    jax = None
    Array = np.ndarray
    here = np


def pytree(cls: Any) -> Any:
    """Register a dataclass as a pytree where there is jax; "static" fields are not leaves."""
    return cls if jax is None else jax.tree_util.register_dataclass(cls)


def is_traced(x: Any) -> bool:
    """Return whether `x` has no numbers yet, as under `jit`."""
    return jax is not None and isinstance(x, jax.core.Tracer)


def is_jax(x: Any) -> bool:
    """Return whether `x` is an array of jax, on a device or traced."""
    return jax is not None and isinstance(x, jax.Array)


def has_shape(x: Any) -> bool:
    """Return whether `x` is an array of jax, or stands for one in a program that is compiled."""
    return jax is not None and isinstance(x, jax.Array | jax.ShapeDtypeStruct)


def module_of(x: Any) -> ModuleType:
    """Return the module that computes with `x`: `jax.numpy` or `numpy`."""
    return here if is_jax(x) else np


def is_kind(dtype: Any, kind: type) -> bool:
    """Return whether a dtype is of a kind such as `np.integer`; knows the dtypes of jax."""
    return bool(here.issubdtype(dtype, kind))
