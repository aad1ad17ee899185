"""Describe a mesh, the roles of its axes and the layout of streams in one `ContextParallel`.

All parts of a program must agree on these: attention, the sharded data, the roll of multi-token
prediction, the checks of `hcp verify`. The object is frozen and hashable, so `jit` can close over
it.
"""

import dataclasses
import functools
import logging
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int32

from hcp_jax.base import checks
from hcp_jax.base.names import require_known
from hcp_jax.cost.expert_axes import innermost_axes
from hcp_jax.cost.traffic import STRATEGIES, Strategy
from hcp_jax.parallel import placing, spmd
from hcp_jax.parallel.buffers import map_buffers
from hcp_jax.parallel.describe import collapse, describe
from hcp_jax.parallel.mesh import as_tuple
from hcp_jax.parallel.placing import Gathered
from hcp_jax.sequence.layout import LAYOUTS
from hcp_jax.sequence.mask import Mask
from hcp_jax.sequence.placed_mask import PlacedMask
from hcp_jax.sequence.placement import Groups, Placement, Streams

_log = logging.getLogger("hcp_jax")


@dataclasses.dataclass(frozen=True)
class ContextParallel:
    """How sequences are split over a mesh; frozen and hashable.

    Attributes:
        mesh: any mesh that has the axes named below, in any order, Auto or Explicit; other axes are
            not used.
        comm_type: how the two cp axes communicate: "p2p", "all_gather", "a2a", "a2a+p2p" or
            "a2a+all_gather"; or a tuple with one per layer (`for_layer` selects one).
        layout: the order in which streams are cut, "zigzag" or "contiguous".
        dp: mesh axis, or axes, that the batch is cut over; None if there is none.
        tp: mesh axis, or axes, that attention heads are cut over; None if there is none.
        cp_outer: mesh axis of the ring between hosts; None if there is none.
        cp_inner: mesh axis of the all-to-all inside a host; None if there is none.
        head_groups: process the heads in this many parts, one after the other, so that the exchange
            of one part is hidden behind attention on another. It must divide the number of kv
            heads that a device has after the exchange. It helps where the exchange is a large part
            of the step (plain a2a with short sequences). Each part runs its own ring, whose first
            and last hops may not be hidden. `hcp audit` shows both effects.
        widest_group: dynamic context parallelism: the number of devices, counted along dp and the
            cp axes, of the widest group that a microbatch may have. Which devices form groups, and
            which documents they have, is data of the batch (`hcp.place_microbatch`). None: one
            stream over the cp axes for each dp device.
        ep: number of devices over which a model cuts its experts: those of the innermost of the
            axes dp, cp_outer, cp_inner (`expert_axes`).

    Raises:
        ValueError: for an axis that the mesh lacks or that has two roles, for an unknown comm type
            or layout, and for a widest group that does not divide the dp and cp devices.

    >>> import hcp_jax as hcp
    >>> cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=4, cp_inner=2), comm_type="a2a+p2p")
    >>> cp.size
    8
    """

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
        for note in sorted({collapse(self, c) for c in as_tuple(self.comm_type)} - {""}):
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

    def for_layer(self, layer: int) -> "ContextParallel":
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
        return _with_comm_type(self, self.comm_type[layer])

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

    def shard(self, x: Array | np.ndarray | Gathered, dim: int = 1) -> jax.Array:
        """Reorder an array from natural order to the layout and cut `dim` over the cp devices.

        Works on host arrays, device arrays and inside `jit`. `dim` is padded with zeros at its end
        to `padded_length`. A mask that looks ahead must then end where the stream ends
        (`mask & hcp.lengths(T)`); `shard_batch` does this itself.

        Args:
            x: dim 0 is the batch, cut over dp (unless `dim` is 0). Of a `Gathered`, only the parts
                on this process's own devices are read.
            dim: the sequence dim.

        Raises:
            ValueError: if dp does not divide the batch.

        >>> import hcp_jax as hcp, numpy as np
        >>> cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=4, cp_inner=2))
        >>> tokens = cp.shard(np.arange(16)[None])
        >>> tokens[0, :4].tolist()  # what the first two devices hold
        [0, 15, 1, 14]
        """
        self.placement.require_streams("cp.shard")
        return placing.shard(self, x, dim)

    def unshard(self, x: jax.Array, dim: int = 1, length: int | None = None) -> jax.Array:
        """Reorder an array from the layout back to natural order.

        Args:
            x: an array in the layout.
            dim: the sequence dim.
            length: the length before padding, to cut the result to; keep the padding if None.

        >>> import hcp_jax as hcp, numpy as np
        >>> cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=4, cp_inner=2))
        >>> cp.unshard(cp.shard(np.arange(10)[None]), length=10)[0].tolist()
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
        """
        self.placement.require_streams("cp.unshard")
        return placing.unshard(self, x, dim, length)

    def shard_buffers(self, tree: Any, seq_dims: Any) -> Any:
        """Apply `shard` to every array of a tree, each along its own sequence dim.

        Token ids, labels, activations and positions (`np.arange(T)`, RoPE tables) of one stream
        then lie on the devices in the same order. Arrays whose seq_dim is not 0 have the batch as
        dim 0.

        Args:
            tree: arrays in natural order, in any containers; all of one length, a whole layout.
            seq_dims: one dim for all arrays, or the same containers with a dim for each array (or
                for a container of arrays). None: has no sequence dim, and is returned as it is.

        Raises:
            ValueError: if `seq_dims` does not fit the tree, an array lacks its dim, or the lengths
                differ or need padding; names the array.

        >>> import hcp_jax as hcp, numpy as np
        >>> cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=4, cp_inner=2))
        >>> batch = {"x": np.ones((2, 64, 8)), "positions": np.arange(64), "rate": 0.1}
        >>> dims = {"x": 1, "positions": 0, "rate": None}
        >>> back = cp.unshard_buffers(cp.shard_buffers(batch, dims), dims)
        >>> back["positions"].tolist() == list(range(64))
        True
        """
        self.placement.require_streams("cp.shard_buffers")
        return map_buffers(self.shard, tree, seq_dims, self.padded_length)

    def unshard_buffers(self, tree: Any, seq_dims: Any) -> Any:
        """Reorder every array of a tree back to natural order; undo `shard_buffers`.

        Args and errors are those of `shard_buffers`. Works on results and gradients, too.

        >>> import hcp_jax as hcp, numpy as np
        >>> cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=4, cp_inner=2))
        >>> tree = {"x": np.arange(16.0)[None]}
        >>> cp.unshard_buffers(cp.shard_buffers(tree, 1), 1)["x"][0, :3].tolist()
        [0.0, 1.0, 2.0]
        """
        self.placement.require_streams("cp.unshard_buffers")
        return map_buffers(self.unshard, tree, seq_dims, self.padded_length)

    def shard_batch(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Put a batch of host arrays in natural order on the devices, in the layout.

        Args:
            batch: arrays `[B, T, …]` or `Gathered` (cut over dp and cp), arrays `[B]` (cut over
                dp), scalars (replicated), and `Mask`s. Masks are placed: their intervals are
                computed here, once, and every cp device holds all of them (8 bytes per token).

        Returns:
            A batch with the same keys. T is padded to `padded_length` with zeros. In masks, padding
            sees nothing and no query sees it.

        Raises:
            ValueError: if the arrays have different lengths, or dp does not divide the batch.

        >>> import hcp_jax as hcp, numpy as np
        >>> cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=4, cp_inner=2))
        >>> batch = {"tokens": np.ones((2, 50), np.int32), "mask": hcp.causal()}
        >>> cp.shard_batch(batch)["tokens"].shape
        (2, 64)
        """
        self.placement.require_streams("cp.shard_batch")
        return placing.shard_batch(self, batch)

    def place(self, mask: Mask, length: int, key_length: int | None = None) -> PlacedMask:
        """Place a mask: compute its intervals in the layout and put them on the devices.

        Args:
            mask: a mask in natural order, for a stream of `length` queries or of any length.
            length: T before padding.
            key_length: S before padding, in cross attention; T if None. No query sees later keys.

        Raises:
            ValueError: if the mask was written for more queries, or is already placed.

        >>> import hcp_jax as hcp
        >>> cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=4, cp_inner=2))
        >>> cp.place(hcp.bidirectional(), 50, key_length=70).key_length
        80
        """
        self.placement.require_streams("cp.place")
        return placing.place_mask(self, mask, length, key_length)

    def positions(self, length: int) -> Int32[jax.Array, "1 T"]:
        """Return the global index of every token of a stream, in the layout; for RoPE.

        >>> import hcp_jax as hcp
        >>> cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=4, cp_inner=2))
        >>> cp.positions(16)[0, :4].tolist()
        [0, 15, 1, 14]
        """
        self.placement.require_streams("cp.positions")
        return placing.positions(self, length)

    def roll(self, x: jax.Array, shift: int, dim: int = 1) -> jax.Array:
        """Apply `jnp.roll` along the stream to an array in the layout, across device borders.

        Only the |shift| tokens at the border of each chunk are sent, with one ppermute for each
        chunk of a device. A shift by more than a chunk repeats this for each chunk length.

        Args:
            x: an array in the layout.
            shift: number of tokens to shift by; -1 replaces each token by the next one.
            dim: the sequence dim.

        >>> import hcp_jax as hcp, numpy as np
        >>> cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=4, cp_inner=2))
        >>> targets = cp.roll(cp.shard(np.arange(16)[None]), -1)
        >>> cp.unshard(targets)[0, :4].tolist()
        [1, 2, 3, 4]
        """
        self.placement.require_streams("cp.roll")
        shift = checks.integer("shift", shift)
        return placing.roll(self, x, shift, checks.dimension("dim", dim, x.ndim))

    def describe(self) -> str:
        """Describe the mesh, the groups and the link of each axis, the comm types and the core.

        >>> import hcp_jax as hcp
        >>> cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=4, cp_inner=2))
        >>> print(cp.describe().splitlines()[0])
        8 devices (cpu), context parallel size 8, zigzag layout
        """
        return describe(self)

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


@functools.lru_cache(maxsize=256)
def _with_comm_type(cp: ContextParallel, comm_type: str) -> ContextParallel:
    return dataclasses.replace(cp, comm_type=comm_type)
