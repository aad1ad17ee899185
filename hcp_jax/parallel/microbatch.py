"""Put a packed microbatch on the devices of its groups, as input of a program with groups.

    cp = dataclasses.replace(cp, widest_group=8)
    packed = dynamic.pack(microbatch, lengths, M, devices=own_devices(cp))
    batch = place_microbatch(cp, packed, {"tokens": tokens, "targets": targets, "weights": weights})

Row d of a packed array is the buffer of device d, counted along dp, cp_outer and cp_inner. In the
device arrays `[dp, C·M]` the rows are side by side, so that the mesh assigns each row to its own
device. Nothing moves between hosts: each host packs the rows of its own devices. One program, and
arrays of one shape, serve every grouping whose groups lie in blocks of `cp.widest_group` devices.

It is separate from `context.py` because nothing is reordered here.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Shaped

from hcp_jax.base import checks
from hcp_jax.parallel.context import ContextParallel
from hcp_jax.sequence.layout import KeyRuns
from hcp_jax.sequence.mask import Intervals
from hcp_jax.sequence.packing import PackedMicrobatch, num_runs
from hcp_jax.sequence.placed_mask import PlacedMask
from hcp_jax.sequence.placement import Groups


def own_devices(cp: ContextParallel) -> range:
    """Return the devices whose buffers this process packs, counted along dp, cp_outer and cp_inner.

    These are the devices that the process drives and any between them, extended to whole rows of
    the axes that heads are exchanged over: such devices need each other's intervals.

    >>> import hcp_jax as hcp
    >>> own_devices(hcp.ContextParallel(hcp.make_mesh(cp_outer=4, cp_inner=2)))
    range(0, 8)
    """
    here = jax.process_index()
    devices = flat_devices(cp, cp.mesh.devices)
    own = [d for d, lanes in enumerate(devices) if any(x.process_index == here for x in lanes)]
    if not own:
        return range(0)
    row = cp.size // cp.axis_size(tuple(a for a in cp.cp_axes if a not in cp.whole_axes))
    return range(own[0] // row * row, (own[-1] // row + 1) * row)


def flat_devices(
    cp: ContextParallel, devices: Shaped[np.ndarray, "..."]
) -> Shaped[np.ndarray, "D lanes"]:
    """Reshape an array like `mesh.devices` to one row for each position along dp and the cp axes.

    The entries of a row differ in tp and in mesh axes that `cp` does not use.
    """
    order = [cp.mesh.axis_names.index(axis) for axis in cp.flat_axes]
    others = [dim for dim in range(devices.ndim) if dim not in order]
    return devices.transpose(*order, *others).reshape(cp.axis_size(cp.flat_axes), -1)


def place_microbatch(
    cp: ContextParallel,
    packed: PackedMicrobatch,
    arrays: Mapping[str, Shaped[np.ndarray, "D M ..."]],
    *,
    sliding_window: int | None = None,
) -> dict[str, Any]:
    """Put a packed microbatch on the devices, as the batch of a program with `cp.groups`.

    Args:
        cp: a context with a `widest_group` at least as wide as every group of `packed`.
        packed: from `dynamic.pack`, at least for the devices of `own_devices(cp)`.
        arrays: values for each slot of packed's buffers (tokens, targets, weights; 0 for padding),
            with the same rows as packed.
        sliding_window: the model's window, if it has one: a query sees at most this many keys of
            its document, including itself.

    Returns:
        The arrays `[dp, C·M, …]`, cut over dp and the cp axes, "positions", and the "mask" for
        `dot_product_attention`. Shapes depend only on the widest group and on M.

    Raises:
        ValueError: if a group of packed does not lie in a block of the widest group, if packed
            lacks buffers that this process needs or has more key runs than the program is compiled
            for, or if an array has another shape.

    >>> import numpy as np, hcp_jax as hcp
    >>> cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=4, cp_inner=2), widest_group=8)
    >>> plan = hcp.dynamic.schedule([90, 30, 20], num_devices=8, max_tokens_per_device=32)
    >>> packed = hcp.dynamic.pack(plan.microbatches[0], plan.lengths, 32)
    >>> tokens = np.maximum(packed.document, 0)  # [D, M]
    >>> hcp.place_microbatch(cp, packed, {"tokens": tokens})["tokens"].shape  # [dp, C·M]
    (1, 256)
    """
    _require_blocks(cp, packed.grouping)
    needed = own_devices(cp)
    if packed.devices.start > needed.start or packed.devices.stop < needed.stop:
        raise ValueError(
            f"packed has the buffers of devices {packed.devices}, but this process needs those of "
            f"{needed}: pack(devices=own_devices(cp))."
        )
    for name, rows in arrays.items():
        if rows.shape[:2] != packed.position.shape:
            raise ValueError(
                f"{name} has shape {rows.shape}, but the buffers are {packed.position.shape}: an "
                "array needs a row for each device of packed.devices, and an entry for each slot."
            )
    start = packed.start
    if sliding_window is not None:
        window = checks.integer("sliding_window", sliding_window, least=1)
        start = np.maximum(start, packed.end - min(window, np.iinfo(np.int32).max))
    first, slots = packed.devices.start, packed.position.shape[1]

    def placed(rows: np.ndarray, sharding: NamedSharding) -> jax.Array:
        return _from_rows(cp, rows, first, sharding)

    token_arrays = {
        name: placed(rows, cp.sharding(rows.ndim))
        for name, rows in {**arrays, "positions": packed.position}.items()
    }
    interval_sharding = NamedSharding(cp.mesh, cp.interval_spec)
    runs = KeyRuns(*(_everywhere(cp, x) for x in _fill_up(cp, packed, slots)))
    intervals = Intervals(placed(start, interval_sharding), placed(packed.end, interval_sharding))
    mask = PlacedMask(intervals, runs, cp.placement)
    return token_arrays | {"mask": mask}


def abstract_microbatch(
    cp: ContextParallel, max_tokens_per_device: int, dtypes: Mapping[str, Any], lanes: int = 1
) -> dict[str, Any]:
    """Return the shapes that `place_microbatch` gives any microbatch, for compiling a program.

    Args:
        cp: a context with a `widest_group`.
        max_tokens_per_device: M.
        dtypes: dtypes of the arrays by name; each array is `[D, M]`.
        lanes: lanes of the microbatches, as in `dynamic.pack`.

    Raises:
        ValueError: if cp has no groups.
    """
    if not isinstance(cp.placement, Groups):
        raise ValueError("cp has no groups: use dataclasses.replace(cp, widest_group=devices).")
    shape = cp.axis_size(cp.dp), cp.size * max_tokens_per_device

    def array(shape: tuple[int, ...], dtype: Any, spec: PartitionSpec) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(cp.mesh, spec))

    start, end = (array(shape, np.int32, cp.interval_spec) for _ in range(2))
    placement = cp.placement
    most = num_runs(placement.widest, lanes, max_tokens_per_device)
    runs = (array((placement.num_devices, n), np.int32, PartitionSpec()) for n in (most, most + 1))
    named = {**dtypes, "positions": np.int32}
    token_arrays = {name: array(shape, dtype, cp.spec(2)) for name, dtype in named.items()}
    mask = PlacedMask(Intervals(start, end), KeyRuns(*runs), placement)
    return token_arrays | {"mask": mask}


def _require_blocks(cp: ContextParallel, grouping: tuple[int, ...]) -> None:
    """Check that every group lies inside one aligned block of the widest group."""
    placement = cp.placement
    if not isinstance(placement, Groups):
        raise ValueError("cp has no groups: use dataclasses.replace(cp, widest_group=devices).")
    if sum(grouping) != placement.num_devices:
        raise ValueError(
            f"the microbatch's grouping {grouping} is for {sum(grouping)} devices, but cp has "
            f"{placement.num_devices} along dp and the cp axes."
        )
    first = 0
    for size in grouping:
        if first // placement.widest != (first + size - 1) // placement.widest:
            raise ValueError(
                f"the group of devices {first} … {first + size - 1} does not lie in a block of "
                f"widest_group={placement.widest} devices; use dataclasses.replace(cp, "
                f"widest_group={max(grouping)})."
            )
        first += size


def _fill_up(cp: ContextParallel, packed: PackedMicrobatch, slots: int) -> KeyRuns:
    """Return the runs, with empty runs added up to the number that is compiled for."""
    starts, offsets = packed.runs
    most = num_runs(cp.placement.reach, packed.lanes, slots)
    tail = most - starts.shape[1]
    if tail < 0:
        raise ValueError(
            f"a device holds up to {starts.shape[1]} runs of keys, but {most} are compiled for "
            f"with {slots} tokens per device: pack with num_runs={most}, and if that fails put "
            "fewer documents into a group."
        )
    widths = ((0, 0), (0, tail))
    return KeyRuns(np.pad(starts, widths), np.pad(offsets, widths, "edge"))


def _from_rows(cp: ContextParallel, rows: np.ndarray, first: int, sharding: Any) -> jax.Array:
    """Put buffers, whose first row is that of device `first`, on the devices as `[dp, C·M, …]`."""
    slots, dp = rows.shape[1], cp.axis_size(cp.dp)
    shape = dp, cp.size * slots, *rows.shape[2:]

    def part(index: Any) -> np.ndarray:
        (top, bottom, _), (begin, end, _) = (index[dim].indices(shape[dim]) for dim in (0, 1))
        begins = [row * cp.size - first + begin // slots for row in range(top, bottom)]
        buffers = [rows[b : b + (end - begin) // slots] for b in begins]
        return np.stack([buffer.reshape(-1, *rows.shape[2:]) for buffer in buffers])

    return jax.make_array_from_callback(shape, sharding, part)


def _everywhere(cp: ContextParallel, x: np.ndarray) -> jax.Array:
    whole = NamedSharding(cp.mesh, PartitionSpec())
    return jax.make_array_from_callback(x.shape, whole, x.__getitem__)
