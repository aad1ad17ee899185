"""Enter `shard_map` and call `ppermute` on any mesh; all modules use these functions for it.

A caller's mesh may have its axes in any order and of any type (Auto, Explicit), and the call may
already be inside a `shard_map`, whose axes are then Manual. Only this file handles these cases:

    run         call a function where all axes are Auto or Manual, and where jax does not track over
                which manual axes a value varies; results have the types that the caller expects
    shard_map   map a function over the devices of some axes, except those that are already Manual
    ppermute    send along several axes, with devices numbered in the order of the axes given

The library numbers devices in the order in which it names axes, such as (cp_outer, cp_inner).
`axis_index`, `all_gather`, `all_to_all` (with `axis_index_groups`), `psum_scatter` and
PartitionSpecs do the same. Only `ppermute` numbers devices in the order of the mesh (from jax 0.12
on it accepts no other order), so it has a function here.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from hcp_jax import compat


def mesh_here(mesh: Mesh, axes: Iterable[str]) -> Mesh | AbstractMesh:
    """Return the mesh to use at this point of the program, for work over `axes` of `mesh`.

    This is `mesh` itself, unless a mesh is in context (from `jax.set_mesh`, or from a `shard_map`
    around the call): then it is the one in context, whose axes may be of other types.

    Raises:
        ValueError: if the mesh in context lacks one of the axes, or has a different size
            along it.
    """
    context = jax.sharding.get_abstract_mesh()
    if context.empty or context == mesh.abstract_mesh:
        return mesh
    wrong = [axis for axis in axes if context.shape.get(axis) != mesh.shape[axis]]
    if wrong:
        raise ValueError(
            f"the mesh in context is {_mesh_text(context)}, but cp.mesh is {_mesh_text(mesh)}: "
            f"they differ in {', '.join(wrong)}. Make the ContextParallel from the mesh that "
            "jax.set_mesh or the shard_map around this call uses."
        )
    return context


def manual_axes(mesh: Mesh | AbstractMesh, axes: Iterable[str]) -> frozenset[str]:
    """Return those of `axes` that a `shard_map` around the call has made Manual."""
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return frozenset(axis for axis in axes if types[axis] == AxisType.Manual)


def run(
    mesh: Mesh | None, axes: Iterable[str], function: Callable[..., Any], out_specs: Any, *args: Any
) -> Any:
    """Call `function(*args)` where Explicit axes are Auto and no variation is tracked.

    Args:
        mesh: the mesh that the function works on; if None, the mesh of the arguments.
        axes: the mesh axes that it works over.
        function: what to call. Arrays must reach it through `args`: one that it closes over would
            keep its Explicit type.
        out_specs: PartitionSpec of the results, or a tree of them. Under Explicit axes it gives the
            results their types; otherwise it is unused.
        args: trees of arrays.
    """
    axes = tuple(axes)
    here = _mesh_of(args) if mesh is None else mesh_here(mesh, axes)
    explicit = [n for n, t in zip(here.axis_names, here.axis_types, strict=True) if _explicit(t)]
    if explicit:
        specs = _only_each(out_specs, explicit)
        shardings = jax.tree.map(lambda spec: NamedSharding(here, spec), specs, is_leaf=_is_spec)
        inner = jax.sharding.auto_axes(function, axes=tuple(explicit), out_sharding=shardings)
        if isinstance(here, Mesh) and _mesh_of(args).empty:
            # Nothing says yet which devices to run on; under Auto axes a constraint can say it.
            whole = NamedSharding(Mesh(here.devices, here.axis_names), PartitionSpec())
            args = jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, whole), args)
    else:
        inner = function
    if not compat.tracks_variation():
        return inner(*args)
    return _untracked(inner, manual_axes(here, axes), args)


def shard_map(
    mesh: Mesh | None,
    axes: Iterable[str],
    function: Callable[..., Any],
    in_specs: Any,
    out_specs: Any,
) -> Callable[..., Any]:
    """Map `function` over the devices of `axes`, except those that are already Manual here.

    Along a Manual axis, arrays are already the device's own part, so the axis is dropped from the
    specs. If all axes are Manual, `function` is called directly. Call the result inside `run`.

    Args:
        mesh: the mesh; None for one device, where `function` is called directly.
        axes: the mesh axes that the specs may name.
        function: computes one device's part.
        in_specs: as `jax.shard_map` takes them.
        out_specs: as `jax.shard_map` takes them.
    """
    axes = tuple(axes)

    def mapped(*args: Any) -> Any:
        if mesh is None:
            return function(*args)
        here = mesh_here(mesh, axes)
        left = frozenset(axes) - manual_axes(here, axes)
        if not left:
            return function(*args)
        # No check_vma: it would sum gradients over devices inside scans, once per chunk, instead
        # of once at the end of shard_map.
        over = jax.shard_map(
            function,
            mesh=here,
            in_specs=_only_each(in_specs, left),
            out_specs=_only_each(out_specs, left),
            axis_names=set(left),
            check_vma=False,
        )
        return over(*args)

    return mapped


def constrain(x: Any, mesh: Mesh, axes: Iterable[str], spec: PartitionSpec) -> Any:
    """Constrain how an array is cut over those of `axes` that are not Manual here; inside `run`."""
    axes = tuple(axes)
    here = mesh_here(mesh, axes)
    left = frozenset(axes) - manual_axes(here, axes)
    return jax.lax.with_sharding_constraint(x, NamedSharding(here, _only(spec, left)))


def inside_shard_map() -> bool:
    """Return whether this code is inside a `shard_map`."""
    return AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types


def explicit_spec(x: Any) -> PartitionSpec:
    """Return the spec in an array's type, which names Explicit axes only."""
    spec = tuple(jax.typeof(x).sharding.spec)
    return PartitionSpec(*spec, *[None] * (x.ndim - len(spec)))


def ppermute(tree: Any, axes: tuple[str, ...], pairs: Iterable[tuple[int, int]]) -> Any:
    """Send arrays along several mesh axes; inside `shard_map`.

    Args:
        tree: arrays of this device.
        axes: mesh axes.
        pairs: (source, destination) devices, numbered in the order of `axes`, the last one fastest.
    """
    mesh = jax.sharding.get_abstract_mesh()
    sizes = tuple(mesh.shape[axis] for axis in axes)
    ordered = tuple(axis for axis in mesh.axis_names if axis in axes)
    turn = [axes.index(axis) for axis in ordered]
    number = np.empty(math.prod(sizes), int)
    number[np.arange(number.size).reshape(sizes).transpose(turn).reshape(-1)] = range(number.size)
    renumbered = [(int(number[a]), int(number[b])) for a, b in pairs]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, ordered, renumbered), tree)


def _mesh_of(args: Any) -> Mesh | AbstractMesh:
    """Return the mesh in context, or else the first mesh in the types of the arguments."""
    here = jax.sharding.get_abstract_mesh()
    if here.empty:
        meshes = (jax.typeof(x).sharding.mesh for x in jax.tree.leaves(args))
        here = next((mesh for mesh in meshes if not mesh.empty), here)
    return here


def _explicit(axis_type: AxisType) -> bool:
    return axis_type == AxisType.Explicit


def _only(spec: PartitionSpec, axes: Iterable[str]) -> PartitionSpec:
    """Return `spec` without the axes that are not in `axes`."""

    def keep(names: Any) -> Any:
        if names is None:
            return None
        kept = tuple(n for n in ((names,) if isinstance(names, str) else names) if n in axes)
        return kept[0] if len(kept) == 1 else kept or None

    return PartitionSpec(*map(keep, spec))


def _only_each(specs: Any, axes: Iterable[str]) -> Any:
    """Return a tree of specs without the axes that are not in `axes`."""
    return jax.tree.map(lambda spec: _only(spec, axes), specs, is_leaf=_is_spec)


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


def _mesh_text(mesh: Mesh | AbstractMesh) -> str:
    return "(" + ", ".join(f"{name}: {size}" for name, size in mesh.shape.items()) + ")"


def _untracked(
    function: Callable[..., Any], own_axes: frozenset[str], args: tuple[Any, ...]
) -> Any:
    """Call a function inside a `shard_map` with check_vma=True as if check_vma were False.

    The results, and the gradients inside, vary over `own_axes` and over every axis that some
    argument varies over. For arguments that did not vary, jax itself sums the gradients.
    """
    leaves, tree = jax.tree.flatten(args)
    axes = frozenset(own_axes).union(*(compat.varying_axes(x) for x in leaves))
    leaves = [_vary(x, axes) for x in leaves]
    smooth = [jax.numpy.issubdtype(x.dtype, jax.numpy.inexact) for x in leaves]

    def joined(differentiable: list[Any], others: list[Any]) -> Any:
        a, b = iter(differentiable), iter(others)
        return function(*jax.tree.unflatten(tree, [next(a) if s else next(b) for s in smooth]))

    split = [
        [x for x, s in zip(leaves, smooth, strict=True) if s == kind] for kind in (True, False)
    ]
    return _opaque(joined, axes, *split)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _opaque(
    function: Callable[..., Any], axes: frozenset[str], differentiable: list[Any], others: list[Any]
) -> Any:
    return _vary(compat.untracked(function, differentiable, others), axes)


def _opaque_forward(
    function: Callable[..., Any], axes: frozenset[str], differentiable: list[Any], others: list[Any]
) -> Any:
    def forward(differentiable: list[Any], others: list[Any]) -> Any:
        return jax.vjp(lambda *x: function(list(x), others), *differentiable)

    return _vary(compat.untracked(forward, differentiable, others), axes)


def _opaque_backward(
    function: Callable[..., Any], axes: frozenset[str], vjp: Any, cotangents: Any
) -> Any:
    grads = compat.untracked(lambda vjp, cotangents: vjp(cotangents), vjp, cotangents)
    return _vary(list(grads), axes), None


_opaque.defvjp(_opaque_forward, _opaque_backward)


def _vary(tree: Any, axes: frozenset[str]) -> Any:
    """Declare that arrays vary over `axes`."""

    def one(x: Any) -> Any:
        missing = tuple(sorted(axes - compat.varying_axes(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(one, tree)
