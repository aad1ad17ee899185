"""The longest sequence that fits: found with the compiler as the judge.

    python -m hcp_jax.planner.longest configs/llama3-8b-long.yaml --gpu h200 --hosts 1

compiles the config's training step for a cluster that is not here, at two lengths. Memory grows
with the length along a line, which gives the length that would fill nine tenths of a GPU; the step
of that length is compiled, too, and shortened until it does fit. `docs/memory.md` has what came of
it. It stands apart from `audit.py` because it asks one question of several programs.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable

from hcp_jax import hardware
from hcp_jax.compiled.report import Memory
from hcp_jax.hardware import Cluster
from hcp_jax.planner import audit
from hcp_jax.train import config as configuration
from hcp_jax.train.config import TrainConfig

# Tokens per device: a multiple of the chunks that configs ask for.
_ROUND = 4096


@dataclasses.dataclass(frozen=True)
class Longest:
    """What was found.

    Attributes:
        tokens_per_device: T / C, a multiple of 4096.
        memory: of the step of that length, compiled.
        tried: tokens per device -> memory, of every length that was compiled.
    """

    tokens_per_device: int
    memory: Memory
    tried: dict[int, Memory]


def longest(
    memory_of: Callable[[int], Memory], first: tuple[int, int], attempts: int = 5
) -> Longest:
    """The most tokens per device that fit.

    Args:
        memory_of: tokens per device -> memory, by compiling.
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
    """By the two nearest to the limit, since packing makes the line a little crooked."""
    spare = {t: _limit(memory) - memory.peak_bytes for t, memory in tried.items()}
    low, high = sorted(sorted(tried, key=lambda t: abs(spare[t]))[:2])
    slope = (spare[low] - spare[high]) / (high - low)
    return int(low + spare[low] / max(slope, 1.0)) // _ROUND * _ROUND


def of_config(config: TrainConfig, cluster: Cluster, first: tuple[int, int]) -> Longest:
    """`longest` of a config's training step on a cluster, with one stream per dp replica.

    Args:
        config: whose length is left aside.
        cluster: as large as the config's mesh.
        first: as in `longest`.
    """
    cp = audit.place(config, cluster)
    flags = audit.chosen_flags(cluster, [])

    def memory_of(tokens: int) -> Memory:
        of_length = dataclasses.replace(config, seq_len=tokens * cp.size)
        memory = audit.audit_step(cp, cluster, of_length, flags).memory
        print(_told(tokens * cp.size, tokens, memory), file=sys.stderr, flush=True)
        return memory

    return longest(memory_of, first)


def main() -> int:
    """`python -m hcp_jax.planner.longest`; returns the exit code."""
    parser = argparse.ArgumentParser(description="the longest sequence that fits, by compiling")
    configuration.add_arguments(parser)
    hardware.add_arguments(parser)
    parser.add_argument(
        "--first", type=int, nargs=2, default=(65536, 131072), metavar="TOKENS", help="per GPU"
    )
    args = parser.parse_args()
    cluster = Cluster(hardware.gpu(args.gpu), args.hosts, args.gpus_per_host)
    config = configuration.from_arguments(args)
    try:
        found = of_config(config, cluster, tuple(args.first))
    except (ValueError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    cp_size = config.parallel.resolve().cp_outer * config.parallel.resolve().cp_inner
    print(_told(found.tokens_per_device * cp_size, found.tokens_per_device, found.memory))
    return 0


def _limit(memory: Memory) -> float:
    """The peak up to which `Memory.fits`."""
    return 0.9 * memory.device_bytes


def _told(seq_len: int, tokens: int, memory: Memory) -> str:
    return (
        f"{seq_len:,} tokens, {tokens:,} per GPU: {memory.peak_bytes / 2**30:.1f} of "
        f"{memory.device_bytes / 2**30:.0f} GiB, and {memory.host_bytes / 2**30:.1f} GiB of the "
        "host's memory"
    )


if __name__ == "__main__":
    sys.exit(main())
