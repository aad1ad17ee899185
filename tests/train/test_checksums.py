"""Checksums: the same however an array is cut, another one for every other bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hcp_jax.train import checksums

VALUES = {
    "float": np.random.default_rng(0).standard_normal((8, 16), np.float32),
    "half": np.random.default_rng(1).standard_normal((8, 16)).astype(jnp.bfloat16),
    "int": np.arange(128, dtype=np.int32).reshape(8, 16),
}


def cut(values, sizes, spec, kind="device"):
    mesh = jax.make_mesh(sizes, ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec(*spec), memory_kind=kind)
    return jax.tree.map(lambda x: jax.device_put(x, sharding), values)


def by_hand(x):
    bits = x.view(f"uint{8 * x.dtype.itemsize}").astype(np.uint64)
    return int(bits.sum() % 2**32)


@pytest.mark.parametrize("kind", ["device", "pinned_host"])
@pytest.mark.parametrize(("sizes", "spec"), [((8, 1), ("a",)), ((2, 4), ("b", "a")), ((1, 8), ())])
def test_a_checksum_is_the_sum_of_the_bits_on_every_mesh(sizes, spec, kind):
    found = checksums.of_arrays({"deep": cut(VALUES, sizes, spec, kind)})
    assert found == {f"deep.{name}": by_hand(x) for name, x in VALUES.items()}


def test_a_bit_more_is_another_checksum():
    changed = VALUES["half"].copy()
    changed.view(np.uint16)[3, 5] ^= 1
    before, after = (
        checksums.of_arrays([cut(x, (8, 1), ("a",))]) for x in (VALUES["half"], changed)
    )
    assert before.keys() == after.keys() == {"0"}
    assert before != after
