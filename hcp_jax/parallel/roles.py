"""Say which mesh axes play which role, what follows from it, and how attention communicates.

`ContextParallel` adds to it what moves data. Describing and placing read these roles alone.
"""

import copy
import dataclasses
import logging
from typing import Any, Self

import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from hcp_jax.base import checks
from hcp_jax.base.names import require_known
from hcp_jax.cost.expert_axes import innermost_axes
from hcp_jax.cost.traffic import STRATEGIES, Strategy
from hcp_jax.parallel import spmd
from hcp_jax.parallel.mesh import as_tuple
from hcp_jax.parallel.padding import PaddedStreams
from hcp_jax.sequence.layout import LAYOUTS
from hcp_jax.sequence.placement import Groups, Placement, Streams

_log = logging.getLogger("hcp_jax")


@dataclasses.dataclass(frozen=True)
class MeshRoles:
    """A mesh and the roles of its axes. `ContextParallel` describes the attributes and errors."""

    mesh: Mesh
    comm_type: str | tuple[str, ...] = "a2a+p2p"
    layout: str = "zigzag"
    dp: str | tuple[str, ...] | None = "dp"
    tp: str | tuple[str, ...] | None = "tp"
    cp_outer: str | None = "cp_outer"
    cp_inner: str | None = "cp_inner"
    head_groups: int = 1
    widest_group: int | None = None
    ep: int = 1
    padded_streams: PaddedStreams = dataclasses.field(
        default_factory=PaddedStreams, init=False, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        _require_mesh(self.mesh)
        for field in ("dp", "tp", "comm_type"):
            if isinstance(getattr(self, field), list):
                object.__setattr__(self, field, tuple(getattr(self, field)))
        self._check_axes()
        if not isinstance(self.comm_type, str | tuple) or not self.comm_type:
            raise ValueError(
                f"comm_type must be one name, or a list with one per layer, got {self.comm_type!r}."
            )
        for comm_type in as_tuple(self.comm_type):
            require_known("comm_type", comm_type, tuple(STRATEGIES))
        require_known("layout", self.layout, LAYOUTS)
        head_groups = checks.integer("head_groups", self.head_groups, least=1)
        object.__setattr__(self, "head_groups", head_groups)
        innermost_axes({axis: self.mesh.shape[axis] for axis in self.flat_axes}, self.ep)
        if self.widest_group is not None:
            self._check_widest_group()
            return
        for note in sorted({_collapse_note(self, c) for c in as_tuple(self.comm_type)} - {""}):
            _log.warning(note)

    @property
    def cp_axes(self) -> tuple[str, ...]:
        """The mesh axes that a sequence is cut over, the slowest first."""
        return tuple(axis for axis in (self.cp_outer, self.cp_inner) if axis is not None)

    @property
    def flat_axes(self) -> tuple[str, ...]:
        """The mesh axes that groups span: dp and `cp_axes`."""
        return (*as_tuple(self.dp), *self.cp_axes)

    @property
    def expert_axes(self) -> tuple[str, ...]:
        """The mesh axes that experts are cut over, the slowest first."""
        return innermost_axes({axis: self.mesh.shape[axis] for axis in self.flat_axes}, self.ep)

    @property
    def size(self) -> int:
        """C, the context-parallel degree."""
        return self.axis_size(self.cp_axes)

    @property
    def placement(self) -> Placement:
        """Where tokens lie: streams cut by the layout, or groups with documents of their own."""
        if self.widest_group is None:
            return Streams(self.layout, self.size)
        return Groups(self.widest_group, self.axis_size(self.flat_axes))

    @property
    def axes(self) -> tuple[str, ...]:
        """All mesh axes that have a role here."""
        return (*self.flat_axes, *as_tuple(self.tp))

    @property
    def on_device(self) -> bool:
        """Whether this code is inside a `shard_map` over the cp axes (they are then Manual).

        If so, arrays are one device's own part of the stream.

        Raises:
            NotImplementedError: if only some of the cp axes are Manual.
        """
        manual = spmd.manual_axes(self.mesh_in_context, self.cp_axes)
        left = [axis for axis in self.cp_axes if axis not in manual and self.mesh.shape[axis] > 1]
        if manual and left:
            raise NotImplementedError(
                f"the shard_map around this call is over {', '.join(sorted(manual))} but not over "
                f"{', '.join(left)}: put all cp axes into its axis_names, or none."
            )
        return bool(manual)

    def axis_size(self, axes: str | tuple[str, ...] | None, *, here: bool = False) -> int:
        """Return the number of devices along one or several mesh axes; 1 for none.

        Args:
            axes: names of mesh axes.
            here: leave out the axes that a surrounding `shard_map` has made Manual.
        """
        names = as_tuple(axes)
        if here:
            manual = spmd.manual_axes(self.mesh_in_context, names)
            names = tuple(axis for axis in names if axis not in manual)
        return int(np.prod([self.mesh.shape[axis] for axis in names], dtype=int))

    def for_layer(self, layer: int) -> Self:
        """Return this context with the comm type of one layer.

        Raises:
            ValueError: if there are comm types for fewer layers.
        """
        layer = checks.integer("layer", layer, least=0)
        if isinstance(self.comm_type, str):
            return self
        if layer >= len(self.comm_type):
            raise ValueError(
                f"comm_type is a list for {len(self.comm_type)} layers, but the model has a layer "
                f"{layer} (counted from 0). Give one comm type, or one per layer."
            )
        one = copy.copy(self)  # as checked as this one, and with its record of padding
        object.__setattr__(one, "comm_type", self.comm_type[layer])
        return one

    @property
    def strategy(self) -> Strategy:
        """The axes that exchange heads, the axes that K and V move over, and how they move.

        Raises:
            ValueError: if there is one comm type per layer.
        """
        if not isinstance(self.comm_type, str):
            raise ValueError(
                f"this cp has one comm_type per layer, {self.comm_type}; attention needs one: "
                "use cp.for_layer(i)."
            )
        exchange, move, by = STRATEGIES[self.comm_type]
        return Strategy(self._present(exchange), self._present(move), by)

    def spec(self, ndim: int, dim: int = 1) -> PartitionSpec:
        """Return the spec that cuts dim 0, the batch, over dp and `dim` over the cp axes."""
        ndim = checks.integer("ndim", ndim, least=1)
        dim = checks.dimension("dim", dim, ndim)
        axes: list[Any] = [None] * ndim
        if dim != 0:
            axes[0] = self.dp
        axes[dim] = self.cp_axes or None
        return PartitionSpec(*axes)

    def heads_spec(self, x: Any) -> PartitionSpec:
        """Return the spec of queries `[B, T, N, H]`: cut over dp, the cp axes and tp."""
        return PartitionSpec(self.dp, self.cp_axes or None, self.tp)

    @property
    def whole_axes(self) -> tuple[str, ...]:
        """The cp axes that some layer exchanges heads over.

        A device gets the queries of other devices along them, so it needs their intervals.
        """
        comm_types = as_tuple(self.comm_type)
        fields = {field for c in comm_types for field in STRATEGIES[c].exchange}
        return self._present(tuple(f for f in ("cp_outer", "cp_inner") if f in fields))

    @property
    def interval_spec(self) -> PartitionSpec:
        """The spec of intervals under groups: cut over dp and the cp axes but `whole_axes`."""
        cut = tuple(axis for axis in self.cp_axes if axis not in self.whole_axes)
        return PartitionSpec(self.dp, cut or None)

    def sharding(self, ndim: int, dim: int = 1) -> NamedSharding:
        """Return the sharding with `spec` on this mesh."""
        return NamedSharding(self.mesh, self.spec(ndim, dim))

    def padded_length(self, length: int) -> int:
        """Return the length of a stream of `length` tokens after padding for this layout.

        >>> import hcp_jax as hcp
        >>> cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=4, cp_inner=2))
        >>> cp.padded_length(100)  # two chunks for each of 8 devices
        112
        """
        return self.placement.padded_length(checks.integer("length", length, least=0))

    @property
    def platform(self) -> str:
        """The platform of the mesh's devices, "cpu" or "gpu"; may not be the default backend."""
        return str(self.mesh.devices.flat[0].platform)

    @property
    def device_kind(self) -> str:
        """The kind of the mesh's devices, such as "NVIDIA H200"."""
        return str(self.mesh.devices.flat[0].device_kind)

    @property
    def mesh_in_context(self) -> Mesh | AbstractMesh:
        """The mesh to use at this point of the program: `mesh`, perhaps with other axis types."""
        return spmd.mesh_here(self.mesh, self.axes)

    def _check_axes(self) -> None:
        """Raise if the mesh lacks an axis, or if one axis has two roles."""
        roles: dict[str, str] = {}
        for field in ("dp", "tp", "cp_outer", "cp_inner"):
            value = getattr(self, field)
            names = as_tuple(value) if isinstance(value, str | tuple | None) else (value,)
            if not all(isinstance(name, str) for name in names) or (
                field.startswith("cp") and isinstance(value, tuple)
            ):
                kinds = "the name of one mesh axis" if field.startswith("cp") else "names of axes"
                raise ValueError(f"{field} must be {kinds}, or None, got {value!r}.")
            for axis in names:
                if axis not in self.mesh.axis_names:
                    raise ValueError(
                        f"{field}={axis!r} is not an axis of the mesh, which has "
                        f"{self.mesh.axis_names}. Name the mesh's own axis, or pass {field}=None."
                    )
                if axis in roles:
                    raise ValueError(
                        f"the mesh axis {axis!r} has two roles, {roles[axis]} and {field}: every "
                        "axis can have one. Give each role an axis of its own, or None."
                    )
                roles[axis] = field

    def _check_widest_group(self) -> None:
        devices = self.axis_size(self.flat_axes)
        widest = checks.integer("widest_group", self.widest_group, least=1, most=devices)
        if devices % widest:
            raise ValueError(
                f"widest_group={widest} does not divide the {devices} devices along "
                f"{', '.join(self.flat_axes)}; groups lie in blocks of equal size."
            )
        object.__setattr__(self, "widest_group", widest)

    def _present(self, fields: tuple[str, ...]) -> tuple[str, ...]:
        axes = (getattr(self, field) for field in fields)
        return tuple(axis for axis in axes if axis is not None)


def _require_mesh(mesh: Any) -> None:
    if isinstance(mesh, AbstractMesh):
        raise ValueError(
            "mesh is an AbstractMesh, which has no devices; pass the jax.sharding.Mesh itself "
            "(jax.sharding.get_mesh() gives that of jax.set_mesh)."
        )
    if not isinstance(mesh, Mesh):
        raise ValueError(
            "mesh must be a jax.sharding.Mesh (hcp.make_mesh makes one), got "
            f"{type(mesh).__name__}."
        )
    manual = [
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Manual
    ]
    if manual:
        raise ValueError(
            f"the mesh's axes {', '.join(manual)} are of type Manual; make the mesh with Auto or "
            "Explicit axes. A shard_map around a call makes axes Manual where needed."
        )


def _collapse_note(cp: MeshRoles, comm_type: str) -> str:
    """Return a note if a two-level comm type has an axis of size 1; else an empty string."""
    if "+" not in comm_type or cp.size == 1:
        return ""
    outer = comm_type.split("+")[1]
    if cp.axis_size(cp.cp_inner) == 1:
        return f"comm_type {comm_type!r} with cp_inner of size 1 is {outer!r} over cp_outer."
    if cp.axis_size(cp.cp_outer) == 1:
        return f"comm_type {comm_type!r} with cp_outer of size 1 is 'a2a' over cp_inner."
    return ""
