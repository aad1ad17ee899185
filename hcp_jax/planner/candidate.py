"""Hold one split of a cluster with its modelled cost and memory."""

import dataclasses
from typing import Any

from hcp_jax import hardware
from hcp_jax.cost.memory import USABLE, MemoryEstimate
from hcp_jax.cost.split import Split
from hcp_jax.cost.step import Estimate


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One split with its cost.

    Attributes:
        split: mesh sizes, comm type and remat policy.
        cost: modelled cost of a step.
        memory: modelled memory of a device.
        compiled_bytes: memory of a device in the compiled program; None unless verified.
        device_bytes: memory of the GPU.
    """

    split: Split
    cost: Estimate
    memory: MemoryEstimate
    device_bytes: int
    compiled_bytes: int | None = None

    @property
    def peak_bytes(self) -> float:
        """Memory of a device in bytes: from the compiled program if known, else modelled."""
        return self.memory.peak if self.compiled_bytes is None else self.compiled_bytes

    @property
    def fits(self) -> bool:
        """True if it leaves at least a tenth of the memory free."""
        return self.peak_bytes <= USABLE * self.device_bytes

    def to_json(self) -> dict[str, Any]:
        """Return all figures, as plain numbers and strings."""
        cost = self.cost
        links = (hardware.INSIDE, hardware.BETWEEN)
        return dataclasses.asdict(self.split) | {
            "step_s": cost.step_s,
            "tokens_per_s_per_gpu": cost.tokens_per_s,
            "mfu": cost.mfu,
            "compute_s": cost.compute,
            "exposed_s": cost.exposed_s,
            "bubble_s": cost.bubble_s,
            "bytes": {link: cost.bytes_on(link) for link in links},
            "memory_bytes": self.peak_bytes,
            "memory_source": "modelled" if self.compiled_bytes is None else "compiled",
            "fits": self.fits,
        }
