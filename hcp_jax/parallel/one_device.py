"""Stand in for a `ContextParallel` where a call has none: one device, nothing is cut.

So functions that take `cp=None` ask the same questions either way.
"""

from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import PartitionSpec

from hcp_jax.cost.traffic import Strategy
from hcp_jax.parallel import spmd
from hcp_jax.sequence.placement import Placement, Streams

if TYPE_CHECKING:
    from hcp_jax.parallel.context import ContextParallel


class OneDevice:
    """The context of a call without `cp`; it has the attributes that attention asks for.

    Attributes:
        device: the device that the call runs on.
    """

    mesh = dp = tp = None
    axes: tuple[str, ...] = ()
    cp_axes: tuple[str, ...] = ()
    size = head_groups = 1
    comm_type = "p2p"
    on_device = False
    strategy = Strategy((), ())
    placement: Placement = Streams()

    def __init__(self, device: jax.Device) -> None:
        self.device = device
        self.platform, self.device_kind = device.platform, device.device_kind

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, OneDevice) and other.device_kind == self.device_kind

    def __hash__(self) -> int:
        return hash(self.device_kind)

    def axis_size(self, axes: Any, *, here: bool = False) -> int:
        """Return 1."""
        return 1

    def padded_length(self, length: int) -> int:
        """Return `length`: nothing is padded."""
        return length

    def heads_spec(self, x: Any) -> PartitionSpec:
        """Return how `x` is cut over Explicit axes of its own mesh, if it has one."""
        return spmd.explicit_spec(x)


def resolve(cp: "ContextParallel | None", x: Any) -> "ContextParallel | OneDevice":
    """Return `cp`, or the context of one device if it is None.

    Args:
        cp: a context, or None.
        x: an array of the call; without `cp` it tells the device.
    """
    return OneDevice(_device(x)) if cp is None else cp


def _device(x: Any) -> jax.Device:
    if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
        return next(iter(x.devices()))
    config: Any = jax.config  # jax does not type its flags
    default = config.jax_default_device
    return default if isinstance(default, jax.Device) else jax.devices(default)[0]
