"""Checkpoints: the state of training, where the data stood, and which model it is; by Orbax.

One checkpoint holds three items: `state` (parameters, optimizer state and step, every array with
its own bits, whatever mesh it lies on), `data` (the state of the data pipeline) and `model` (its
config as a dict). The last one is read first when a run goes on, so that the checkpoint of another
model is told by the names of what differs, not by the shapes of arrays.

A checkpoint is written while training goes on; it counts once it is whole. It can be restored onto
another mesh, with another comm type, or by another number of processes.
"""

import dataclasses
import pathlib
from typing import Any, Generic, TypeVar

import jax
import orbax.checkpoint as ocp

StateT = TypeVar("StateT")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save.

    Attributes:
        every: steps between two checkpoints; None: only one at the end (and on Ctrl-C).
        keep: how many of the newest are kept.
    """

    every: int | None = None
    keep: int = 2

    def __post_init__(self):
        for name, value in (("every", self.every), ("keep", self.keep)):
            if value is not None and value < 1:
                raise ValueError(f"checkpoint.{name} must be at least 1, got {value}.")


@dataclasses.dataclass(frozen=True)
class Restored(Generic[StateT]):
    """What a checkpoint held: the state, placed as it was asked for, and where the data stood."""

    state: StateT
    data: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, in the folder `checkpoints` of its run folder.

    Args:
        folder: the run folder.
        model: the model's config as a dict of plain values, to know the model again by.
        keep: how many of the newest to keep.
    """

    def __init__(self, folder: pathlib.Path, model: dict[str, Any], keep: int = 2):
        self._model = _plain(model)
        self._folder = folder.absolute() / "checkpoints"
        self._orbax = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep),
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "data": ocp.JsonCheckpointHandler(),
                "model": ocp.JsonCheckpointHandler(),
            },
        )

    def latest(self) -> int | None:
        """The step of the newest whole checkpoint; None if there is none."""
        return self._orbax.latest_step()

    def save(self, step: int, state: Any, data: dict[str, Any]) -> None:
        """Begins to write a checkpoint, unless this step has one; arrays are copied before return.

        Args:
            step: steps done.
            state: a pytree of arrays.
            data: the state of the data pipeline, of plain values.
        """
        if self.latest() == step:
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(_plain(data)),
            model=ocp.args.JsonSave(self._model),
        )
        self._orbax.save(step, args=items)

    def restore(self, like: StateT) -> Restored[StateT]:
        """The newest checkpoint.

        Args:
            like: a state, or its `jax.ShapeDtypeStruct`s with shardings: where to put the arrays.

        Raises:
            ValueError: if there is no checkpoint here, or it is one of another model or of another
                optimizer; says what differs.
        """
        step = self.latest()
        if step is None:
            raise ValueError(f"{self._folder} has no checkpoint to go on from.")
        place = f"the checkpoint of step {step} in {self._folder}"
        self._require_same_model(step, place)
        abstract = jax.tree.map(_abstract, like)
        self._require_same_arrays(step, place, abstract)
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
        )
        restored = self._orbax.restore(step, args=items)
        return Restored(restored.state, restored.data)

    def close(self) -> None:
        """Waits until what is being written is on disk."""
        self._orbax.close()

    def _require_same_model(self, step: int, place: str) -> None:
        items = ocp.args.Composite(model=ocp.args.JsonRestore())
        theirs = self._orbax.restore(step, args=items).model
        differ = [
            f"{key} {theirs.get(key)!r} there and {self._model.get(key)!r} here"
            for key in sorted(theirs.keys() | self._model.keys())
            if theirs.get(key) != self._model.get(key)
        ]
        if differ:
            raise ValueError(
                f"{place} is of another model: {'; '.join(differ)}. Resume with the run's own "
                "config, or begin a new run."
            )

    def _require_same_arrays(self, step: int, place: str, abstract: Any) -> None:
        """Orbax would find this out too, but half-way, and with pages of output."""
        theirs, ours = (
            {
                tuple(_name(k) for k in path): (tuple(x.shape), str(x.dtype))
                for path, x in jax.tree.leaves_with_path(tree)
            }
            for tree in (self._orbax.item_metadata(step).state.tree, abstract)
        )
        for key in [*ours, *theirs]:
            if theirs.get(key) != ours.get(key):
                raise ValueError(
                    f"{place} does not fit: {'.'.join(key)} is {theirs.get(key, 'missing')} there "
                    f"and {ours.get(key, 'missing')} here. Was the optimizer another one?"
                )


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
