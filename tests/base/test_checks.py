"""Numbers that users pass: what is no number of the kind is refused by name, nothing is rounded."""

import numpy as np
import pytest

import hcp_jax as hcp
from hcp_jax import dynamic
from hcp_jax.base import checks
from hcp_jax.models.layers.rope import RopeScaling

X = np.zeros((2, 16, 4), np.float32)


@pytest.fixture(scope="module")
def cp():
    return hcp.ContextParallel(hcp.make_mesh(cp_outer=4, cp_inner=2))


def test_integers_of_numpy_are_integers():
    for value in (3, np.int64(3), np.uint8(3), np.array(3)):
        assert checks.integer("n", value, least=1) == 3
    assert hcp.sliding_window(np.int32(4)) == hcp.sliding_window(4)


@pytest.mark.parametrize("value", [True, np.True_, 3.0, np.float32(3), "3", None, 1j])
def test_nothing_else_is_an_integer(value):
    with pytest.raises(ValueError, match="n must be an integer"):
        checks.integer("n", value)


WRONG = {
    "window of sliding_window must be": lambda cp: hcp.sliding_window(True),
    "right of sliding_window must be": lambda cp: hcp.sliding_window(3, right=-1),
    "chunk of chunked_local must be": lambda cp: hcp.chunked_local(2.0),
    "prefix_length of prefix_lm must be integers, got float64": lambda cp: hcp.prefix_lm(3.7),
    "prefix_length of prefix_lm must be 0 or": lambda cp: hcp.prefix_lm(np.array([2, -1])),
    "length of lengths must be integers, got float64": lambda cp: hcp.lengths(3.7),
    "length of lengths must be integers, got float32": lambda cp: hcp.lengths(X[:, 0, 0]),
    "length of lengths must be integers, got bool": lambda cp: hcp.lengths(True),
    "length of lengths must be 0 or greater, got -2": lambda cp: hcp.lengths([3, -2]),
    "length of lengths must be integers, got object": lambda cp: hcp.lengths(None),
    "key_length of lengths must be integers": lambda cp: hcp.lengths(3, 2.5),
    "segment_ids must be integers, got bool": lambda cp: hcp.documents([True, False]),
    "padding_id of documents": lambda cp: hcp.documents([1, 0], padding_id=0.0),
    "uint8 must be an integer from 0 to 255, got -1": lambda cp: hcp.documents(
        np.zeros(3, np.uint8), padding_id=-1
    ),
    "start must be integers, got float64": lambda cp: hcp.intervals([[0.5]], [[1]]),
    "end must be integers of one shape": lambda cp: hcp.intervals([[0, 0]], [[1], [1, 2]]),
    "length must be an integer >= 0, got 3.5": lambda cp: hcp.causal().intervals(3.5),
    "key_length must be an integer >= 0": lambda cp: hcp.causal().intervals(3, -1),
    "tp must be a positive integer, got True": lambda cp: hcp.make_mesh(tp=True),
    "head_groups must be a positive integer": lambda cp: hcp.ContextParallel(
        cp.mesh, head_groups=1.0
    ),
    "layer must be": lambda cp: cp.for_layer(-1),
    "dim must be an integer from -3 to 2, got 3": lambda cp: cp.shard(X, dim=3),
    "dim must be an integer from -3 to 2, got 1.0": lambda cp: cp.unshard(X, dim=1.0),
    "length must be an integer from 0 to 16": lambda cp: cp.unshard(cp.shard(X), length=17),
    "length must be an integer >= 0, got -4": lambda cp: cp.positions(-4),
    "length must be an integer >= 0, got 8.0": lambda cp: cp.positions(8.0),
    "length must be an integer >= 0, got True": lambda cp: cp.place(hcp.causal(), True),
    "shift must be an integer, got 0.5": lambda cp: cp.roll(cp.shard(X), 0.5),
    "dim must be an integer from -3 to 2, got -4": lambda cp: cp.roll(cp.shard(X), 1, dim=-4),
    "seed must be": lambda cp: dynamic.schedule([3], 1, 8, seed=0.5),
    "max_programs must be": lambda cp: dynamic.choose_menu([[3]], 1, 8, max_programs=True),
    "num_devices must be": lambda cp: dynamic.schedule([3], 2.0, 8),
    "Cost.tile must be a finite": lambda cp: dynamic.Cost(tile=True),
    "hosts must be": lambda cp: hcp.plan("llama3-8b", 1024, hosts=1.5),
    "seq_len must be": lambda cp: hcp.plan("llama3-8b", True),
    "rope_scaling.factor must be": lambda cp: RopeScaling("linear", float("nan")),
}


@pytest.mark.parametrize("message", WRONG)
def test_numbers_that_make_no_sense_are_refused_at_the_door(message, cp):
    with pytest.raises(ValueError, match=message):
        WRONG[message](cp)
