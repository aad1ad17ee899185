"""The Triton kernels compiled to machine code for GPUs that are not here.

XLA refuses a kernel that asks for more shared memory than the target has, and, told to, one whose
registers spill; the assembly that it dumps tells which units multiply matrices.
"""

import pathlib
import re
import tempfile

import jax
import pytest

from hcp_jax import hardware
from hcp_jax.kernels.tiles import Tile, Tiles, describe, tiles_for
from tests.kernels.compiled import compile_attention

KERNELS = ("attention_forward", "attention_dq", "attention_dkv")
TENSOR_CORES = {"a100": "mma.sync", "h100": "wgmma", "h200": "wgmma", "b200": "tcgen05.mma"}
LEAST_SHARED_MEMORY = 101_376  # per block, of any GPU since Ampere
SIZES = ((64, 64), (128, 128), (192, 128), (256, 256))


def _compile(name: str, sizes: tuple[int, int], dtype: str, cap: float | None = None, tiles=None):
    """(assembly, bytes of shared memory) of each kernel, in a program for two GPUs."""
    with tempfile.TemporaryDirectory() as folder:
        flags = {
            "xla_backend_optimization_level": 3,
            "xla_gpu_fail_ptx_compilation_on_register_spilling": True,
            "xla_dump_to": folder,
        }
        if jax.__version_info__ >= (0, 11):  # before, the assembly is dumped unasked
            flags["xla_dump_emitter_re"] = ".*"
        compile_attention("triton", name, sizes, dtype, cap, flags, tiles)
        return {name: _dumped(name, pathlib.Path(folder)) for name in KERNELS}


def _dumped(kernel: str, folder: pathlib.Path) -> tuple[str, int]:
    texts = (path.read_text() for path in folder.glob("*.ptx"))
    [assembly] = (text for text in texts if f".entry {kernel}(" in text)
    [thunks] = folder.glob("*.thunk_sequence.txt")
    found = re.search(rf"{kernel} grid.*shared_memory: (\d+) bytes", thunks.read_text())
    return assembly, int(found.group(1))


def _slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "sizes", "dtype", "cap"),
    [
        _slow("h200", (128, 128), "bfloat16", None),
        _slow("h100", (128, 128), "bfloat16", None),
        *(_slow("h200", sizes, "bfloat16", None) for sizes in SIZES if sizes != (128, 128)),
        *(_slow(name, sizes, "bfloat16", None) for name in ("a100", "b200") for sizes in SIZES),
        _slow("h200", (128, 128), "float16", 30.0),
        _slow("a100", (128, 128), "float32", None),
        _slow("h200", (256, 256), "float32", None),
        _slow("b200", (64, 64), "float32", None),
    ],
)
def test_no_kernel_spills_registers_and_all_fit_the_shared_memory(name, sizes, dtype, cap):
    tiles = tiles_for(name.upper(), dtype, *sizes)
    fits_any = tiles == tiles_for("a GPU that nobody knows", dtype, *sizes)
    for kernel, (assembly, shared_memory) in _compile(name, sizes, dtype, cap).items():
        if dtype == "float32":
            assert "tf32" not in assembly, kernel
        else:
            assert TENSOR_CORES[name] in assembly, kernel
        if fits_any:
            assert shared_memory <= LEAST_SHARED_MEMORY, kernel


@pytest.mark.slow
def test_a_tile_that_spills_is_noticed():
    """Or the test above could not fail."""
    tile = Tile(128, 64, 4, 2)
    with pytest.raises(jax.errors.JaxRuntimeError, match="register spilling"):
        _compile("h200", (128, 128), "bfloat16", tiles=Tiles(tile, tile, tile))


def test_h100_and_h200_are_one_to_the_compiler():
    """So what is compiled above for one of them holds for the other."""
    one, other = hardware.gpu("h100"), hardware.gpu("h200")
    assert one.compute_capability == other.compute_capability
    for sizes in SIZES:
        assert tiles_for("H100", "bfloat16", *sizes) is tiles_for("H200", "bfloat16", *sizes)


def test_every_gpu_of_the_planner_has_tiles_of_its_own():
    for name in TENSOR_CORES:
        assert describe(hardware.gpu(name).device_kind) == f"tiles for {name.upper()}"
