"""One split, and whether it fits."""

import pytest

from hcp_jax import hardware
from hcp_jax.cost.memory import MemoryEstimate
from hcp_jax.cost.models import model_shape
from hcp_jax.cost.split import Split
from hcp_jax.cost.step import estimate
from hcp_jax.planner.candidate import Candidate

COST = estimate(
    model_shape("qwen3-0.6b"),
    Split(comm_type="p2p"),
    hardware.Cluster(hardware.gpu("h100"), 1, 1),
    1024,
)


@pytest.mark.parametrize(("bytes_held", "fits"), [(89, True), (91, False)])
def test_a_tenth_of_the_memory_is_left_and_compiled_memory_counts_before_modelled(bytes_held, fits):
    modelled = Candidate(Split(), COST, MemoryEstimate(bytes_held, 0, 0, 0, 0, 0), 100)
    assert (modelled.fits, modelled.to_json()["memory_source"]) == (fits, "modelled")
    other = MemoryEstimate(100 - bytes_held, 0, 0, 0, 0, 0)
    compiled = Candidate(Split(), COST, other, 100, compiled_bytes=bytes_held)
    assert (compiled.fits, compiled.peak_bytes) == (fits, bytes_held)
    assert compiled.to_json()["memory_source"] == "compiled"
