"""Attention compiled to machine code for two GPUs that are not here, by the kernels of one name."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hcp_jax.compiled import aot
from hcp_jax.kernels import core
from hcp_jax.kernels.tiles import Tiles
from hcp_jax.sequence.layout import KeyRuns
from hcp_jax.sequence.mask import Intervals
from tests.kernels import absent


def compile_attention(
    implementation: str,
    gpu: str,
    sizes: tuple[int, int],
    dtype: str,
    cap: float | None = None,
    flags: dict | None = None,
    tiles: Tiles | None = None,
) -> None:
    """Forward and gradients of 1024 tokens, 8 query heads and 2 kv heads, of `sizes` H and Hv.

    Skips the test where the compiler for GPUs is not installed.
    """
    devices = absent.devices(gpu, hosts=1, gpus_per_host=2)
    mesh = Mesh(np.asarray(devices), ("dp",))
    rows, everywhere = PartitionSpec("dp"), PartitionSpec()

    def like(spec, shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    (h, hv), t, s, n, k = sizes, 1024, 1024, 8, 2
    spec = core.CoreSpec(implementation, h**-0.5, cap, devices[0].device_kind, False, tiles)
    arrays = [like(rows, (2, t, n, h)), like(rows, (2, s, k, h)), like(rows, (2, s, k, hv))]
    arrays += [like(rows, (2, t, n, hv)), *[like(rows, (2, t, n), jnp.float32)] * 2]
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
    aot.compile_for(sharded, masks, *arrays, flags=flags)
