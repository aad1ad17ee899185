"""The meter: seconds are where they belong, and MFU is what a person would compute."""

import itertools
import types

import numpy as np
import pytest

from hcp_jax.cost.shape import ModelShape, step_flops
from hcp_jax.models.config import ModelConfig
from hcp_jax.train.metrics import meter
from hcp_jax.train.metrics.meter import Meter

MODEL = ModelConfig(32, 2, 16, 32, 4, 2)
VALUES = {"tokens": 4096.0, "pairs": 1e6}


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is told."""
    now = types.SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(meter.time, "perf_counter", lambda: now.seconds)
    return now


def mesh(kind="cpu", held=None):
    def stats(peak):
        return lambda: None if peak is None else {"peak_bytes_in_use": peak, "bytes_in_use": 1}

    devices = [
        types.SimpleNamespace(device_kind=kind, process_index=process, memory_stats=stats(peak))
        for process, peak in itertools.product((0, 1), held or (None, None))
    ]
    return types.SimpleNamespace(devices=np.array(devices, object))


def test_seconds_are_those_of_the_step_less_what_is_no_part_of_it(clock):
    of_run = Meter(MODEL, mesh())
    clock.seconds += 7
    of_run.start()
    with of_run.waiting():
        clock.seconds += 0.5
    clock.seconds += 1.5
    first = of_run.lap(VALUES)
    assert first == {
        "seconds": 2.0,
        "data_seconds": 0.5,
        "tokens_per_second": 2048.0,
        "tokens_per_second_per_device": 512.0,
    }
    with of_run.paused():  # an evaluation
        clock.seconds += 60
    clock.seconds += 4
    second = of_run.lap(VALUES)
    assert (second["seconds"], second["data_seconds"]) == (4.0, 0.0)


def test_mfu_is_model_flops_over_the_data_sheets_of_all_devices(clock):
    of_run = Meter(MODEL, mesh("NVIDIA H200"))
    clock.seconds += 2
    flops = step_flops(ModelShape.from_config(MODEL), 4096, 1e6)
    assert of_run.lap(VALUES)["mfu"] == pytest.approx(flops / 2 / (4 * 989e12))


@pytest.mark.parametrize(
    ("kind", "dtype", "values"),
    [
        ("cpu", "bfloat16", VALUES),
        ("NVIDIA H200", "float32", VALUES),
        ("NVIDIA H200", "bfloat16", {"tokens": 4096.0}),
    ],
    ids=["no data sheet", "the sheet is of bfloat16", "pairs are not known"],
)
def test_there_is_no_mfu_where_it_would_be_a_guess(clock, kind, dtype, values):
    model = ModelConfig(32, 2, 16, 32, 4, 2, compute_dtype=dtype)
    of_run = Meter(model, mesh(kind))
    clock.seconds += 2
    assert "mfu" not in of_run.lap(values)


def test_memory_is_the_most_that_a_device_of_this_process_has_held(clock):
    of_run = Meter(MODEL, mesh(held=(10, 30)))
    clock.seconds += 1
    assert of_run.lap(VALUES)["memory_peak_bytes"] == 30.0
