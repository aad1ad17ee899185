"""Define the types of the hardware table: GPUs, links, and rates with their sources."""

import dataclasses
from typing import Literal, NamedTuple

Direction = Literal["forward", "backward"]


@dataclasses.dataclass(frozen=True)
class Rate:
    """Speed reached in practice, measured or modelled.

    Attributes:
        value: FLOP/s or bytes/s.
        measured: True if it was measured on this exact kind of GPU; False if it is modelled.
        source: who measured it and how, or how it was modelled.
    """

    value: float
    measured: bool
    source: str


@dataclasses.dataclass(frozen=True)
class Link:
    """Link between GPUs.

    Attributes:
        name: name, such as "NVLink 4" or "InfiniBand NDR".
        peak: bytes/s that one GPU can send while it receives the same amount, by data sheet.
        rate: bytes/s that a large collective reaches.
        latency: seconds from the start of a collective to its first byte, launch included.
    """

    name: str
    peak: float
    rate: Rate
    latency: float


@dataclasses.dataclass(frozen=True, eq=False)
class GPU:
    """One kind of GPU.

    Three figures are in FLOP/s of bfloat16 and mean different things: `peak_flops` is the figure of
    the data sheet (MFU divides by it), `product_rate` is the rate that large matrix products reach,
    and `attention_rates` are the rates that attention kernels reach.

    Attributes:
        name: short name, such as "h200".
        device_kind: `jax.Device.device_kind`.
        compute_capability: (major, minor).
        core_count: streaming multiprocessors.
        fpus_per_core: float32 lanes of each.
        memory_bytes: memory of the device.
        memory_bandwidth: bytes/s.
        l2_bytes: size of the L2 cache.
        clock_ghz: boost clock.
        shared_bytes_per_core: shared memory of a streaming multiprocessor.
        shared_bytes_per_block: most shared memory that one block may request.
        peak_flops: dense bfloat16 products, by data sheet.
        nvlink: link to the GPUs of its NVLink domain.
        network: link to all other GPUs.
        product_rate: FLOP/s that large bfloat16 products reach.
        attention_rates: FLOP/s that attention kernels reach, by implementation and direction;
            visible pairs are counted exactly, backward as 2.5 times forward.
        nvlink_domain: number of GPUs joined by NVLink; 0 means the GPUs of one host.
        sources: source of each number that is not from OpenXLA's target specification.
    """

    name: str
    device_kind: str
    compute_capability: tuple[int, int]
    core_count: int
    fpus_per_core: int
    memory_bytes: int
    memory_bandwidth: float
    l2_bytes: int
    clock_ghz: float
    shared_bytes_per_core: int
    shared_bytes_per_block: int
    peak_flops: float
    nvlink: Link
    network: Link
    product_rate: Rate
    attention_rates: dict[tuple[str, Direction], Rate]
    nvlink_domain: int = 0
    sources: dict[str, str] = dataclasses.field(default_factory=dict)

    def attention_rate(self, implementation: str, direction: Direction) -> Rate:
        """Return the FLOP/s of an attention kernel.

        Args:
            implementation: name of the attention core's implementation, such as "triton".
            direction: "forward" or "backward".

        Raises:
            ValueError: if the table has no figure for the implementation.
        """
        try:
            return self.attention_rates[implementation, direction]
        except KeyError:
            known = sorted({name for name, _ in self.attention_rates})
            raise ValueError(
                f"no rate of implementation {implementation!r} on {self.name}; "
                f"there are rates of {', '.join(known)}."
            ) from None


class Path(NamedTuple):
    """Path of a collective: kind of link, bytes/s sent by each device, seconds of latency."""

    link: str
    rate: float
    latency: float


def modelled_share(peak: float, share: float, what: str) -> Rate:
    """Return a rate that is modelled as a share of a peak."""
    return Rate(peak * share, False, f"modelled: {share:.0%} of {what}")


def nvlink(name: str, peak: float) -> Link:
    """Return an NVLink link of `peak` bytes/s; its rate (80 % of it) and latency are modelled."""
    return Link(name, peak, modelled_share(peak, 0.8, "the data sheet"), 10e-6)


def infiniband(name: str, peak: float) -> Link:
    """Return an InfiniBand link of `peak` bytes/s; its rate (90 %) and latency are modelled."""
    return Link(name, peak, modelled_share(peak, 0.9, "the data sheet"), 25e-6)
