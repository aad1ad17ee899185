"""The profiler: the steps asked for are traced, with the library's names in them."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

import hcp_jax as hcp
from hcp_jax.train.metrics.profile import SKIPPED, Profiler, ProfileSteps, check_profile


def test_a_trace_has_the_steps_asked_for_and_the_names_of_the_ring(tmp_path):
    cp = hcp.ContextParallel(hcp.make_mesh(cp_outer=4, cp_inner=2), comm_type="a2a+p2p")
    made = []

    @jax.jit
    def attend(state, batch):
        return hcp.dot_product_attention(state, batch, batch, cp=cp, is_causal=True), {}

    def step(state, batch):
        made.append(len(made))
        return attend(state, batch)

    state = batch = cp.shard(jnp.ones((1, 16, 4, 8)))
    with Profiler(ProfileSteps(2, 1), 0, 5, tmp_path) as profiler:
        for number in range(5):
            state, _ = profiler.make(number, step, state, batch)
    assert made == [0, 1, 2, 3, 4]
    [trace] = (tmp_path / "profile").rglob("*.xplane.pb")
    for name in (b"ring_hop", b"exchange_heads", b"attend"):
        assert name in trace.read_bytes()
    [events] = (tmp_path / "profile").rglob("*.trace.json.gz")
    steps = [
        event["args"]["step_num"]
        for event in json.loads(gzip.decompress(events.read_bytes()))["traceEvents"]
        if event.get("name") == "train"
    ]
    assert sorted(map(int, steps)) == [1, 2]


def test_a_run_that_ends_within_the_trace_leaves_the_trace(tmp_path):
    def die(state, batch):
        raise RuntimeError("died")

    with (
        pytest.raises(RuntimeError, match="died"),
        Profiler(ProfileSteps(3, 0), 0, 9, tmp_path) as profiler,
    ):
        profiler.make(0, die, jnp.ones(2), None)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    jax.profiler.start_trace(tmp_path / "another")  # raises if one is still running
    jax.profiler.stop_trace()


def test_nothing_is_traced_unasked(tmp_path):
    with Profiler(None, 0, 2, tmp_path) as profiler:
        assert profiler.make(0, lambda state, batch: (state, batch), 1, 2) == (1, 2)
    assert not list(tmp_path.iterdir())


def test_the_first_steps_are_skipped_unless_told_otherwise():
    assert check_profile(ProfileSteps(3), 10, 50) == (10 + SKIPPED, 10 + SKIPPED + 2)
    assert check_profile(ProfileSteps(3, 10), 10, 50) == (10, 12)


@pytest.mark.parametrize("steps", [ProfileSteps(0), ProfileSteps(9, 45), ProfileSteps(1, 3)])
def test_steps_that_the_run_does_not_make_are_refused(steps):
    with pytest.raises(ValueError, match="makes steps 10 to 49"):
        check_profile(steps, 10, 50)
