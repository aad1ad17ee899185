"""Measure how fast a run is: the metrics of each step that depend on time and memory.

seconds                       from the end of the step before to the end of this one
data_seconds                  the part of `seconds` in which the host waited for a batch; the
                              devices work on a step meanwhile, and are idle only if this is
                              most of `seconds`
tokens_per_second             on all devices
tokens_per_second_per_device
mfu                           model FLOPs (`cost/shape.py`) over the peak FLOPs in the data
                              sheets; only for bfloat16 on devices with a known sheet
memory_peak_bytes             the most bytes on any device of this process since it started;
                              only where the device counts them (GPUs do, CPUs do not)
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
        # The sheets' rates are for bfloat16; float32 cannot reach them.
        in_bfloat16 = model.compute_dtype == "bfloat16"
        self._peak = peak_flops(mesh.devices.flat[0].device_kind) if in_bfloat16 else None
        self._waited = 0.0
        self._last = time.perf_counter()

    def start(self) -> None:
        """Start the clock of the first step."""
        self._waited, self._last = 0.0, time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside the context as waiting for data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside the context, such as an evaluation, out of all steps."""
        began = time.perf_counter()
        yield
        self._last += time.perf_counter() - began

    def lap(self, values: Mapping[str, float]) -> dict[str, float]:
        """End a step, and return its metrics, as listed in the module.

        Args:
            values: metrics of the step: "tokens", and "pairs" if they were counted (if not, there
                is no "mfu").
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
