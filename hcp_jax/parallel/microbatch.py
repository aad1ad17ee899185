"""A packed microbatch onto the devices of its groups: what a program with `cp.groups` is fed.

    packed = dynamic.pack(microbatch, lengths, M, devices=own_devices(cp))
    cp = dataclasses.replace(cp, groups=packed.layout)
    batch = place_microbatch(cp, packed, {"tokens": tokens, "targets": targets, "weights": weights})

Row d of a packed array is the buffer of device d, counted along dp, cp_outer and cp_inner. The rows
stand side by side in the device arrays `[dp, C·M]`, so that each is where the mesh puts it: nothing
moves between hosts, and each host packs the rows of its own devices.

It stands apart from `context.py` because a stream is reordered there, and here nothing is.
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
from hcp_jax.sequence.mask import Given, Mask
from hcp_jax.sequence.packing import PackedMicrobatch, max_runs


def own_devices(cp: ContextParallel) -> range:
    """The devices whose buffers this process packs, counted along dp, cp_outer and cp_inner.

    Those that it drives, and what is between them and around them up to whole rows of cp_inner: the
    devices of a row may exchange heads, and then need each other's intervals.

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
    cp: ContextParallel, of_devices: Shaped[np.ndarray, "..."]
) -> Shaped[np.ndarray, "D lanes"]:
    """A row for each of the devices that groups are made of, from an array like `mesh.devices`.

    What lies in a row differs in tp, and in the mesh's axes that `cp` leaves alone.
    """
    order = [cp.mesh.axis_names.index(axis) for axis in cp.flat_axes]
    others = [dim for dim in range(of_devices.ndim) if dim not in order]
    return of_devices.transpose(*order, *others).reshape(cp.axis_size(cp.flat_axes), -1)


def place_microbatch(
    cp: ContextParallel,
    packed: PackedMicrobatch,
    arrays: Mapping[str, Shaped[np.ndarray, "D M ..."]],
    *,
    sliding_window: int | None = None,
) -> dict[str, Any]:
    """A microbatch as the batch of a program whose `cp.groups` are its layout.

    Args:
        cp: its groups are `packed.layout`.
        packed: from `dynamic.pack`, for the devices of `own_devices(cp)` at least.
        arrays: for each place of packed's buffers, whatever the program wants to know of the
            token there (tokens, targets, weights, of 0 where there is none); rows as packed's.
        sliding_window: of the model, if it has one: a query sees so many keys of its document at
            most, itself included.

    Returns:
        The arrays, cut over dp and the cp axes: `[dp, C·M, …]`; "positions", and the "mask" that
        `dot_product_attention` takes. Shapes depend on the layout and on M alone.

    Raises:
        ValueError: if packed is of another layout, lacks buffers that this process needs or has
            more runs of keys than are compiled for, or if an array is of another shape.
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
                "array needs a row for each device of packed.devices, and an entry for each place."
            )
    start = packed.start
    if sliding_window is not None:
        window = checks.integer("sliding_window", sliding_window, least=1)
        start = np.maximum(start, packed.end - min(window, np.iinfo(np.int32).max))
    first, places = packed.devices.start, packed.position.shape[1]

    def placed(rows: np.ndarray, sharding: NamedSharding) -> jax.Array:
        return _from_rows(cp, rows, first, sharding)

    of_tokens = {
        name: placed(rows, cp.sharding(rows.ndim))
        for name, rows in {**arrays, "positions": packed.position}.items()
    }
    of_queries = NamedSharding(cp.mesh, cp.spec_of_intervals)
    runs = KeyRuns(*(_everywhere(cp, x) for x in _filled_up(packed, places)))
    mask = _placed_mask(cp, placed(start, of_queries), placed(packed.end, of_queries), runs)
    return of_tokens | {"mask": mask}


def abstract_microbatch(
    cp: ContextParallel, max_tokens_per_device: int, dtypes: Mapping[str, Any]
) -> dict[str, Any]:
    """The shapes of what `place_microbatch` makes of any microbatch of a layout, to compile for.

    Args:
        cp: its groups are the layout.
        max_tokens_per_device: M.
        dtypes: of the arrays, by name; each is `[D, M]`.

    Raises:
        ValueError: if cp has no groups.
    """
    if cp.groups is None:
        raise ValueError("cp has no groups: use dataclasses.replace(cp, groups=layout).")
    shape = cp.axis_size(cp.dp), cp.size * max_tokens_per_device

    def array(shape: tuple[int, ...], dtype, spec: PartitionSpec) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(cp.mesh, spec))

    start, end = (array(shape, np.int32, cp.spec_of_intervals) for _ in range(2))
    most = num_runs(cp.groups, max_tokens_per_device)
    of_keys = (array((sum(cp.groups), n), np.int32, PartitionSpec()) for n in (most, most + 1))
    named = {**dtypes, "positions": np.int32}
    of_tokens = {name: array(shape, dtype, cp.spec(2)) for name, dtype in named.items()}
    return of_tokens | {"mask": _placed_mask(cp, start, end, KeyRuns(*of_keys))}


def num_runs(layout: tuple[int, ...], max_tokens_per_device: int) -> int:
    """Runs of keys on each device that the program of a layout is compiled for."""
    return max_runs(max_tokens_per_device) if max(layout) > 1 else 1


def _placed_mask(cp: ContextParallel, start, end, runs: KeyRuns) -> Mask:
    return Mask((Given(start, end),), placement=cp.placement, runs=runs)


def _filled_up(packed: PackedMicrobatch, places: int) -> tuple[np.ndarray, np.ndarray]:
    """The runs, and empty ones up to the number that is compiled for."""
    starts, offsets = packed.runs
    tail = num_runs(packed.layout, places) - starts.shape[1]
    if tail < 0:
        raise ValueError(
            f"a device holds up to {starts.shape[1]} runs of keys, but {starts.shape[1] + tail} "
            f"are compiled for with {places} tokens per device: pack with num_runs="
            f"{starts.shape[1] + tail}, and if that fails put fewer documents into a group."
        )
    widths = ((0, 0), (0, tail))
    return np.pad(starts, widths), np.pad(offsets, widths, "edge")


def _from_rows(cp: ContextParallel, rows: np.ndarray, first: int, sharding) -> jax.Array:
    """`[dp, C·M, …]` on the devices, from the buffers of devices `first` … of the flat mesh."""
    places, dp = rows.shape[1], cp.axis_size(cp.dp)
    shape = dp, cp.size * places, *rows.shape[2:]

    def part(index: Any) -> np.ndarray:
        (top, bottom, _), (begin, end, _) = (index[dim].indices(shape[dim]) for dim in (0, 1))
        begins = [row * cp.size - first + begin // places for row in range(top, bottom)]
        buffers = [rows[b : b + (end - begin) // places] for b in begins]
        return np.stack([of_row.reshape(-1, *rows.shape[2:]) for of_row in buffers])

    return jax.make_array_from_callback(shape, sharding, part)


def _everywhere(cp: ContextParallel, x: np.ndarray) -> jax.Array:
    whole = NamedSharding(cp.mesh, PartitionSpec())
    return jax.make_array_from_callback(x.shape, whole, x.__getitem__)
