"""One split of a cluster, with its modelled cost and memory."""

import dataclasses
from typing import Any

from hcp_jax import hardware
from hcp_jax.cost.memory import MemoryEstimate
from hcp_jax.cost.step import Estimate, Split

USABLE = 0.9  # of the memory: the rest is CUDA's, NCCL's and what fragments leave unused


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One split, with what it costs.

    Attributes:
        split: the mesh, the comm type and the remat policy.
        cost: of a step.
        memory: of a device, modelled.
        compiled_bytes: of a device, from the compiled program; None unless verified.
        device_bytes: what the GPU has.
    """

    split: Split
    cost: Estimate
    memory: MemoryEstimate
    device_bytes: int
    compiled_bytes: int | None = None

    @property
    def peak_bytes(self) -> float:
        """Memory of a device: compiled if known, else modelled."""
        return self.memory.peak if self.compiled_bytes is None else self.compiled_bytes

    @property
    def fits(self) -> bool:
        """Whether it leaves a tenth of the memory."""
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
            "bytes": {link: cost.bytes_on(link) for link in links},
            "memory_bytes": self.peak_bytes,
            "memory_source": "modelled" if self.compiled_bytes is None else "compiled",
            "fits": self.fits,
        }
