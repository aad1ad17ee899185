"""Find the longest sequence that fits, by compiling the training step.

The step is compiled at two lengths, for a cluster that is not available. Memory grows nearly
linearly with the length, so a line through both gives the length that would fill nine tenths of a
GPU. The step is then compiled at that length, which is reduced until it fits. `docs/memory.md` has
results.
"""

import dataclasses
from collections.abc import Callable

from hcp_jax.compiled.report import Memory
from hcp_jax.hardware import Cluster
from hcp_jax.planner import audit
from hcp_jax.planner.audit_tick import audit_run
from hcp_jax.train.config import TrainConfig

# Round tokens per device to a multiple of the chunk sizes in configs.
_ROUND = 4096


@dataclasses.dataclass(frozen=True)
class Longest:
    """Longest sequence that fits.

    Attributes:
        tokens_per_device: T / C, a multiple of 4096.
        memory: memory of the compiled step of that length.
        tried: memory of every compiled length, by tokens per device.
    """

    tokens_per_device: int
    memory: Memory
    tried: dict[int, Memory]


def longest(measure: Callable[[int], Memory], first: tuple[int, int], attempts: int = 5) -> Longest:
    """Return the largest number of tokens per device that fits.

    Args:
        measure: returns the memory of the step for a number of tokens per device.
        first: the first two lengths to try, in tokens per device.
        attempts: most lengths to try after these two.

    Raises:
        ValueError: if none of the tried lengths fits.
    """
    tried = {length: measure(length) for length in first}
    for _ in range(attempts):
        length = _extrapolated_length(tried)
        too_long = [t for t in tried if not tried[t].fits]
        if too_long:
            length = min(length, min(too_long) - _ROUND)
        if length <= 0 or length in tried:
            break
        tried[length] = measure(length)
        if tried[length].fits and tried[length].peak_bytes > 0.98 * _limit(tried[length]):
            break
    fitting = [t for t, memory in tried.items() if memory.fits]
    if not fitting:
        raise ValueError(f"nothing fits: tried {', '.join(map(str, sorted(tried)))} tokens per GPU")
    return Longest(max(fitting), tried[max(fitting)], tried)


def _extrapolated_length(tried: dict[int, Memory]) -> int:
    """Return the length at which a line through two tried points reaches the memory limit.

    The two points nearest to the limit are used, because the packing of buffers makes memory
    slightly nonlinear.
    """
    spare = {t: _limit(memory) - memory.peak_bytes for t, memory in tried.items()}
    low, high = sorted(sorted(tried, key=lambda t: abs(spare[t]))[:2])
    slope = (spare[low] - spare[high]) / (high - low)
    return int(low + spare[low] / max(slope, 1.0)) // _ROUND * _ROUND


def longest_of_config(
    config: TrainConfig,
    cluster: Cluster,
    first: tuple[int, int],
    report: Callable[[int, Memory], None] = lambda tokens, memory: None,
) -> Longest:
    """Return the `longest` of a config's training step, or its pipeline's tick, on a cluster.

    Args:
        config: config of the run; its seq_len is ignored.
        cluster: cluster with as many GPUs as the config's mesh has devices.
        first: as in `longest`.
        report: called with tokens per device and memory after each compilation.

    Raises:
        ValueError: if the mesh and the cluster differ in size, or no length fits.
    """
    cp = audit.place(config, cluster)
    flags = audit.chosen_flags(cluster, [])

    def measure(tokens: int) -> Memory:
        resized = dataclasses.replace(config, seq_len=tokens * cp.size)
        memory = audit_run(cp, cluster, resized, flags).memory
        report(tokens, memory)
        return memory

    return longest(measure, first)


def _limit(memory: Memory) -> float:
    """Return the peak up to which `Memory.fits`."""
    return 0.9 * memory.device_bytes
