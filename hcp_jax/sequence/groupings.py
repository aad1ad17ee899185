"""Say which groups devices may form, and check groupings.

A grouping is the tuple of its group sizes in device order. The sizes add up to the number of
devices, so (4, 2, 1, 1) over 8 devices is devices 0-3, 4-5, 6 and 7. Groupings are data: one
compiled program serves all groupings up to its widest group (`attention/walk.py`).

Group sizes are those of a chain: each divides the next, the border of a host is among them, and a
group starts at a multiple of its size. So two groups are either apart, or one block holds both:

    chain of 16 devices on hosts of 8      1, 2, 4, 8, 16
    the same, heads exchanged in a host    8, 16               (`lanes` = 8)
    chain of 24 devices on hosts of 8      1, 2, 4, 8, 24

The program, the packing and the scheduler all use groupings, so this module depends on none of
them.
"""

import functools
from collections.abc import Sequence

import numpy as np

from hcp_jax.base import checks

Grouping = tuple[int, ...]


@functools.lru_cache(maxsize=256)
def chain(num_devices: int, devices_per_host: int, lanes: int = 1) -> tuple[int, ...]:
    """Return the sizes that groups may have, ascending.

    Args:
        num_devices: N, the number of devices of all groups together.
        devices_per_host: devices that share a host. Sizes inside a host divide it, sizes across
            hosts are multiples of it, if it divides N.
        lanes: devices that exchange heads with each other, the smallest size; it must divide N.

    Raises:
        ValueError: if `lanes` does not divide `num_devices`.

    >>> chain(64, 8, 8), chain(24, 8), chain(6, 8)
    ((8, 16, 32, 64), (1, 2, 4, 8, 24), (1, 2, 6))
    """
    if num_devices % lanes:
        raise ValueError(f"lanes={lanes} must divide num_devices={num_devices}.")
    borders = [num_devices]
    inside = lanes < devices_per_host < num_devices and devices_per_host % lanes == 0
    if inside and num_devices % devices_per_host == 0:
        borders = [devices_per_host, num_devices]
    sizes = [lanes]
    for border in borders:
        while sizes[-1] < border:
            sizes.append(sizes[-1] * _smallest_factor(border // sizes[-1]))
    return tuple(sizes)


def _smallest_factor(number: int) -> int:
    return next((p for p in range(2, int(number**0.5) + 1) if number % p == 0), number)


def check_grouping(
    grouping: Sequence[int], num_devices: int, sizes: Sequence[int] | None = None
) -> Grouping:
    """Return `grouping` as a tuple of Python integers.

    Args:
        grouping: group sizes in device order.
        num_devices: their sum.
        sizes: possible group sizes (`chain`), whose groups start at multiples of their size; None
            checks the sum only.

    Raises:
        ValueError: if it is no such grouping.
    """
    given = tuple(grouping)
    wrong = [s for s in given if isinstance(s, bool) or not isinstance(s, int | np.integer)]
    if wrong or not given or min(given) < 1 or sum(given) != num_devices:
        raise ValueError(
            f"grouping {given} must be group sizes >= 1 that add up to num_devices={num_devices}."
        )
    first = 0
    for size in given:
        if sizes is not None and (size not in sizes or first % size):
            raise ValueError(
                f"grouping {given}: a group of {size} at device {first} is not possible. Groups "
                f"have sizes {', '.join(map(str, sizes))} and start at a multiple of their size."
            )
        first += size
    return tuple(int(size) for size in given)


def group_of_device(grouping: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the first device and the size of the group of every device."""
    sizes = np.asarray(grouping, np.int32)
    first = np.cumsum(sizes) - sizes
    return np.repeat(first, sizes).astype(np.int32), np.repeat(sizes, sizes)


def widths(
    num_devices: int,
    devices_per_host: int,
    lanes: int = 1,
    least: int = 1,
    most: int | None = None,
) -> tuple[int, ...]:
    """Return the widest groups that programs may be compiled for, ascending.

    They are the sizes of the chain, and below `lanes` its divisors in the chain of one lane:
    groups narrower than an exchange need a program with a narrower exchange.

    Args:
        num_devices: N.
        devices_per_host: as in `chain`.
        lanes: as in `chain`.
        least: smallest size of a group.
        most: largest size of a group; N if None.

    Raises:
        ValueError: if the bounds are wrong, or no size lies between them.
    """
    most = num_devices if most is None else most
    for name, value in (
        ("num_devices", num_devices),
        ("min_cp_size", least),
        ("max_cp_size", most),
    ):
        checks.integer(name, value, least=1)
    if least > most:
        raise ValueError(
            f"min_cp_size={least} is more than max_cp_size={most} (which is num_devices unless "
            "given); lower one or raise the other."
        )
    possible = sorted({*chain(lanes, lanes), *chain(num_devices, devices_per_host, lanes)})
    found = tuple(size for size in possible if least <= size <= most)
    if not found:
        raise ValueError(
            f"no group size lies between min_cp_size={least} and max_cp_size={most}; possible are "
            f"{', '.join(map(str, possible))}."
        )
    return found


def describe(grouping: Sequence[int]) -> str:
    """Return a short text for a grouping: `4×3 + 2 + 1×2`."""
    parts: list[list[int]] = []
    for size in grouping:
        if parts and parts[-1][0] == size:
            parts[-1][1] += 1
        else:
            parts.append([size, 1])
    return " + ".join(f"{size}×{count}" if count > 1 else f"{size}" for size, count in parts)
