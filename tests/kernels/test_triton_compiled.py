"""The Triton kernels compiled to machine code for GPUs that are not here.

XLA compiles for a target described in text, so these run on any machine that has the CUDA plugin's
wheels. XLA itself refuses a kernel that asks for more shared memory than the target has; ptxas
tells the rest.
"""

import dataclasses
import functools
import importlib.util
import pathlib
import re
import shutil
import site
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hcp_jax.kernels import core, triton
from hcp_jax.kernels.tiles import tiles_for
from hcp_jax.layout import KeyRuns
from hcp_jax.mask import Intervals
from tests.kernels.gpu_targets import TARGETS, Target

KERNELS = ("attention_forward", "attention_dq", "attention_dkv")
TENSOR_CORES = {"sm_80": "mma.sync", "sm_90a": "wgmma.mma_async", "sm_100a": "tcgen05.mma"}
LEAST_SHARED_MEMORY = 101_376  # per block, of any GPU since Ampere


@dataclasses.dataclass(frozen=True)
class Compiled:
    ptx: str
    registers: int
    spilled: int
    shared_memory: int


def _ptxas() -> str | None:
    in_wheels = (
        path
        for folder in site.getsitepackages()
        for path in pathlib.Path(folder, "nvidia").glob("*/bin/ptxas")
    )
    return shutil.which("ptxas") or next((str(path) for path in in_wheels), None)


def _compile(target: Target, sizes: tuple[int, int], dtype: str, cap, folder) -> dict:
    """Every kernel, compiled as a part of a program for two GPUs (inside `shard_map`)."""
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name=target.name, target_config=target.proto, topology="1x1x2"
    )
    mesh = Mesh(np.asarray(topology.devices), ("dp",))
    rows, everywhere = PartitionSpec("dp"), PartitionSpec()

    def like(spec, shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    (h, hv), t, s, n, k = sizes, 1024, 1024, 8, 2
    spec = core.CoreSpec("triton", h**-0.5, cap, target.name, False)
    q = like(rows, (2, t, n, h), dtype)
    keys, v = like(rows, (2, s, k, h), dtype), like(rows, (2, s, k, hv), dtype)
    dout, lse = like(rows, (2, t, n, hv), dtype), like(rows, (2, t, n), jnp.float32)
    bound = like(everywhere, (1, t), jnp.int32)
    runs = KeyRuns(like(everywhere, (2,), jnp.int32), like(everywhere, (3,), jnp.int32))

    def run(masks, q, k, v, dout, lse, delta):
        partial = triton.forward(spec, q, k, v, *masks)
        return *partial, *triton.backward(spec, q, k, v, *masks, dout, lse, delta)

    sharded = jax.shard_map(
        run, mesh=mesh, in_specs=(everywhere, *[rows] * 6), out_specs=rows, check_vma=False
    )
    traced = jax.jit(sharded).trace((Intervals(bound, bound), runs), q, keys, v, dout, lse, lse)
    lowered = traced.lower(lowering_platforms=("cuda",))
    lowered.compile(compiler_options={"xla_dump_to": str(folder)})
    return {name: _read(target, name, folder) for name in KERNELS}


def _read(target: Target, name: str, folder) -> Compiled:
    [path] = [p for p in folder.glob("*.ptx") if f".entry {name}(" in p.read_text()]
    command = [_ptxas(), "-v", f"-arch={target.arch}", str(path), "-o", str(folder / "out.cubin")]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    [thunks] = folder.glob("*.thunk_sequence.txt")
    shared = re.search(rf"{name} grid.*shared_memory: (\d+) bytes", thunks.read_text())
    stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report).groups()
    return Compiled(
        ptx=path.read_text(),
        registers=int(re.search(r"Used (\d+) registers", report).group(1)),
        spilled=int(stores) + int(loads),
        shared_memory=int(shared.group(1)),
    )


needs_compiler = pytest.mark.skipif(
    not any(importlib.util.find_spec(f"jax_plugins.xla_cuda{v}") for v in (12, 13)),
    reason="jax's CUDA plugin is not installed (pip install hcp_jax[aot])",
)
needs_ptxas = pytest.mark.skipif(_ptxas() is None, reason="no ptxas (pip install nvidia-cuda-nvcc)")
slow = functools.partial(pytest.param, marks=pytest.mark.slow)

CALLS = [
    pytest.param("H200", (128, 128), "bfloat16", None),
    slow("H100", (128, 128), "bfloat16", None),
    *(
        slow(target, sizes, "bfloat16", None)
        for target in ("A100", "H200", "B200")
        for sizes in ((64, 64), (128, 128), (192, 128), (256, 256))
        if (target, sizes) != ("H200", (128, 128))
    ),
    slow("H200", (128, 128), "float16", 30.0),
    slow("A100", (128, 128), "float32", None),
    slow("H200", (256, 256), "float32", None),
    slow("B200", (64, 64), "float32", None),
]


@needs_compiler
@needs_ptxas
@pytest.mark.parametrize(("name", "sizes", "dtype", "cap"), CALLS)
def test_no_kernel_spills_registers_and_all_fit_the_shared_memory(
    name, sizes, dtype, cap, tmp_path
):
    target = TARGETS[name]
    kernels = _compile(target, sizes, dtype, cap, tmp_path)
    for kernel, compiled in kernels.items():
        assert compiled.spilled == 0, (kernel, compiled.registers)
        assert compiled.shared_memory <= target.shared_memory, kernel
        if dtype == "float32":
            assert "tf32" not in compiled.ptx, kernel
        else:
            assert TENSOR_CORES[target.arch] in compiled.ptx, kernel
        if tiles_for("NVIDIA L4", dtype, *sizes) == tiles_for(target.name, dtype, *sizes):
            assert compiled.shared_memory <= LEAST_SHARED_MEMORY, kernel


def test_h100_and_h200_are_one_to_the_compiler():
    """So what is compiled above for one of them holds for the other."""
    assert TARGETS["H100"].arch == TARGETS["H200"].arch
    assert TARGETS["H100"].shared_memory == TARGETS["H200"].shared_memory
    for sizes in ((64, 64), (128, 128), (192, 128), (256, 256)):
        for dtype in ("bfloat16", "float32"):
            one, other = (tiles_for(TARGETS[name].name, dtype, *sizes) for name in ("H100", "H200"))
            assert one is other
