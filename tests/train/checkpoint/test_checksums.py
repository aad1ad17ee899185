"""Checksums: the same however an array is cut, another one for other bits or another order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hcp_jax.train.checkpoint import checksums

VALUES = {
    "float": np.random.default_rng(0).standard_normal((8, 16), np.float32),
    "half": np.random.default_rng(1).standard_normal((8, 4, 4)).astype(jnp.bfloat16),
    "int": np.arange(128, dtype=np.int32).reshape(8, 16),
}


def cut(values, sizes, spec, kind="device", axis_type=AxisType.Auto):
    mesh = jax.make_mesh(sizes, ("a", "b"), axis_types=(axis_type,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec(*spec), memory_kind=kind)
    return jax.tree.map(lambda x: jax.device_put(x, sharding), values)


def mix(x):
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) % 2**32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) % 2**32
    return x ^ (x >> 16)


def by_hand(x):
    bits = x.view(f"uint{8 * x.dtype.itemsize}").ravel().tolist()
    return sum(mix(value ^ mix(i)) for i, value in enumerate(bits)) % 2**32


@pytest.mark.parametrize("kind", ["device", "pinned_host"])
@pytest.mark.parametrize(
    ("sizes", "spec"),
    [((8, 1), ("a",)), ((2, 4), ("b", "a")), ((1, 8), ()), ((2, 4), (("b", "a"),))],
)
def test_a_checksum_is_the_same_on_every_mesh(sizes, spec, kind):
    found = checksums.sum_arrays({"deep": cut(VALUES, sizes, spec, kind)})
    assert found == {f"deep.{name}": by_hand(x) for name, x in VALUES.items()}


def test_explicit_axes_and_sizes_that_are_no_multiples_of_eight_change_nothing():
    values = np.random.default_rng(2).standard_normal((6, 7), np.float32)
    placed = cut(values, (2, 4), ("a",), axis_type=AxisType.Explicit)
    sums = checksums.sum_arrays([placed, values[0, 0] + jnp.zeros(())])
    assert sums == {"0": by_hand(values), "1": by_hand(values[:1, :1])}


def one_bit(x):
    x.flat[35] ^= 1


def two_signs(x):
    x.flat[[3, 50]] ^= 0x8000


def two_elements(x):
    x.flat[[3, 50]] = x.flat[[50, 3]]


def two_rows(x):
    x[[1, 6]] = x[[6, 1]]


def all_reversed(x):
    x[:] = x[::-1, ::-1].copy()


@pytest.mark.parametrize("change", [one_bit, two_signs, two_elements, two_rows, all_reversed])
def test_other_bits_or_another_order_give_another_checksum(change):
    changed = VALUES["half"].copy()
    change(changed.view(np.uint16))
    before, after = (
        checksums.sum_arrays([cut(x, (8, 1), ("a",))]) for x in (VALUES["half"], changed)
    )
    assert before.keys() == after.keys() == {"0"}
    assert before != after
