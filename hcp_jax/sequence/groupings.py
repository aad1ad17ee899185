"""Define how devices are cut into groups, which sizes groups may have, and how keys walk in them.

A grouping is the tuple of its group sizes, in devices and in device order. The sizes add up to the
number of devices, so (4, 2, 1, 1) over 8 devices is devices 0-3, 4-5, 6 and 7. A grouping is data:
one compiled program runs every grouping whose widest group is not wider than the program.

Group sizes come from a *chain*: each size divides the next one, and groups are in descending order.
So a group always starts at a multiple of its own size, and a block of any size of the chain either
contains a group or lies inside it.

`lanes` neighbouring devices that exchange heads are one *member*. Members have digits in the
radices of the chain; at hop h, member r takes the keys of member r - h, digit by digit:

    chain (8, 16, 32), lanes 8: members have two binary digits, so r - h is r XOR h

    hop 1   0←1  1←0  2←3  3←2          groups of 16 devices are done
    hop 2   0←2  1←3  2←0  3←1
    hop 3   0←3  1←2  2←1  3←0          a group of 32 devices is done

The program, the packing and the scheduler all use groupings, so this module depends on none of
them.
"""

import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int32

from hcp_jax.base import checks

Grouping = tuple[int, ...]


def chain(num_devices: int, devices_per_host: int, lanes: int = 1) -> tuple[int, ...]:
    """Return the sizes that groups may have, ascending; each divides the next one.

    The first size is `lanes`, the last one `num_devices`. The largest part of a host that divides
    the devices is in the chain if `lanes` divides it, so that no group of such a part or less
    crosses hosts.

    Args:
        num_devices: N, the devices along dp and cp.
        devices_per_host: devices that share a host.
        lanes: devices that exchange heads with each other; they must divide `num_devices`.

    Raises:
        ValueError: if a number is not positive, or `lanes` does not divide `num_devices`.

    >>> chain(64, 8, 8), chain(64, 8), chain(24, 8)
    ((8, 16, 32, 64), (1, 2, 4, 8, 16, 32, 64), (1, 2, 4, 8, 24))
    """
    num_devices = checks.integer("num_devices", num_devices, least=1)
    devices_per_host = checks.integer("devices_per_host", devices_per_host, least=1)
    lanes = checks.integer("lanes", lanes, least=1)
    if num_devices % lanes:
        raise ValueError(
            f"lanes={lanes} must divide num_devices={num_devices}; "
            f"{math.gcd(lanes, num_devices)} lanes would."
        )
    host = (
        num_devices if num_devices <= devices_per_host else math.gcd(num_devices, devices_per_host)
    )
    borders = [lanes, host, num_devices] if host % lanes == 0 else [lanes, num_devices]
    sizes = [lanes]
    for border in borders[1:]:
        for factor in _prime_factors(border // sizes[-1]):
            sizes.append(sizes[-1] * factor)
    return tuple(sizes)


def widths(num_devices: int, devices_per_host: int, lanes: int = 1) -> tuple[int, ...]:
    """Return the widths that programs may have, ascending: `chain`, and the divisors below `lanes`.

    A program of fewer devices than `lanes` exchanges heads over its own width and has no hops.

    >>> widths(64, 8, 8)
    (1, 2, 4, 8, 16, 32, 64)
    """
    return chain(lanes, lanes)[:-1] + chain(num_devices, devices_per_host, lanes)


def bounded(sizes: Sequence[int], min_cp_size: int, max_cp_size: int) -> tuple[int, ...]:
    """Return the sizes from `min_cp_size` to `max_cp_size`.

    Raises:
        ValueError: if the bounds are wrong, or there is no size between them.
    """
    for name, value in (("min_cp_size", min_cp_size), ("max_cp_size", max_cp_size)):
        checks.integer(name, value, least=1)
    if min_cp_size > max_cp_size:
        raise ValueError(
            f"min_cp_size={min_cp_size} is more than max_cp_size={max_cp_size} (which is the "
            "number of devices unless given); lower one or raise the other."
        )
    found = tuple(size for size in sizes if min_cp_size <= size <= max_cp_size)
    if not found:
        raise ValueError(
            f"no program has a width from min_cp_size={min_cp_size} to max_cp_size={max_cp_size}; "
            f"programs may have {', '.join(map(str, sizes))} devices."
        )
    return found


def check_menu(menu: Iterable[int], sizes: Sequence[int], name: str = "menu") -> tuple[int, ...]:
    """Return the widths of a menu, ascending, each once.

    Raises:
        ValueError: if the menu is empty, or has a width that is not among `sizes`.
    """
    try:
        given = sorted({checks.integer(f"each width of {name}", width) for width in menu})
    except TypeError:
        raise ValueError(f"{name} must be a list such as {list(sizes)}, got {menu!r}.") from None
    wrong = [width for width in given if width not in sizes]
    if wrong or not given:
        what = f"has the width {wrong[0]}" if wrong else "holds no width"
        raise ValueError(
            f"{name} {what}; programs may have {', '.join(map(str, sizes))} devices, the widths of "
            "their widest groups."
        )
    return tuple(given)


def program_lanes(widest: int, lanes: int) -> int:
    """Return how many devices exchange heads in the program of width `widest`.

    >>> program_lanes(4, 8), program_lanes(32, 8)
    (4, 8)
    """
    return math.gcd(widest, lanes)


def _prime_factors(number: int) -> list[int]:
    """Return the prime factors in ascending order.

    Small factors come first, so that most steps between small sizes are small: most documents are
    short.
    """
    factors, factor = [], 2
    while number > 1:
        while number % factor == 0:
            factors.append(factor)
            number //= factor
        factor += 1
    return factors


def check_grouping(
    grouping: Sequence[int], num_devices: int, sizes: Sequence[int] | None = None
) -> Grouping:
    """Return `grouping` as a tuple of Python integers.

    Args:
        grouping: group sizes in device order.
        num_devices: number of devices that the groups must have together.
        sizes: allowed group sizes, such as a `chain`; any if None.

    Raises:
        ValueError: unless its sizes are positive integers that add up to `num_devices`, are
            allowed, and start each at a multiple of themselves (only checked with `sizes`).
    """
    found = tuple(grouping)
    wrong = [s for s in found if isinstance(s, bool) or not isinstance(s, int | np.integer)]
    if wrong or not found or min(found) < 1 or sum(found) != num_devices:
        raise ValueError(
            f"grouping {found} must be group sizes >= 1 that add up to num_devices={num_devices}."
        )
    first = 0
    for size in found if sizes is not None else ():
        if size not in (sizes or ()):
            raise ValueError(
                f"grouping {describe(found)} has a group of {size} devices; groups may have "
                f"{', '.join(map(str, sizes or ()))}."
            )
        if first % size:
            raise ValueError(
                f"grouping {describe(found)} has a group of {size} devices that starts at device "
                f"{first}; groups start at multiples of their size: sort sizes in descending order."
            )
        first += size
    return tuple(int(size) for size in found)


def group_of_device(grouping: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the first device and the size of the group of every device."""
    sizes = np.asarray(grouping, np.int32)
    first = np.cumsum(sizes) - sizes
    return np.repeat(first, sizes).astype(np.int32), np.repeat(sizes, sizes)


def radices(sizes: Sequence[int], widest: int) -> tuple[int, ...]:
    """Return the radices of the members of a program, the fastest digit first.

    Args:
        sizes: the chain; its first size is the number of lanes.
        widest: width of the program in devices; no radices if it is not wider than the lanes.

    >>> radices((8, 16, 32, 96), 96)
    (2, 2, 3)
    """
    if widest > sizes[0] and widest not in sizes:
        raise ValueError(f"widest={widest} must be one of {', '.join(map(str, sizes))}.")
    inside = [size for size in sizes if size <= widest]
    return tuple(wide // narrow for narrow, wide in itertools.pairwise(inside))


def source_members(radices: Sequence[int], hop: int) -> Int32[np.ndarray, "W"]:
    """Return the member whose keys each member of a block has at `hop`: r - hop, digit by digit.

    Args:
        radices: as `radices` returns them; W is their product.
        hop: 0 (a member's own keys) … W - 1.

    >>> source_members((2, 2), 3).tolist(), source_members((3,), 1).tolist()
    ([3, 2, 1, 0], [2, 0, 1])
    """
    member = np.arange(math.prod(radices), dtype=np.int32)
    source, place = np.zeros_like(member), 1
    for radix in radices:
        source += (member // place - hop // place) % radix * place
        place *= radix
    return source


def describe(grouping: Sequence[int]) -> str:
    """Return a short text for a grouping: `4×3 + 2 + 1×2`."""
    parts: list[list[int]] = []
    for size in grouping:
        if parts and parts[-1][0] == size:
            parts[-1][1] += 1
        else:
            parts.append([size, 1])
    return " + ".join(f"{size}×{count}" if count > 1 else f"{size}" for size, count in parts)
