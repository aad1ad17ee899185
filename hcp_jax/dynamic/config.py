"""Define the config of training with dynamic context parallelism.

It is separate from the code that it configures, so that a config can be read and checked before
there are devices or documents.
"""

import dataclasses
from dataclasses import field
from typing import Literal

from hcp_jax.base.settings import MOST, check, fixed, free, numbers
from hcp_jax.sequence import groupings


@dataclasses.dataclass(frozen=True)
class DynamicConfig:
    """Config of dynamic CP: each document gets as many of the dp · cp devices as it needs.

    Attributes:
        enabled: schedule the documents of every step onto groups of devices; if False, the other
            fields have no effect.
        max_tokens_per_device: M, tokens of the buffer that a device holds in a microbatch; a group
            of g devices holds documents of g · M tokens.
        min_cp_size: smallest width of a program.
        max_cp_size: largest width of a program; null means dp · cp.
        menu: programs to compile: "auto" chooses those that are worth it for the run's own
            documents, a number chooses at most that many; or a list of their widths in devices.
        lookahead: number of steps whose documents are scheduled together, to fill buffers better;
            8 saves 4 to 7 % of the modelled time with 16 documents a device and step, and 21 to
            57 % with 2.
        cost: a file that `hcp dynamic calibrate` wrote; null: the run's model on modelled H200s.
        max_seqlen_per_dp_cp_rank: Megatron's name for max_tokens_per_device.

    Raises:
        ValueError: if it is enabled and a value is missing or invalid.
    """

    enabled: bool = field(default=False, metadata=fixed())
    max_tokens_per_device: int | None = field(default=None, metadata=free(least=1, most=MOST))
    min_cp_size: int = field(default=1, metadata=free(least=1, most=MOST))
    max_cp_size: int | None = field(default=None, metadata=free(least=1, most=MOST))
    menu: Literal["auto"] | int | list[int] = field(
        default="auto", metadata=free(least=1, most=MOST)
    )
    lookahead: int = field(default=8, metadata=numbers(least=1, most=100_000))
    cost: str | None = field(default=None, metadata=free())
    max_seqlen_per_dp_cp_rank: int | None = field(default=None, metadata=free(least=1, most=MOST))

    def __post_init__(self) -> None:
        check(self, "dynamic.")
        if not self.enabled:
            return
        given = {self.max_tokens_per_device, self.max_seqlen_per_dp_cp_rank} - {None}
        if len(given) != 1:
            what = "both are given, and differ" if given else "neither is given"
            raise ValueError(
                "dynamic needs max_tokens_per_device, the tokens of a device's buffer (or "
                f"Megatron's max_seqlen_per_dp_cp_rank); {what}."
            )
        if self.menu == []:
            raise ValueError('dynamic.menu holds no width; give at least one, or "auto".')

    @property
    def tokens(self) -> int:
        """M, given as max_tokens_per_device or as max_seqlen_per_dp_cp_rank."""
        given = (self.max_tokens_per_device, self.max_seqlen_per_dp_cp_rank)
        return next(value for value in given if value is not None)

    @property
    def widths(self) -> tuple[int, ...] | None:
        """Return the menu if it is a list of widths, else None."""
        return tuple(sorted(set(self.menu))) if isinstance(self.menu, list) else None

    def check_sizes(self, num_devices: int) -> None:
        """Check the sizes against a number of devices, as far as they alone tell.

        Which widths programs may have depends on the hosts and on the lanes, too; a run checks that
        when it starts.

        Args:
            num_devices: devices along dp and cp.

        Raises:
            ValueError: if no program has a width in the bounds, or one of the menu cannot be one.
        """
        divisors = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
        most = num_devices if self.max_cp_size is None else self.max_cp_size
        possible = groupings.bounded(divisors, self.min_cp_size, most)
        if self.widths is not None:
            groupings.check_menu(self.widths, possible, "dynamic.menu")
