"""The gradients of the Mosaic kernels compiled to machine code for a GPU that is not here.

Mosaic refuses a kernel that asks for more shared memory than the target has; ptxas tells whether
registers spill, or are so few that matrix products wait for each other.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hcp_jax.kernels import core, mosaic_backward
from hcp_jax.kernels.tiles import Tile, Tiles, trial
from hcp_jax.layout import KeyRuns
from hcp_jax.mask import Intervals
from hcp_jax.plan import aot, hardware


def _said(capfd, monkeypatch, h: int, dtype: str = "bfloat16", cap: float | None = None) -> str:
    """What is told of compiling for two H200s."""
    try:
        devices = aot.devices(hardware.Cluster(hardware.gpu("h200"), hosts=1, gpus_per_host=2))
    except NotImplementedError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    mesh = Mesh(np.asarray(devices), ("dp",))
    rows, everywhere = PartitionSpec("dp"), PartitionSpec()

    def like(spec, shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    t, s, n, k = 1000, 1000, 4, 2
    spec = core.CoreSpec("mosaic", h**-0.5, cap, devices[0].device_kind, False)
    bound, ints = like(everywhere, (1, t), jnp.int32), jnp.int32
    masks = (
        Intervals(bound, bound),
        KeyRuns(like(everywhere, (2,), ints), like(everywhere, (3,), ints)),
    )
    queries, keys = like(rows, (2, t, n, h)), like(rows, (2, s, k, h))
    stats = [like(rows, (2, t, n), jnp.float32)] * 2
    run = jax.shard_map(
        functools.partial(mosaic_backward.backward, spec),
        mesh=mesh,
        in_specs=(rows, rows, rows, everywhere, everywhere, rows, rows, rows),
        out_specs=rows,
        check_vma=False,
    )
    capfd.readouterr()
    aot.compile_for(run, queries, keys, keys, *masks, queries, *stats)
    captured = capfd.readouterr()
    return captured.out + captured.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("h", "dtype", "cap"),
    [
        (64, "bfloat16", None),
        (128, "bfloat16", None),
        (256, "bfloat16", None),
        (128, "float16", 30.0),
        (256, "bfloat16", 30.0),
    ],
)
def test_no_register_is_spilled_and_no_product_waits_for_want_of_them(
    h, dtype, cap, capfd, monkeypatch
):
    said = _said(capfd, monkeypatch, h, dtype, cap)
    kernels = ("dq", "dk", "dv") if h == 256 else ("dq", "dk_dv")
    for kernel in kernels:
        assert f".entry attention_{kernel}_mosaic_gpu_kernel(" in said
    assert said.count("0 bytes spill stores, 0 bytes spill loads") == len(kernels)
    assert "wgmma.mma_async" in said
    assert "serialized" not in said


@pytest.mark.slow
def test_a_tile_that_spills_is_noticed(capfd, monkeypatch):
    """Or the test above could not fail."""
    tile = Tile(128, 128, 8, 1)
    with trial(Tiles(tile, tile, tile)):
        said = _said(capfd, monkeypatch, 128)
    assert said.count("0 bytes spill stores, 0 bytes spill loads") < 2
    assert "serialized" in said
