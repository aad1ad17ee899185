"""How fast a run is, step by step: its clock, and the rates that come of it.

Of each step the meter gives, beside what the step itself computed:

    seconds                       from the end of the step before to the end of this one
    data_seconds                  of those, the seconds in which the host waited for a batch; the
                                  devices have a step in hand meanwhile, and idle only if this is
                                  most of `seconds`
    tokens_per_second             of all devices
    tokens_per_second_per_device
    mfu                           model FLOPs (`cost/shape.py`) over what the data sheets of all
                                  devices promise; only for bfloat16 on devices that have a sheet
    memory_peak_bytes             the most that a device of this process has held since it began;
                                  only where the device counts it (GPUs; a CPU does not)
"""

import contextlib
import time
from collections.abc import Iterator, Mapping

import jax
from jax.sharding import Mesh

from hcp_jax.cost.shape import ModelShape, step_flops
from hcp_jax.hardware import peak_flops
from hcp_jax.models.config import ModelConfig


class Meter:
    """Times steps.

    Args:
        model: the model that is trained.
        mesh: the devices it is trained on.
    """

    def __init__(self, model: ModelConfig, mesh: Mesh):
        self._shape = ModelShape.from_config(model)
        self._devices = mesh.devices.size
        self._local = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
        # The sheets' rate is that of bfloat16; float32 would be held to what it cannot reach.
        in_bfloat16 = model.compute_dtype == "bfloat16"
        self._peak = peak_flops(mesh.devices.flat[0].device_kind) if in_bfloat16 else None
        self._waited = 0.0
        self._last = time.perf_counter()

    def start(self) -> None:
        """The first step begins now."""
        self._waited, self._last = 0.0, time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the host's waiting for data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no part of any step, such as an evaluation."""
        began = time.perf_counter()
        yield
        self._last += time.perf_counter() - began

    def lap(self, values: Mapping[str, float]) -> dict[str, float]:
        """A step has ended: its figures, as listed above.

        Args:
            values: of the step: "tokens", and "pairs" if they were counted (there is no "mfu"
                otherwise).
        """
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        waited, self._waited = self._waited, 0.0
        rate = values["tokens"] / seconds
        found = {
            "seconds": seconds,
            "data_seconds": waited,
            "tokens_per_second": rate,
            "tokens_per_second_per_device": rate / self._devices,
        }
        if self._peak is not None and "pairs" in values:
            flops = step_flops(self._shape, values["tokens"], values["pairs"])
            found["mfu"] = flops / seconds / self._devices / self._peak
        held = [stats["peak_bytes_in_use"] for d in self._local if (stats := d.memory_stats())]
        if held:
            found["memory_peak_bytes"] = float(max(held))
        return found
