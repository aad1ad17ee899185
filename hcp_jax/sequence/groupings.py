"""Compute how devices are cut into groups, and which devices send to which at each ring hop.

A grouping is the tuple of its group sizes in device order. The sizes add up to the number of
devices, so (4, 2, 1, 1) over 8 devices is devices 0-3, 4-5, 6 and 7. Each grouping has its own
compiled program. Default group sizes are powers of two and divisors of the number of devices, so
that 6, 12 or 24 devices have suitable groupings too. The algorithms here only require that the
sizes add up.

    grouping (4, 2, 1, 1): each hop is one ppermute over all rings that are not finished

    hop 1   0→1→2→3→0   4→5→4
    hop 2   0→1→2→3→0                 devices 4 and 5 have seen all their keys
    hop 3   0→1→2→3→0

The program, the packing and the scheduler all use groupings, so this module depends on none of
them. (In code and configs a grouping is often still called `layout`.)
"""

import functools
from collections.abc import Sequence

import numpy as np

from hcp_jax.base import checks

Layout = tuple[int, ...]


def group_sizes(
    num_devices: int, min_size: int = 1, max_size: int | None = None
) -> tuple[int, ...]:
    """Return the sizes that groups of a default grouping may have, ascending.

    These are the powers of two and the divisors of `num_devices` from `min_size` to `max_size`. If
    they cannot add up to `num_devices`, all sizes in that range are returned (7 devices in groups
    of 2 to 4: 4 + 3).

    Raises:
        ValueError: if the bounds are wrong, or no grouping fits in them.
    """
    max_size = num_devices if max_size is None else max_size
    for name, value in (
        ("num_devices", num_devices),
        ("min_cp_size", min_size),
        ("max_cp_size", max_size),
    ):
        checks.integer(name, value, least=1)
    if min_size > max_size:
        raise ValueError(
            f"min_cp_size={min_size} is more than max_cp_size={max_size} (which is num_devices "
            "unless given); lower one or raise the other."
        )
    num_devices, min_size = int(num_devices), int(min_size)
    max_size = min(int(max_size), num_devices)
    sizes = {2**k for k in range(num_devices.bit_length())}
    sizes |= {d for d in range(1, num_devices + 1) if num_devices % d == 0}
    chosen = tuple(sorted(size for size in sizes if min_size <= size <= max_size))
    if not composable(num_devices, chosen)[num_devices]:
        chosen = tuple(range(min_size, max_size + 1))
    if not composable(num_devices, chosen)[num_devices]:
        raise ValueError(
            f"no groups of {min_size} to {max_size} devices add up to num_devices={num_devices}; "
            f"lower min_cp_size to {num_devices // (num_devices // max_size + 1)}."
        )
    return chosen


@functools.lru_cache(maxsize=64)
def composable(num_devices: int, sizes: tuple[int, ...]) -> list[bool]:
    """Return whether groups of these sizes can add up to 0, 1, … `num_devices`."""
    if 1 in sizes:
        return [True] * (num_devices + 1)
    can = [True] + [False] * num_devices
    for total in range(1, num_devices + 1):
        can[total] = any(size <= total and can[total - size] for size in sizes)
    return can


def complete(groups: Sequence[int], num_devices: int, sizes: tuple[int, ...]) -> list[int]:
    """Return `groups` followed by the smallest groups that fill the other devices.

    The sum of `groups` must leave a number of devices that `sizes` can add up to.
    """
    can, rest = composable(num_devices, sizes), num_devices - sum(groups)
    filled = list(groups)
    for size in sorted(sizes):
        while rest >= size and can[rest - size]:
            filled.append(size)
            rest -= size
    assert rest == 0
    return filled


def uniform(size: int, num_devices: int, sizes: tuple[int, ...]) -> list[int]:
    """Return as many groups of `size` as fit, and the fewest others that fill the rest."""
    can, rest = composable(num_devices, sizes), num_devices
    filled: list[int] = []
    for candidate in [size, *sorted((s for s in sizes if s != size), reverse=True)]:
        while rest >= candidate and can[rest - candidate]:
            filled.append(candidate)
            rest -= candidate
    return filled


def canonical(groups: Sequence[int], devices_per_host: int) -> Layout:
    """Return group sizes in their canonical order.

    The order is descending if no group that fits on a host then crosses hosts (true for powers of
    two). Otherwise hosts are filled one by one if that succeeds: (6, 2, 6, 2) on hosts of 8.
    """
    descending = sorted(groups, reverse=True)
    if not _leaves_host(descending, devices_per_host):
        return tuple(descending)
    by_host = _host_by_host(descending, devices_per_host)
    return tuple(descending if by_host is None else by_host)


def _leaves_host(groups: Sequence[int], devices_per_host: int) -> bool:
    first = 0
    for size in groups:
        inside = first // devices_per_host == (first + size - 1) // devices_per_host
        if size <= devices_per_host and not inside:
            return True
        first += size
    return False


def _host_by_host(descending: Sequence[int], devices_per_host: int) -> list[int] | None:
    """Order groups host by host: those wider than a host first, the rest by best fit."""
    # Wide groups come first, one after the other. Together they count as one host, whose room is
    # the free part of their last host.
    wide = [size for size in descending if size > devices_per_host]
    hosts = [wide] if wide else []
    room = [-sum(wide) % devices_per_host] if wide else []
    for size in (s for s in descending if s <= devices_per_host):
        fits = [i for i, left in enumerate(room) if left >= size]
        if not fits:
            hosts.append([])
            room.append(devices_per_host)
            fits = [len(hosts) - 1]
        host = min(fits, key=lambda i: (room[i], i))
        hosts[host].append(size)
        room[host] -= size
    # Only the last host may have free devices: elsewhere they would shift all later groups.
    if sum(left > 0 for left in room) > 1:
        return None
    order = sorted(range(len(hosts)), key=lambda i: room[i] > 0)
    return [size for i in order for size in hosts[i]]


def check_layout(grouping: Sequence[int], num_devices: int) -> Layout:
    """Return `grouping` as a tuple of Python integers.

    Raises:
        ValueError: unless its sizes are positive integers that add up to `num_devices`.
    """
    sizes = tuple(grouping)
    wrong = [s for s in sizes if isinstance(s, bool) or not isinstance(s, int | np.integer)]
    if wrong or not sizes or min(sizes) < 1 or sum(sizes) != num_devices:
        raise ValueError(
            f"layout {sizes} must be group sizes >= 1 that add up to num_devices={num_devices}."
        )
    return tuple(int(size) for size in sizes)


def group_of_device(grouping: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the first device and the size of the group of every device."""
    sizes = np.asarray(grouping, np.int32)
    first = np.cumsum(sizes) - sizes
    return np.repeat(first, sizes).astype(np.int32), np.repeat(sizes, sizes)


def num_hops(grouping: Sequence[int]) -> int:
    """Return the number of hops of the largest group; at hop 0 a device has its own keys."""
    return max(grouping)


def hop_permutation(grouping: Sequence[int], hop: int) -> tuple[tuple[int, int], ...]:
    """Return the (source, destination) pairs of the `ppermute` from hop - 1 to `hop`.

    In every group of more than `hop` devices, each device sends to the next one of its group. The
    result is empty for hop 0 and after the last hop.
    """
    return _cycles(grouping, narrowest=hop + 1) if hop >= 1 else ()


def homeward_permutation(grouping: Sequence[int], hop: int) -> tuple[tuple[int, int], ...]:
    """Return the (source, destination) pairs that move dk and dv from hop - 1 to `hop`.

    Gradients travel with their keys, and then one hop more: groups of exactly `hop` devices send
    too, which returns the gradients to the device that owns the keys.
    """
    return _cycles(grouping, narrowest=max(hop, 2)) if hop >= 1 else ()


def _cycles(grouping: Sequence[int], narrowest: int) -> tuple[tuple[int, int], ...]:
    """Pair each device with the next one of its group, in groups of `narrowest` or more."""
    first, size = group_of_device(grouping)
    device = np.arange(size.size, dtype=np.int32)
    to = first + (device - first + 1) % size
    turning = size >= narrowest
    return tuple(zip(device[turning].tolist(), to[turning].tolist(), strict=True))


def describe(grouping: Sequence[int]) -> str:
    """Return a short text for a grouping: `4×3 + 2 + 1×2`."""
    parts: list[list[int]] = []
    for size in grouping:
        if parts and parts[-1][0] == size:
            parts[-1][1] += 1
        else:
            parts.append([size, 1])
    return " + ".join(f"{size}×{count}" if count > 1 else f"{size}" for size, count in parts)
