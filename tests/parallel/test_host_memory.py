import types

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import hcp_jax as hcp
from hcp_jax.parallel import host_memory


def mesh_of(*kinds):
    memories = [types.SimpleNamespace(kind=kind) for kind in kinds]
    device = types.SimpleNamespace(addressable_memories=lambda: memories, device_kind="a board")
    return types.SimpleNamespace(local_devices=[device])


def test_an_array_on_the_host_is_cut_as_it_was():
    sharding = NamedSharding(hcp.make_mesh(cp_outer=8), PartitionSpec("cp_outer"))
    there = host_memory.on_host(sharding)
    assert (there.spec, there.memory_kind) == (sharding.spec, "pinned_host")
    x = jax.device_put(jax.numpy.arange(8.0), there)
    assert x.sharding.memory_kind == "pinned_host"


def test_devices_without_pinned_memory_are_refused_by_name():
    host_memory.require(mesh_of("device", "pinned_host"))
    host_memory.require(mesh_of())  # not here: nobody knows
    with pytest.raises(NotImplementedError, match="a board has the memories device, odd, none"):
        host_memory.require(mesh_of("device", "odd"))
