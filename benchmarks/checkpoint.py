"""Time checkpoints beside plain Orbax: how long a save blocks, how long a restore takes.

    JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8 python benchmarks/checkpoint.py [--mb 434] [--repeats 5]

Both write and read the same float32 arrays, cut over all devices, in turn. Ratios are those of the
medians; the first repeat is left out, since it compiles. A busy machine or disk shows in all
columns, so compare within one run only.
"""

import argparse
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hcp_jax.train.checkpoint import checksums
from hcp_jax.train.checkpoint.manager import Checkpoints

NUM_ARRAYS = 12


def main() -> None:
    """Print the medians in seconds, and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--mb", type=int, default=434, help="size of the state")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    state = random_state(args.mb)
    size = sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6
    print(f"{size:.0f} MB on {jax.device_count()} {jax.devices()[0].platform} devices")
    runs = []
    for _ in range(args.repeats + 1):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(measure(pathlib.Path(folder), state))
    median = {name: float(np.median([run[name] for run in runs[1:]])) for name in runs[0]}
    for name, seconds in median.items():
        print(f"{name:28} {seconds:7.3f} s")
    for what in ("save blocks", "save", "restore"):
        print(f"{what}, over Orbax's: {median[f'{what}, hcp'] / median[f'{what}, Orbax']:.2f}")


def random_state(mb: int) -> dict[str, jax.Array]:
    """Return float32 arrays of `mb` megabytes in all, cut over all devices."""
    mesh = jax.make_mesh((jax.device_count(),), ("devices",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("devices"))
    rows = max(mb * 10**6 // (4 * 1024 * NUM_ARRAYS * mesh.size), 1) * mesh.size
    rng = np.random.default_rng(0)
    arrays = (rng.standard_normal((rows, 1024), np.float32) for _ in range(NUM_ARRAYS))
    return {f"array{i}": jax.device_put(x, sharding) for i, x in enumerate(arrays)}


def measure(folder: pathlib.Path, state: Any) -> dict[str, float]:
    """Return seconds by what was done."""
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    orbax, ours = ocp.CheckpointManager(folder / "orbax"), Checkpoints(folder / "hcp", {})
    saved, restored = ocp.args.StandardSave(state), ocp.args.StandardRestore(like)
    found = {
        "checksums": seconds(lambda: checksums.sum_arrays(state)),
        "save blocks, Orbax": seconds(lambda: orbax.save(1, args=saved)),
        "save, Orbax": seconds(orbax.wait_until_finished),
        "save blocks, hcp": seconds(lambda: ours.save(1, state, {})),
        "save, hcp": seconds(ours.wait),
        "restore, Orbax": seconds(lambda: orbax.restore(1, args=restored)),
        "restore, hcp": seconds(lambda: ours.restore(like).state),
    }
    for whose in ("Orbax", "hcp"):
        found[f"save, {whose}"] += found[f"save blocks, {whose}"]
    orbax.close()
    ours.close()
    return found


def seconds(run: Callable[[], Any]) -> float:
    """Return how long a call takes, with the arrays that it returns."""
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
