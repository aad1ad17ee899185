"""The Mosaic kernels compiled to machine code for a Hopper GPU that is not here.

Mosaic refuses a kernel that asks for more shared memory than there is; told to, it dumps what ptxas
says of registers, and the assembly, which tells whether the tensor cores are in use.
"""

import dataclasses
import re

import pytest

from hcp_jax.kernels import tiles
from tests.kernels.compiled import compile_attention


def _dump(monkeypatch, capfd, h: int, dtype: str, cap: float | None, own=None) -> str:
    """What is told of compiling."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    compile_attention("mosaic", "h200", (h, h), dtype, cap, tiles=own)
    return "".join(capfd.readouterr())


def _kernels(dumped: str) -> dict[str, int]:
    """Bytes of registers spilled, by kernel."""
    found = re.findall(
        r"Compiling entry function '(attention_\w+?)_mosaic_gpu_kernel'.*?(\d+) bytes spill stores",
        dumped,
        re.DOTALL,
    )
    return {name: int(spilled) for name, spilled in found}


def _slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("h", "dtype", "cap"),
    [
        (128, "bfloat16", None),
        _slow(64, "bfloat16", None),
        _slow(256, "bfloat16", None),
        _slow(128, "float16", 30.0),
        _slow(64, "float16", 30.0),
        _slow(256, "float16", 30.0),
    ],
)
def test_no_kernel_spills_and_all_use_wgmma_and_tma(h, dtype, cap, monkeypatch, capfd):
    dumped = _dump(monkeypatch, capfd, h, dtype, cap)
    split = {"attention_dq", "attention_dk", "attention_dv"}
    gradients = split if h == 256 else {"attention_dq", "attention_dk_dv"}
    spilled = _kernels(dumped)
    assert set(spilled) == {"attention_forward"} | gradients
    assert not any(spilled.values()), spilled
    assert "serialized" not in dumped  # products that wait for each other for want of registers
    for assembly in dumped.split(".visible .entry")[1:]:
        assert "wgmma.mma_async" in assembly
        assert "cp.async.bulk.tensor" in assembly


@pytest.mark.slow
def test_a_tile_that_spills_is_noticed(monkeypatch, capfd):
    """Or the test above could not fail."""
    tile = tiles.Tile(128, 128, 8, 1)
    dumped = _dump(monkeypatch, capfd, 128, "bfloat16", None, tiles.Tiles(tile, tile, tile))
    assert any(_kernels(dumped).values())
    assert "serialized" in dumped


def test_a_tile_that_does_not_fit_is_noticed():
    """Or that all tiles fit the shared memory would say nothing."""
    own = tiles.mosaic_tiles_for("H200", 128)
    too_deep = dataclasses.replace(own, forward=dataclasses.replace(own.forward, stages=4))
    with pytest.raises(ValueError, match="shared memory"):
        compile_attention("mosaic", "h200", (128, 128), "bfloat16", tiles=too_deep)
