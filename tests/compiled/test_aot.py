"""Programs compiled for clusters that are not here."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hcp_jax import hardware
from hcp_jax.compiled import aot, hlo
from hcp_jax.hardware import Cluster
from hcp_jax.parallel import host_memory
from tests.compiled import needs_cuda_compiler


@needs_cuda_compiler
@pytest.mark.parametrize(("name", "hosts", "per_host"), [("a100", 2, 8), ("gb200", 3, 4)])
def test_a_cluster_of_any_size_has_its_devices_host_by_host(name, hosts, per_host):
    cluster = Cluster(hardware.gpu(name), hosts, per_host)
    devices = aot.devices(cluster)
    assert [d.process_index for d in devices] == [h for h in range(hosts) for _ in range(per_host)]
    assert {d.device_kind for d in devices} == {cluster.gpu.device_kind}
    assert {d.platform for d in devices} == {"gpu"}


@needs_cuda_compiler
@pytest.mark.parametrize("name", ["a100", "h100", "b200"])
def test_a_program_is_compiled_for_the_gpus_that_its_shapes_lie_on(name):
    mesh = Mesh(np.array(aot.devices(Cluster(hardware.gpu(name), 2, 4))), ("x",))
    x = jax.ShapeDtypeStruct((64, 128), jnp.bfloat16, sharding=NamedSharding(mesh, P("x")))

    def f(x):
        return jax.lax.with_sharding_constraint(jnp.sin(x).T @ x, NamedSharding(mesh, P()))

    compiled = aot.compile_for(f, x)
    (found,) = hlo.collectives(compiled.as_text())
    assert (found.kind, found.groups) == ("all-reduce", (tuple(range(8)),))
    assert compiled.memory_analysis().argument_size_in_bytes == 8 * 128 * 2


@needs_cuda_compiler
def test_flags_reach_the_compiler():
    mesh = Mesh(np.array(aot.devices(Cluster(hardware.gpu("h100"), 1, 2))), ("x",))
    x = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=NamedSharding(mesh, P("x")))
    with pytest.raises(Exception, match="xla_no_such_flag"):
        aot.compile_for(jnp.sin, x, flags={"xla_no_such_flag": True})


@needs_cuda_compiler
def test_arguments_in_the_host_s_memory_take_none_of_the_gpu_s():
    mesh = Mesh(np.array(aot.devices(Cluster(hardware.gpu("h200"), 1, 2))), ("x",))
    there = host_memory.on_host(NamedSharding(mesh, P("x")))
    x = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=there)

    def f(x):
        doubled = 2 * jax.device_put(x, jax.memory.Space.Device)
        return jax.device_put(doubled, jax.memory.Space.Host)

    jitted = jax.jit(f, in_shardings=there, out_shardings=there, donate_argnums=0)
    memory = aot.compile_for(jitted, x).memory_analysis()
    size = 64 * 128 * 4 // 2
    assert (memory.argument_size_in_bytes, memory.host_argument_size_in_bytes) == (0, size)


def test_shapes_that_lie_nowhere_are_an_error():
    with pytest.raises(ValueError, match="says on which devices"):
        aot.compile_for(jnp.sin, jax.ShapeDtypeStruct((4,), jnp.float32))


def test_without_the_plugin_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotImplementedError, match="pip install .jax-cuda13-plugin"):
        aot.devices(Cluster(hardware.gpu("h200"), 1, 8))
