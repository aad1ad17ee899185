"""The configuration of training with dynamic context parallelism.

Apart from what it configures, so that a config is read, and what cannot be is refused, before there
are devices or documents.
"""

import dataclasses
from dataclasses import field
from typing import Literal

from hcp_jax.base.settings import MOST, check, fixed, free, numbers
from hcp_jax.sequence import groupings


@dataclasses.dataclass(frozen=True)
class DynamicConfig:
    """Settings of dynamic CP: each document gets as many of the dp · cp devices as it needs.

    Attributes:
        enabled: schedule the documents of every step onto groups of devices; everything below is
            without meaning otherwise.
        max_tokens_per_device: M, tokens of the buffer that a device holds in a microbatch; a group
            of g devices holds documents of g · M tokens.
        min_cp_size: the least size of a group.
        max_cp_size: the largest size of a group; null: dp · cp.
        menu: the group layouts that are compiled: "auto" chooses at most 16 for the run's own
            documents, a number at most that many; or a list of layouts, each a list of sizes.
        lookahead: steps whose documents are scheduled together, so that buffers are fuller.
        cost: a file that `hcp dynamic calibrate` wrote; null: the run's model on modelled H200s.
        max_seqlen_per_dp_cp_rank: Megatron's word for max_tokens_per_device.

    Raises:
        ValueError: if it is enabled, and a value is missing or makes no sense.
    """

    enabled: bool = field(default=False, metadata=fixed())
    max_tokens_per_device: int | None = field(default=None, metadata=free(least=1, most=MOST))
    min_cp_size: int = field(default=1, metadata=free(least=1, most=MOST))
    max_cp_size: int | None = field(default=None, metadata=free(least=1, most=MOST))
    menu: Literal["auto"] | int | list[list[int]] = field(
        default="auto", metadata=free(least=1, most=MOST)
    )
    lookahead: int = field(default=1, metadata=numbers(least=1, most=100_000))
    cost: str | None = field(default=None, metadata=free())
    max_seqlen_per_dp_cp_rank: int | None = field(default=None, metadata=free(least=1, most=MOST))

    def __post_init__(self):
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
            raise ValueError('dynamic.menu holds no layout; give at least one, or "auto".')

    @property
    def tokens(self) -> int:
        """Return M, by whichever word it was given."""
        given = (self.max_tokens_per_device, self.max_seqlen_per_dp_cp_rank)
        return next(value for value in given if value is not None)

    @property
    def layouts(self) -> tuple[groupings.Layout, ...] | None:
        """Return the menu if it is a list of layouts, else None."""
        if not isinstance(self.menu, list):
            return None
        return tuple(dict.fromkeys(tuple(layout) for layout in self.menu))

    def check_sizes(self, num_devices: int) -> int:
        """Check the sizes against a number of devices and return the widest possible group.

        Raises:
            ValueError: if no layout fits, or one of the menu does not.
        """
        sizes = groupings.group_sizes(num_devices, self.min_cp_size, self.max_cp_size)
        if self.layouts is None:
            return sizes[-1]
        for layout in self.layouts:
            groupings.check_layout(layout, num_devices)
            if min(layout) < sizes[0] or max(layout) > sizes[-1]:
                raise ValueError(
                    f"dynamic.menu: {groupings.describe(layout)} has groups outside of min_cp_size="
                    f"{sizes[0]} to max_cp_size={sizes[-1]}."
                )
        return max(max(layout) for layout in self.layouts)
