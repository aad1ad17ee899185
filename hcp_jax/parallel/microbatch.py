"""Put a packed microbatch on the devices of its groups, as input of a program with `cp.groups`.

    packed = dynamic.pack(microbatch, lengths, M, devices=own_devices(cp))
    cp = dataclasses.replace(cp, groups=packed.layout)
    batch = place_microbatch(cp, packed, {"tokens": tokens, "targets": targets, "weights": weights})

Row d of a packed array is the buffer of device d, counted along dp, cp_outer and cp_inner. In the
device arrays `[dp, C·M]` the rows are side by side, so that the mesh assigns each row to its own
device. Nothing moves between hosts: each host packs the rows of its own devices.

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
from hcp_jax.sequence.mask import Mask
from hcp_jax.sequence.packing import PackedMicrobatch, max_runs
from hcp_jax.sequence.terms import Given


def own_devices(cp: ContextParallel) -> range:
    """Return the devices whose buffers this process packs, counted along dp, cp_outer and cp_inner.

    These are the devices that the process drives and any between them, extended to whole rows of
    cp_inner: devices of a row may exchange heads, and then need each other's intervals.

    >>> import hcp_jax as hcp
    >>> own_devices(hcp.ContextParallel(hcp.make_mesh(cp_outer=4, cp_inner=2)))
    range(0, 8)
    """
    here = jax.process_index()
    devices = flat_devices(cp, cp.mesh.devices)
    own = [d for d, lanes in enumerate(devices) if any(x.process_index == here for x in lanes)]
    if not own:
        return range(0)
    inner = cp.axis_size(cp.cp_inner)
    return range(own[0] // inner * inner, (own[-1] // inner + 1) * inner)


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
        cp: a context whose groups are `packed.layout`.
        packed: from `dynamic.pack`, at least for the devices of `own_devices(cp)`.
        arrays: values for each slot of packed's buffers (tokens, targets, weights; 0 for padding),
            with the same rows as packed.
        sliding_window: the model's window, if it has one: a query sees at most this many keys of
            its document, including itself.

    Returns:
        The arrays `[dp, C·M, …]`, cut over dp and the cp axes, "positions", and the "mask" for
        `dot_product_attention`. Shapes depend only on the grouping and on M.

    Raises:
        ValueError: if packed has another grouping, lacks buffers that this process needs or has
            more key runs than the program is compiled for, or if an array has another shape.
    """
    if packed.layout != cp.groups:
        raise ValueError(
            f"the microbatch has layout {packed.layout}, but cp.groups is {cp.groups}; use "
            "dataclasses.replace(cp, groups=packed.layout)."
        )
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
    runs = KeyRuns(*(_everywhere(cp, x) for x in _fill_up(packed, slots)))
    mask = _placed_mask(
        cp, placed(start, interval_sharding), placed(packed.end, interval_sharding), runs
    )
    return token_arrays | {"mask": mask}


def abstract_microbatch(
    cp: ContextParallel, max_tokens_per_device: int, dtypes: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the shapes that `place_microbatch` gives any microbatch of a grouping, for compiling.

    Args:
        cp: a context whose groups are the grouping.
        max_tokens_per_device: M.
        dtypes: dtypes of the arrays by name; each array is `[D, M]`.

    Raises:
        ValueError: if cp has no groups.
    """
    if cp.groups is None:
        raise ValueError("cp has no groups: use dataclasses.replace(cp, groups=layout).")
    shape = cp.axis_size(cp.dp), cp.size * max_tokens_per_device

    def array(shape: tuple[int, ...], dtype: Any, spec: PartitionSpec) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(cp.mesh, spec))

    start, end = (array(shape, np.int32, cp.interval_spec) for _ in range(2))
    most = num_runs(cp.groups, max_tokens_per_device)
    key_runs = (array((sum(cp.groups), n), np.int32, PartitionSpec()) for n in (most, most + 1))
    named = {**dtypes, "positions": np.int32}
    token_arrays = {name: array(shape, dtype, cp.spec(2)) for name, dtype in named.items()}
    return token_arrays | {"mask": _placed_mask(cp, start, end, KeyRuns(*key_runs))}


def num_runs(layout: tuple[int, ...], max_tokens_per_device: int) -> int:
    """Return the number of key runs per device that a grouping's program is compiled for."""
    return max_runs(max_tokens_per_device) if max(layout) > 1 else 1


def _placed_mask(cp: ContextParallel, start: Any, end: Any, runs: KeyRuns) -> Mask:
    return Mask((Given(start, end),), placement=cp.placement, runs=runs)


def _fill_up(packed: PackedMicrobatch, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the runs, with empty runs added up to the number that is compiled for."""
    starts, offsets = packed.runs
    tail = num_runs(packed.layout, slots) - starts.shape[1]
    if tail < 0:
        raise ValueError(
            f"a device holds up to {starts.shape[1]} runs of keys, but {starts.shape[1] + tail} "
            f"are compiled for with {slots} tokens per device: pack with num_runs="
            f"{starts.shape[1] + tail}, and if that fails put fewer documents into a group."
        )
    widths = ((0, 0), (0, tail))
    return np.pad(starts, widths), np.pad(offsets, widths, "edge")


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
