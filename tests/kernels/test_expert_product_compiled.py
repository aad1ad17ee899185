"""The kernels of experts' products compiled to machine code for GPUs that are not here."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hcp_jax.compiled import aot, clock, hlo
from hcp_jax.kernels import expert_product
from tests.kernels import absent
from tests.kernels.test_triton_compiled import LEAST_SHARED_MEMORY, TENSOR_CORES

M, E, K, N = 4096, 16, 1024, 320
# Programs: blocks of columns times (rows / 128 + experts), or blocks of each expert's weights.
PROGRAMS = {"forward": 3 * (32 + 16), "dx": 8 * (32 + 16), "dw": 16 * 8 * 3}


def compile_products(gpu, dtype, product, folder):
    """The program of a product and its gradients, on one of two GPUs."""
    devices = absent.devices(gpu, hosts=1, gpus_per_host=2)
    mesh = Mesh(np.asarray(devices), ("dp",))
    how = expert_product.resolve(product, dtype, "gpu", devices[0].device_kind)
    everywhere = PartitionSpec()
    arrays = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, everywhere))
        for shape, dtype in (
            ((M, K), dtype),
            ((E, K, N), dtype),
            ((E,), jnp.int32),
            ((M, N), dtype),
        )
    ]

    def run(x, weights, sizes, dout):
        out, back = jax.vjp(lambda *a: expert_product.product(how, *a, sizes), x, weights)
        return out, *back(dout)

    sharded = jax.shard_map(
        run, mesh=mesh, in_specs=(everywhere,) * 4, out_specs=everywhere, check_vma=False
    )
    flags = {
        "xla_backend_optimization_level": 3,
        "xla_gpu_fail_ptx_compilation_on_register_spilling": True,
        "xla_dump_to": str(folder),
    }
    if jax.__version_info__ >= (0, 11):  # before, the assembly is dumped unasked
        flags["xla_dump_emitter_re"] = ".*"
    return hlo.parse(aot.compile_for(sharded, *arrays, flags=flags).as_text())


def product_flops(module):
    return sum(
        clock._product_flops(module, computation, instruction)
        for computation in module.computations.values()
        for instruction in computation.instructions
        if instruction.opcode in ("dot", "custom-call")
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gpu", "dtype"), [("h100", "bfloat16"), ("a100", "bfloat16"), ("h100", "float32")]
)
def test_kernels_do_not_spill_and_compute_the_routed_rows(gpu, dtype, tmp_path):
    module = compile_products(gpu, dtype, "triton", tmp_path)
    assert product_flops(module) == 3 * 2 * M * K * N  # not times E
    [thunks] = tmp_path.glob("*.thunk_sequence.txt")
    found = re.findall(
        r"expert_product_(\w+) grid: \[(\d+), 1, 1\].*shared_memory: (\d+)", thunks.read_text()
    )
    assert {name for name, _, _ in found} == set(PROGRAMS)
    assert all(int(shared) <= LEAST_SHARED_MEMORY for _, _, shared in found)
    texts = [path.read_text() for path in pathlib.Path(tmp_path).glob("*.ptx")]
    for name, programs, _ in found:
        [assembly] = (text for text in texts if f".entry expert_product_{name}(" in text)
        if dtype == "float32":
            assert "tf32" not in assembly
        else:
            assert int(programs) <= PROGRAMS[name]
            assert TENSOR_CORES[gpu] in assembly
            assert "cp.async" in assembly  # blocks are loaded while others are multiplied
            assert "ld.global.b16" not in assembly


@pytest.mark.slow
def test_ragged_dot_computes_all_experts_on_gpus(tmp_path):
    """Or the kernels would not be needed; when XLA learns it, this says so."""
    assert product_flops(compile_products("h100", "bfloat16", "ragged_dot", tmp_path)) >= (
        3 * 2 * M * K * N * E
    )
