"""Find the longest sequence that fits, with the compiler as the judge.

The training step is compiled for a cluster that is not here, at two lengths. Memory grows with the
length along a line, which gives the length that would fill nine tenths of a GPU; the step of that
length is compiled, too, and shortened until it does fit. `docs/memory.md` has the results.
"""

import dataclasses
from collections.abc import Callable

from hcp_jax.compiled.report import Memory
from hcp_jax.hardware import Cluster
from hcp_jax.planner import audit
from hcp_jax.train.config import TrainConfig

# Tokens per device: a multiple of the chunks that configs ask for.
_ROUND = 4096


@dataclasses.dataclass(frozen=True)
class Longest:
    """The longest sequence that fits.

    Attributes:
        tokens_per_device: T / C, a multiple of 4096.
        memory: of the step of that length, compiled.
        tried: memory of every length that was compiled, by tokens per device.
    """

    tokens_per_device: int
    memory: Memory
    tried: dict[int, Memory]


def longest(
    memory_of: Callable[[int], Memory], first: tuple[int, int], attempts: int = 5
) -> Longest:
    """Return the most tokens per device that fit.

    Args:
        memory_of: maps tokens per device to the memory of the step, by compiling it.
        first: the two lengths to begin with, in tokens per device.
        attempts: lengths to compile besides these two.

    Raises:
        ValueError: if none of the attempts gave a length that fits.
    """
    tried = {length: memory_of(length) for length in first}
    for _ in range(attempts):
        length = _where_the_line_meets_the_limit(tried)
        too_long = [t for t in tried if not tried[t].fits]
        if too_long:
            length = min(length, min(too_long) - _ROUND)
        if length <= 0 or length in tried:
            break
        tried[length] = memory_of(length)
        if tried[length].fits and tried[length].peak_bytes > 0.98 * _limit(tried[length]):
            break
    fitting = [t for t, memory in tried.items() if memory.fits]
    if not fitting:
        raise ValueError(f"nothing fits: tried {', '.join(map(str, sorted(tried)))} tokens per GPU")
    return Longest(max(fitting), tried[max(fitting)], tried)


def _where_the_line_meets_the_limit(tried: dict[int, Memory]) -> int:
    """Return the length at which the line through the two lengths nearest to the limit meets it.

    All lengths would do if memory were exactly linear; how buffers are packed bends it a little.
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
    """Return the `longest` of a config's training step on a cluster.

    Args:
        config: its seq_len is not used; each dp replica has one stream.
        cluster: as large as the config's mesh.
        first: as in `longest`.
        report: called with tokens per device and memory after each compile.

    Raises:
        ValueError: if the mesh has another size than the cluster, or no length fits.
    """
    cp = audit.place(config, cluster)
    flags = audit.chosen_flags(cluster, [])

    def memory_of(tokens: int) -> Memory:
        of_length = dataclasses.replace(config, seq_len=tokens * cp.size)
        memory = audit.audit_step(cp, cluster, of_length, flags).memory
        report(tokens, memory)
        return memory

    return longest(memory_of, first)


def _limit(memory: Memory) -> float:
    """Return the peak up to which `Memory.fits`."""
    return 0.9 * memory.device_bytes
