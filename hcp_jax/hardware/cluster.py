"""Describe a cluster of equal hosts, and find the link that a collective runs over."""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence

from hcp_jax.hardware.gpu import GPU, Path

NO_LINK, INSIDE, BETWEEN = "no link", "inside a host", "between hosts"

# In these collectives each GPU sends through its own network card only.
_OWN_CARD = ("collective-permute", "all-to-all", "ragged-all-to-all")


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Cluster of hosts, each with the same number of GPUs of one kind.

    Raises:
        ValueError: if a size is not a positive integer.

    >>> from hcp_jax import hardware
    >>> cluster = hardware.Cluster(hardware.gpu("h200"), hosts=2, gpus_per_host=8)
    >>> cluster.size, cluster.path("all-to-all", range(8)).link
    (16, 'inside a host')
    """

    gpu: GPU
    hosts: int
    gpus_per_host: int

    def __post_init__(self) -> None:
        for name in ("hosts", "gpus_per_host"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}.")

    @property
    def size(self) -> int:
        """Number of GPUs."""
        return self.hosts * self.gpus_per_host

    @property
    def domain(self) -> int:
        """Number of GPUs joined by NVLink."""
        return self.gpu.nvlink_domain or self.gpus_per_host

    def path(self, kind: str, group: Sequence[int]) -> Path:
        """Return the path of a collective: the kind of link, its rate and its latency.

        If a group has several GPUs in each host, gathers and reductions cross hosts over all their
        network cards at once; in a permute or an all-to-all each GPU uses its own card.

        Args:
            kind: kind of the collective, as HLO names it.
            group: numbers of its devices, counted host by host.
        """
        members = Counter(device // self.domain for device in group)
        if len(group) < 2:
            return Path(NO_LINK, math.inf, 0.0)
        inside, network = self.gpu.nvlink, self.gpu.network
        if len(members) == 1:
            return Path(INSIDE, inside.rate.value, inside.latency)
        cards = 1 if kind in _OWN_CARD else min(members.values())
        return Path(BETWEEN, min(inside.rate.value, cards * network.rate.value), network.latency)

    def __str__(self) -> str:
        return f"{self.hosts} x {self.gpus_per_host} {self.gpu.name.upper()}"
