"""The Mosaic kernels compiled to machine code for a Hopper GPU that is not here.

Mosaic refuses a kernel that asks for more shared memory than there is; told to, it dumps what ptxas
says of registers, and the assembly, which tells whether the tensor cores are in use.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hcp_jax.kernels import core, tiles
from hcp_jax.layout import KeyRuns
from hcp_jax.mask import Intervals
from hcp_jax.plan import aot, hardware


def _compile(h: int, dtype: str, cap: float | None, n: int = 8, k: int = 2) -> None:
    """Forward and backward, in a program for two H200s."""
    try:
        devices = aot.devices(hardware.Cluster(hardware.gpu("h200"), hosts=1, gpus_per_host=2))
    except NotImplementedError as error:
        pytest.skip(str(error))
    mesh = Mesh(np.asarray(devices), ("dp",))
    rows, everywhere = PartitionSpec("dp"), PartitionSpec()

    def like(spec, shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    t = s = 1024
    spec = core.CoreSpec("mosaic", h**-0.5, cap, devices[0].device_kind, False)
    of_q, of_k, stats = like(rows, (2, t, n, h)), like(rows, (2, s, k, h)), (2, t, n)
    arrays = [of_q, of_k, of_k, of_q, *[like(rows, stats, jnp.float32)] * 2]
    bound, ints = like(everywhere, (1, t), jnp.int32), jnp.int32
    masks = (
        Intervals(bound, bound),
        KeyRuns(like(everywhere, (2,), ints), like(everywhere, (3,), ints)),
    )

    def run(masks, q, k, v, dout, lse, delta):
        partial = core.attend(spec, q, k, v, *masks)
        return *partial, *core.attend_grads(spec, q, k, v, *masks, dout, lse, delta)

    sharded = jax.shard_map(
        run, mesh=mesh, in_specs=(everywhere, *[rows] * 6), out_specs=rows, check_vma=False
    )
    aot.compile_for(sharded, masks, *arrays)


def _dump(monkeypatch, capfd, *args) -> str:
    """What is told of compiling."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    _compile(*args)
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
    with tiles.trial(tiles.Tiles(tile, tile, tile)):
        dumped = _dump(monkeypatch, capfd, 128, "bfloat16", None)
    assert any(_kernels(dumped).values())
    assert "serialized" in dumped


def test_a_tile_that_does_not_fit_is_noticed():
    """Or that all tiles fit the shared memory would say nothing."""
    own = tiles.mosaic_tiles_for("H200", 128)
    too_deep = dataclasses.replace(own, forward=dataclasses.replace(own.forward, stages=4))
    with tiles.trial(too_deep), pytest.raises(ValueError, match="shared memory"):
        _compile(128, "bfloat16", None)
