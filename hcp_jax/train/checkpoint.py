"""Checkpoints: the state of training, where the data stood, and of which run it is; by Orbax.

One checkpoint holds three items: `state` (parameters, optimizer state and step, every array with
its own bits, whatever mesh it lies on), `data` (the state of the data pipeline) and `about`: the
model's config, which is read first, so that the checkpoint of another model is told by the names of
what differs; the whole config, seed included; and a checksum of every array, which does not depend
on how it is cut, so that a bit that changed on its way through the file system is noticed on any
mesh.

A checkpoint is written while training goes on, and has its name only once it is whole. What is
found damaged all the same is told, put aside, and the one before it is used. It can be restored
onto another mesh, with another comm type, or by another number of processes.
"""

import contextlib
import dataclasses
import logging
import pathlib
import re
import shutil
from collections.abc import Callable
from typing import Any, Generic, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

StateT = TypeVar("StateT")

_log = logging.getLogger("hcp_jax")

# Orbax warns that what is only to be read is only read.
logging.getLogger("absl").addFilter(lambda record: not re.search("read.only", str(record.msg)))

_MOST = 256  # checkpoints of a run that are looked at


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save.

    Attributes:
        every: steps between two checkpoints; None: only one at the end (and on Ctrl-C or SIGTERM).
        keep: how many of the newest are kept.
        keep_every: those of steps that are a multiple of this are kept for good, too.
        on_error: what to do if one cannot be written (the disk is full): "stop", or "continue" and
            try again when the next one is due. Those that are there stay.
    """

    every: int | None = None
    keep: int = 2
    keep_every: int | None = None
    on_error: Literal["stop", "continue"] = "stop"

    def __post_init__(self):
        for name in ("every", "keep", "keep_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"checkpoint.{name} must be at least 1, got {value}.")
        if self.on_error not in ("stop", "continue"):
            raise ValueError(
                f"checkpoint.on_error must be 'stop' or 'continue', got {self.on_error!r}."
            )

    def is_due(self, done: int) -> bool:
        """Whether to save after so many steps, apart from the end of a run."""
        return self.every is not None and done % self.every == 0


@dataclasses.dataclass(frozen=True)
class Restored(Generic[StateT]):
    """What a checkpoint held: the state, placed as it was asked for, and where the data stood."""

    state: StateT
    data: dict[str, Any]


class MismatchError(ValueError):
    """A checkpoint is whole, but of something else."""


class Checkpoints:
    """The checkpoints of one run, in the folder `checkpoints` of its run folder.

    Args:
        folder: the run folder.
        model: the model's config as a dict of plain values, to know the model again by.
        config: when to save, and how many to keep.
        run: the whole run's config, to be kept with each checkpoint.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        model: dict[str, Any],
        config: CheckpointConfig | None = None,
        run: dict[str, Any] | None = None,
    ):
        config = config or CheckpointConfig()
        self._model, self._run = _plain(model), _plain(run)
        self._goes_on = config.on_error == "continue"
        self._folder = folder.absolute() / "checkpoints"
        self._options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep, keep_period=config.keep_every
        )
        self._saving: int | None = None
        self._orbax = self._open()

    def latest(self) -> int | None:
        """The step of the newest whole checkpoint; None if there is none."""
        return self._orbax.latest_step()

    def save(self, step: int, state: Any, data: dict[str, Any]) -> None:
        """Begins to write a checkpoint, unless this step has one; arrays are copied before return.

        Args:
            step: steps done.
            state: a pytree of arrays.
            data: the state of the data pipeline, of plain values.

        Raises:
            OSError: if this one or the one before cannot be written and training is to stop then.
        """
        self.wait()
        if self.latest() == step:
            return
        about = {"model": self._model, "config": self._run, "checksums": _checksums(state)}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(_plain(data)),
            about=ocp.args.JsonSave(about),
        )
        self._saving = step
        self._try(lambda: self._orbax.save(step, args=items))

    def restore(self, like: StateT) -> Restored[StateT]:
        """The newest checkpoint that is whole; those after it are put aside.

        Args:
            like: a state, or its `jax.ShapeDtypeStruct`s with shardings: where to put the arrays.

        Raises:
            ValueError: if there is no checkpoint here that is whole, or it is one of another model
                or of another optimizer; says what differs.
        """
        abstract = jax.tree.map(_abstract, like)
        damaged: list[int] = []
        why = ""
        for step in _of_first(sorted(self._orbax.all_steps(), reverse=True)):
            restored, error = None, None
            try:
                restored = self._read(step, abstract)
            except MismatchError:
                raise
            except Exception as caught:  # Whatever a reader makes of a file that is not whole.
                error = caught
            if _everywhere(error is None):
                assert restored is not None
                self._put_aside(damaged)
                return restored
            damaged.append(step)
            why = " ".join(str(error or "another process cannot read it").split())[:600]
            _log.warning(
                f"the checkpoint of step {step} in {self._folder} is damaged ({why}); looking at "
                "the one before it."
            )
        if damaged:
            raise ValueError(
                f"none of the checkpoints in {self._folder} can be read (steps "
                f"{', '.join(map(str, damaged))}; the last one: {why})."
            )
        raise ValueError(f"{self._folder} has no checkpoint to go on from.")

    def wait(self) -> None:
        """Waits until what is being written is on disk.

        Raises:
            OSError: as `save`.
        """
        self._try(self._orbax.wait_until_finished)

    def close(self) -> None:
        """Waits, and ends what runs in the background.

        Raises:
            OSError: as `save`.
        """
        try:
            self.wait()
        finally:
            self._orbax.close()

    def _try(self, write: Callable[[], Any]) -> None:
        """Writes; if that cannot be, it is told, and what has been written of it is removed."""
        error = None
        try:
            write()
        except Exception as caught:  # tensorstore's errors of the disk are ValueErrors.
            error = caught
        if _everywhere(error is None):
            return
        why = " ".join(str(error or "another process could not").split())[:600]
        # Orbax would raise the error again at the next save.
        with contextlib.suppress(Exception):
            self._orbax.close()
        self._orbax = self._open()
        what = (
            f"the checkpoint of step {self._saving} could not be written to {self._folder}: {why}; "
            f"the last whole one is of step {self.latest()}"
        )
        if not self._goes_on:
            raise OSError(f"{what} (checkpoint.on_error: stop).") from error
        _log.warning(f"{what}. Training goes on (checkpoint.on_error: continue).")

    def _open(self) -> ocp.CheckpointManager:
        if jax.process_index() == 0:
            _remove_unfinished(self._folder)
        return ocp.CheckpointManager(self._folder, options=self._options, item_handlers=_handlers())

    def _read(self, step: int, abstract: Any) -> Restored:
        """One checkpoint, by this process alone: no other one waits for it, should this fail."""
        place = f"the checkpoint of step {step} in {self._folder}"
        me = jax.process_index()
        options = ocp.CheckpointManagerOptions(
            create=False,
            read_only=True,
            enable_async_checkpointing=False,
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process{me}"
            ),
        )
        alone = jax.process_count() == 1
        with ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(read_only=True) if alone else options,
            item_handlers=_handlers(),
        ) as reader:
            about = reader.restore(
                step, args=ocp.args.Composite(about=ocp.args.JsonRestore())
            ).about
            self._require_same_model(about["model"], place)
            _require_same_arrays(reader.item_metadata(step).state.tree, place, abstract)
            items = ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
            )
            restored = reader.restore(step, args=items)
        found = _checksums(restored.state)
        changed = [name for name, of in about["checksums"].items() if found.get(name) != of]
        if changed:
            raise ValueError(f"the bits of {changed[0]} are not those that were saved")
        return Restored(restored.state, restored.data)

    def _put_aside(self, damaged: list[int]) -> None:
        """Out of the way of the checkpoints that training will make of these steps again."""
        if not damaged:
            return
        if jax.process_index() == 0:
            aside = self._folder.with_name("checkpoints-damaged")
            aside.mkdir(exist_ok=True)
            for step in damaged:
                shutil.rmtree(aside / str(step), ignore_errors=True)
                (self._folder / str(step)).rename(aside / str(step))
            _log.warning(f"what is damaged is in {aside} now.")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints put aside")
        self._orbax.reload()

    def _require_same_model(self, theirs: dict[str, Any], place: str) -> None:
        differ = [
            f"{key} {theirs.get(key)!r} there and {self._model.get(key)!r} here"
            for key in sorted(theirs.keys() | self._model.keys())
            if theirs.get(key) != self._model.get(key)
        ]
        if differ:
            raise MismatchError(
                f"{place} is of another model: {'; '.join(differ)}. Resume with the run's own "
                "config, or begin a new run."
            )


def _handlers() -> dict[str, Any]:
    return {
        "state": ocp.StandardCheckpointHandler(),
        "data": ocp.JsonCheckpointHandler(),
        "about": ocp.JsonCheckpointHandler(),
    }


def _remove_unfinished(folder: pathlib.Path) -> None:
    """What a process that died, or a full disk, left half-written."""
    for path in folder.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(path, ignore_errors=True)


def _of_first(steps: list[int]) -> list[int]:
    """What the first process sees: a shared file system may be late elsewhere."""
    if jax.process_count() == 1:
        return steps
    padded = np.full(_MOST, -1, np.int32)
    padded[: len(steps[:_MOST])] = steps[:_MOST]
    return [int(s) for s in multihost_utils.broadcast_one_to_all(padded) if s >= 0]


def _everywhere(well: bool) -> bool:
    """Whether all is well in every process."""
    if jax.process_count() == 1:
        return well
    return bool(np.all(multihost_utils.process_allgather(np.int32(well))))


def _require_same_arrays(theirs_tree: Any, place: str, abstract: Any) -> None:
    """Orbax would find this out too, but half-way, and with pages of output."""
    theirs, ours = (
        {
            tuple(_name(k) for k in path): (tuple(x.shape), str(x.dtype))
            for path, x in jax.tree.leaves_with_path(tree)
        }
        for tree in (theirs_tree, abstract)
    )
    for key in [*ours, *theirs]:
        if theirs.get(key) != ours.get(key):
            raise MismatchError(
                f"{place} does not fit: {'.'.join(key)} is {theirs.get(key, 'missing')} there "
                f"and {ours.get(key, 'missing')} here. Was the optimizer another one?"
            )


def _checksums(state: Any) -> dict[str, int]:
    """Of each array, the sum of its bits taken as unsigned integers, modulo 2³².

    The order of an integer sum does not matter: it is the same on every mesh.
    """
    leaves = jax.tree.leaves_with_path(state)
    names = [".".join(_name(key) for key in path) for path, _ in leaves]
    # One program can only have the arrays of the same devices.
    together: dict[Any, list[int]] = {}
    for i, (_, x) in enumerate(leaves):
        on_host = x.sharding.memory_kind == "pinned_host"
        key = "host" if on_host else frozenset(x.sharding.device_set)
        together.setdefault(key, []).append(i)
    sums: dict[str, int] = {}
    for key, indices in together.items():
        arrays = [leaves[i][1] for i in indices]
        found = _sums_on_host(arrays) if key == "host" else jax.device_get(_sums_of_bits(arrays))
        sums |= {names[i]: int(total) for i, total in zip(indices, found, strict=True)}
    return sums


@jax.jit
def _sums_of_bits(arrays: list[jax.Array]) -> list[jax.Array]:
    return [_sum_of_bits(x) for x in arrays]


def _sum_of_bits(x: jax.Array) -> jax.Array:
    if jnp.issubdtype(x.dtype, jnp.floating):
        x = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    return jnp.sum(x.astype(jnp.uint32), dtype=jnp.uint32)


def _sums_on_host(arrays: list[jax.Array]) -> list[int]:
    """The same of arrays in the host's memory, of which the devices may not have room for all."""
    of_shards = [
        [
            np.sum(np.asarray(shard.data).view(f"uint{8 * x.dtype.itemsize}"), dtype=np.uint32)
            for shard in x.addressable_shards
            if shard.replica_id == 0
        ]
        for x in arrays
    ]
    # An array's sum wraps around; that of two scalars would warn of it.
    sums = np.array([np.sum(np.array(x, np.uint32), dtype=np.uint32) for x in of_shards])
    if jax.process_count() > 1:
        of_all = np.asarray(multihost_utils.process_allgather(sums))
        return of_all.sum(axis=0, dtype=np.uint32).tolist()
    return sums.tolist()


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _name(key: Any) -> str:
    """The plain name of a path's part, whichever kind of container it goes into."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    raise TypeError(f"unknown kind of path {key!r}")


def _plain(value: Any) -> Any:
    """As JSON gives it back: tuples as lists."""
    if isinstance(value, dict):
        return {str(key): _plain(of_key) for key, of_key in value.items()}
    return list(map(_plain, value)) if isinstance(value, list | tuple) else value
