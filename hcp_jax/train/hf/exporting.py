"""Write a run's weights as a Hugging Face folder that other programs read (`hcp export`).

The weights come from the run's newest checkpoint, one parameter (of all layers) at a time. If the
run has no checkpoint yet, they come from the folder that it starts from (`init_from`).
"""

import argparse
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from hcp_jax.base import terminal
from hcp_jax.models.hf import config_json, loading, writing
from hcp_jax.models.hf.slots import Slot
from hcp_jax.train import config as configuration
from hcp_jax.train.checkpoint import checksums, sealed, writers
from hcp_jax.train.config import TrainConfig
from hcp_jax.train.hf import weights


def run(args: argparse.Namespace) -> int:
    """Run `hcp export`."""
    if not (args.run / "config.yaml").is_file():
        raise ValueError(f"{args.run} is no run folder: it has no config.yaml.")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ValueError(f"{args.out} exists and is not empty; give another folder.")
    if args.shard_gb <= 0:
        raise ValueError(f"--shard-gb must be positive, got {args.shard_gb}.")
    config = configuration.load(args.run / "config.yaml")
    origin = _origin(args.run, config)
    like = None if origin is None else config_json.read_raw(origin)
    step = next(iter(sealed.steps(args.run)), None)
    with writers.quiet_orbax():
        read_values, source = _source(args.run, config, step)
    dtype = args.dtype or _dtype(like)
    trained = config.seq_len if step else 0
    raw = config_json.raw_config(config.model, trained, dtype, like)
    args.out.mkdir(parents=True, exist_ok=True)
    shard_bytes = round(args.shard_gb * 1e9)
    with writers.quiet_orbax():
        files = writing.write_folder(args.out, config.model, raw, read_values, shard_bytes)
    copied = _copy_tokenizer(origin, config, args.out)
    rounded = ", rounded from float32" if step and dtype != "float32" else ""
    terminal.say(
        f"{args.out}: {source} as {raw['model_type']}, {files} file{'s' if files > 1 else ''} of "
        f"{dtype}{rounded}; {', '.join(['config.json', *copied])}"
    )
    return 0


def _origin(run_folder: pathlib.Path, config: TrainConfig) -> pathlib.Path | None:
    """Return the folder with the config.json of the first weights; None if they were random."""
    kept = run_folder / weights.KEPT
    if kept.is_dir():
        return kept
    return None if config.init_from is None else pathlib.Path(config.init_from)


def _dtype(like: dict[str, Any] | None) -> str:
    """Return the dtype of the imported weights; float32, as in training, if there were none."""
    named = (like or {}).get("torch_dtype") or (like or {}).get("dtype")
    return named if isinstance(named, str) and named in writing.NUMPY_DTYPES else "float32"


def _source(
    run_folder: pathlib.Path, config: TrainConfig, step: int | None
) -> tuple[Callable[[Slot], np.ndarray], str]:
    """Return a function that reads the values of a slot, and a phrase that says from where."""
    if step is not None:
        folder = (run_folder / "checkpoints" / str(step)).absolute()
        return _CheckpointReader(folder), f"the weights of step {step}"
    if config.init_from is None:
        raise ValueError(f"{run_folder} has no checkpoint and no init_from: nothing to export.")
    folder = pathlib.Path(config.init_from)
    stored = loading.check(config.model, folder)
    return lambda slot: loading.read_slot(slot, stored[slot.name]), f"the weights of {folder}"


class _CheckpointReader:
    """Reads the values of a slot from a checkpoint.

    The parameter that was read last is kept, since slots come parameter by parameter.

    Raises:
        ValueError: if the checkpoint, or a parameter in it, is damaged.
    """

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        try:
            self._arrays = sealed.read(epath.Path(folder))[0]["arrays"]
        except Exception as error:  # A damaged file can raise anything.
            raise self._damage(error) from error
        self._path: tuple[str, ...] = ()
        self._values = np.zeros(())

    def __call__(self, slot: Slot) -> np.ndarray:
        if slot.path != self._path:
            self._values = np.zeros(())  # Free the memory of the one before first.
            self._values, self._path = self._restore(slot.path), slot.path
        return self._values[slot.at]

    def _restore(self, path: tuple[str, ...]) -> np.ndarray:
        name = ".".join(("params", *path))
        try:
            values = _restore(self._folder / "state", path)
            found = checksums.sum_arrays({name: jnp.asarray(values)})[name]
        except Exception as error:
            raise self._damage(error) from error
        if found != self._arrays[name][2]:
            raise self._damage(f"the bits of {name} are not those that were saved")
        return values

    def _damage(self, why: object) -> ValueError:
        return ValueError(
            f"the checkpoint {self._folder} is damaged ({why}); hcp train --resume moves it away "
            "and resumes from the one before. To export that one, move this one away."
        )


def _restore(state: pathlib.Path, path: tuple[str, ...]) -> np.ndarray:
    """Return one array of a saved state, on the host."""
    keys = ("params", *path)

    def nested(leaf: Any) -> Any:
        return functools.reduce(lambda tree, key: {key: tree}, reversed(keys), leaf)

    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(
            state,
            args=ocp.args.PyTreeRestore(
                item=nested(0),
                restore_args=nested(ocp.RestoreArgs(restore_type=np.ndarray)),
                partial_restore=True,
            ),
        )
    return functools.reduce(lambda tree, key: tree[key], keys, restored)


def _copy_tokenizer(
    origin: pathlib.Path | None, config: TrainConfig, out: pathlib.Path
) -> list[str]:
    """Copy the tokenizer's files, from the origin or else from training's; return their names."""
    copied = [] if origin is None else weights.copy_tokenizer(origin, out)
    if not copied and config.data.tokenizer is not None:
        copied = weights.copy_tokenizer(pathlib.Path(config.data.tokenizer).parent, out)
    return copied
