"""Hold what one group of a microbatch costs, in numbers; `cost.py` computes them."""

from typing import NamedTuple


class Move(NamedTuple):
    """Equal transfers of a program, as a group sees them.

    Attributes:
        share: share of the group's attention that runs beside each of them; 0 if nothing does.
        seconds: seconds of one transfer.
        times: number of transfers.
        latencies: latencies in one transfer.
        bytes: bytes that a device sends in one transfer.
        across: True if it uses the network, False if it stays inside a host.
    """

    share: float
    seconds: float
    times: int
    latencies: int
    bytes: float
    across: bool


class Group(NamedTuple):
    """Cost of one group in a program, with all constants multiplied out.

    Attributes:
        size: number of devices.
        members: number of members.
        work: seconds per (query, key) pair on one device.
        fixed: seconds of the transfers that no attention hides.
        hidden: (share of the attention, seconds, times) of the other transfers.
        padding: tokens that rounding to tiles adds to a document.
    """

    size: int
    members: int
    work: float
    fixed: float
    hidden: tuple[tuple[float, float, int], ...]
    padding: int

    def pairs(self, length: int) -> float:
        """Return the pairs that each device computes for a document of `length` tokens."""
        padded = length + self.padding
        return padded * padded / (2 * self.size)

    def seconds(self, pairs: float) -> float:
        """Return the seconds for `pairs` pairs per device; increasing and convex in `pairs`."""
        work = pairs * self.work
        total = work + self.fixed
        for share, seconds, times in self.hidden:
            exposed = seconds - share * work
            if exposed > 0.0:
                total += times * exposed
        return total


class TimedMicrobatch(NamedTuple):
    """Timed microbatch, for `Cost.calibrate`.

    Attributes:
        grouping: group sizes in device order.
        lengths: the lengths of each group's documents.
        tokens: tokens of each device's buffer, with padding.
        seconds: measured seconds, forward and backward.

    >>> timed = TimedMicrobatch((4, 4), ((3000,), (900, 800)), tokens=1024, seconds=0.021)
    >>> sum(timed.grouping)
    8
    """

    grouping: tuple[int, ...]
    lengths: tuple[tuple[int, ...], ...]
    tokens: int
    seconds: float
