"""Parse the device groups of a collective, in every syntax that HLO uses for them."""

import itertools
import math
import re


def parse_groups(attributes: str, num_devices: int) -> tuple[tuple[int, ...], ...]:
    """Return the groups of devices of a collective.

    Args:
        attributes: attributes of the instruction, in HLO syntax.
        num_devices: number of devices of the module; without groups, all form one group.

    Raises:
        ValueError: if the groups are written in an unknown syntax.

    >>> parse_groups("replica_groups=[2,2]<=[2,2]T(1,0)", 4)
    ((0, 2), (1, 3))
    """
    match = re.search(
        r"replica_groups=(\{\{[\d,{}\s]*\}\}|\{\}|\[[^ ]*|mesh\[.*?\}|\S+)", attributes
    )
    text = match.group(1).rstrip(", ") if match else "{}"
    if text == "{}":
        return (tuple(range(num_devices)),)
    if text.startswith("{{"):
        rows = re.findall(r"\{([\d,\s]*)\}", text[1:-1])
        return tuple(_numbers(row) for row in rows)
    if iota := re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _iota_groups(*(_numbers(group or "") for group in iota.groups()))
    if mesh := re.fullmatch(r"mesh\[([^\]]*)\](?:, ?device_ids=\((.*)\))? ?\{([^}]*)\}", text):
        axes, devices, grouped = mesh.groups()
        groups = _mesh_groups(axes, grouped)
        order = _device_order(devices) if devices else tuple(range(num_devices))
        return tuple(tuple(order[place] for place in group) for group in groups)
    raise ValueError(f"replica groups written as {text!r} are not known to this reader.")


def _device_order(text: str) -> tuple[int, ...]:
    """Return the devices of a mesh in order, from a list or from `[8,8]T(1,0)`."""
    if iota := re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        dims, order = (_numbers(group or "") for group in iota.groups())
        return _iota_groups((math.prod(dims),), dims, order)[0]
    if not re.fullmatch(r"[\d,\s]+", text):
        raise ValueError(f"device ids written as {text!r} are not known to this reader.")
    return _numbers(text)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number.strip())


def _iota_groups(
    shape: tuple[int, ...], dims: tuple[int, ...], order: tuple[int, ...]
) -> tuple[tuple[int, ...], ...]:
    """Return the groups `[groups, size]<=[dims]T(order)`: an iota of `dims`, transposed, by row."""
    order = order or tuple(range(len(dims)))
    strides = [math.prod(dims[i + 1 :]) for i in range(len(dims))]
    ranges = [range(dims[i]) for i in order]
    flat = [
        sum(at * strides[i] for at, i in zip(place, order, strict=True))
        for place in itertools.product(*ranges)
    ]
    size = shape[-1]
    return tuple(tuple(flat[i : i + size]) for i in range(0, len(flat), size))


def _mesh_groups(axes: str, grouped: str) -> tuple[tuple[int, ...], ...]:
    """Return the groups `mesh['a'=2,'b'=4] {'b'}`; `'b':(m)n` is a sub-axis of axis b of size n.

    Its m is the product of the sizes of the sub-axes before it.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", axes)}
    parts = {
        name: (int(above), int(size)) if size else (1, sizes[name])
        for name, above, size in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", grouped)
    }
    dims, inside = [], []
    for name, size in sizes.items():
        above, part = parts.get(name, (size, 1))
        dims += [above, part, size // (above * part)]
        inside += [False, name in parts, False]
    order = [i for i in range(len(dims)) if not inside[i]] + [
        i for i in range(len(dims)) if inside[i]
    ]
    size = math.prod(d for d, i in zip(dims, inside, strict=True) if i)
    return _iota_groups((size,), tuple(dims), tuple(order))
