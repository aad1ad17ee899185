"""Run on a mesh whose axes are Auto, whatever the types of the caller's axes.

Models cannot run inside a `shard_map` that leaves other axes Explicit, as stages would with tp. So
a pipeline has a mesh of its own over the same devices, and arrays change from one mesh to the other
at its door; no byte moves.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding

from hcp_jax.parallel.context import ContextParallel


def with_auto_axes(cp: ContextParallel) -> ContextParallel:
    """Return the context on a mesh of the same devices whose axes are all Auto."""
    if all(kind == AxisType.Auto for kind in cp.mesh.axis_types):
        return cp
    return dataclasses.replace(cp, mesh=Mesh(cp.mesh.devices, cp.mesh.axis_names))


def on_mesh(mesh: Mesh, tree: Any) -> Any:
    """Return the arrays on a mesh with the same devices and names of axes."""

    def one(x: Any) -> Any:
        sharding = getattr(x, "sharding", None)
        if not isinstance(sharding, NamedSharding):
            return x
        return jax.device_put(x, NamedSharding(mesh, sharding.spec))

    return jax.tree.map(one, tree)


def on_auto_axes(function: Callable[[Any], Any], tree: Any) -> Any:
    """Return `function(tree)`, computed with Auto axes if the mesh of the arrays has Explicit ones.

    Explicit axes allow no reshape of dims that are cut; Auto axes do.
    """
    shardings = (getattr(x, "sharding", None) for x in jax.tree.leaves(tree))
    meshes = (x.mesh for x in shardings if isinstance(x, NamedSharding))
    explicit = next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)
    if explicit is None:
        return function(tree)
    auto = Mesh(explicit.devices, explicit.axis_names)
    with jax.set_mesh(auto):
        return function(on_mesh(auto, tree))
