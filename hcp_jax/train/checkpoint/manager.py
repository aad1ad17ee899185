"""Checkpoints: the state of training, where the data stood, and of which run it is; by Orbax.

One checkpoint holds three items: `state` (parameters, optimizer state and step, every array with
its own bits, whatever mesh it lies on), `data` (the state of the data pipeline) and `about`: the
step, the model's config, the whole config, the fingerprint of the text, and a checksum of every
array, which does not depend on how it is cut. A seal over `about` and `data` (`sealed.py`) is
checked before anything in them is believed, so that a checkpoint is called one of another model
only if it was written so, and not where a bit has changed.

A checkpoint is written while training goes on, and has its name only once it is whole. What is
found damaged all the same is told, put aside, and the one before it is used. It can be restored
onto another mesh, with another comm type, or by another number of processes.

Of several processes, what fails in one fails in all: after each thing that can fail they tell each
other how it went, before anything that needs all of them.
"""

import contextlib
import dataclasses
import itertools
import logging
import pathlib
import shutil
from collections.abc import Callable
from dataclasses import field
from typing import Any, Generic, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath

from hcp_jax.train.checkpoint import checksums, sealed, writers
from hcp_jax.train.hosts.kv_store import Words, in_words
from hcp_jax.train.sections import CheckpointConfig

StateT = TypeVar("StateT")

_log = logging.getLogger("hcp_jax")


@dataclasses.dataclass(frozen=True)
class Restored(Generic[StateT]):
    """What a checkpoint held.

    Attributes:
        state: placed as it was asked for.
        data: where the data stood.
        about: what it says of itself: "step", "model", "config", "files", "arrays".
    """

    state: StateT
    data: dict[str, Any]
    about: dict[str, Any] = field(default_factory=dict)


class MismatchError(ValueError):
    """A checkpoint is whole, but of something else."""


class Checkpoints:
    """The checkpoints of one run, in the folder `checkpoints` of its run folder.

    Of several processes, all must call the same methods in the same order; what fails in one of
    them is raised in all, with the number and the host of that one.

    Args:
        folder: the run folder.
        model: what of the model's config no run can change, as a dict of plain values.
        config: when to save, and how many to keep.
        run: the whole run's config, to be kept with each checkpoint.
        files: the fingerprint of the run's text, likewise (`data/fingerprint.py`).

    Raises:
        OSError: if the folder cannot be used.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        model: dict[str, Any],
        config: CheckpointConfig | None = None,
        run: dict[str, Any] | None = None,
        files: dict[str, Any] | None = None,
    ):
        config = config or CheckpointConfig()
        self._model = sealed.plain(model)
        self._run = {"config": sealed.plain(run), "files": sealed.plain(files)}
        self._goes_on = config.on_error == "continue"
        self._folder = folder.absolute() / "checkpoints"
        self._options = {"max_to_keep": config.keep, "keep_period": config.keep_every}
        self._words = Words("checkpoints")
        self._saves = itertools.count()
        self._saving: tuple[int, str] | None = None
        self._missed: OSError | None = None
        self._writer: writers.Writer
        self._latest: int | None
        self._open()

    def latest(self) -> int | None:
        """Return the step of the newest checkpoint, also one being written; None without any."""
        return self._latest

    def save(self, step: int, state: Any, data: dict[str, Any]) -> None:
        """Begin to write a checkpoint, unless this step has one; arrays are copied before return.

        Args:
            step: steps done.
            state: a pytree of arrays.
            data: the state of the data pipeline, of plain values.

        Raises:
            OSError: if this one or the one before cannot be written and training is to stop then.
        """
        self.wait()
        if self._latest == step:
            return
        sums = checksums.sum_arrays(state)
        arrays = {name: [*x, sums[name]] for name, x in sealed.describe_arrays(state).items()}
        data = sealed.plain(data)
        about = {"step": step, "model": self._model, **self._run, "arrays": arrays}
        beside = {"data": data, "about": sealed.seal(about, data)}
        number = next(self._saves)
        self._words.forget(f"save-{number - 1}")
        self._saving = step, f"save-{number}"
        self._latest = step
        self._tell(self._write(lambda name: self._writer.begin(name, step, state, beside)))

    def restore(
        self, like: StateT, require: Callable[[dict[str, Any]], None] = lambda about: None
    ) -> Restored[StateT]:
        """Restore the newest checkpoint that is whole; those after it are put aside.

        Args:
            like: a state, or its `jax.ShapeDtypeStruct`s with shardings: where to put the arrays.
            require: is given what a whole checkpoint says of itself (`Restored.about`), before its
                arrays are read; raises a ValueError if this run cannot go on from it.

        Raises:
            ValueError: if there is no checkpoint here that is whole, or it is one of another model
                or of another optimizer, or `require` raises; says what differs.
            OSError: if what is damaged cannot be put aside.
        """
        abstract = jax.tree.map(_abstract, like)
        damaged: list[int] = []
        why = ""
        for step in self._steps():
            found = self._read(step, abstract, require)
            if isinstance(found, Restored):
                self._put_aside(damaged, step)
                return found
            damaged.append(step)
            why = found
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
        """Wait until what is being written is on disk.

        Raises:
            OSError: as `save`.
        """
        self._tell(self._finish())

    def finish(self) -> None:
        """Wait for the last checkpoint of a run, for which no later one can make up.

        Raises:
            OSError: if it could not be written, even if training was to go on then.
        """
        missed = self._finish() or self._missed
        self._missed = None
        if missed is not None:
            raise OSError(f"{missed}; and it was the last one of this run.") from missed

    def close(self) -> None:
        """As `finish`, and ends what runs in the background.

        Raises:
            OSError: as `finish`.
        """
        try:
            self.finish()
        finally:
            self._writer.close()

    def _finish(self) -> OSError | None:
        if self._saving is None:
            return None
        missed = self._write(lambda _: self._writer.finish())
        if missed is None:
            self._saving = self._missed = None
        return missed

    def _tell(self, missed: OSError | None) -> None:
        if missed is None:
            return
        if not self._goes_on:
            raise OSError(f"{missed} (checkpoint.on_error: stop).") from missed
        self._missed = missed
        _log.warning(f"{missed}. Training goes on (checkpoint.on_error: continue).")

    def _write(self, write: Callable[[str], None]) -> OSError | None:
        """Writes; if one process cannot, what has been written is removed, and all know why."""
        assert self._saving is not None
        step, name = self._saving
        error: Exception | None = None
        try:
            write(name)
        except Exception as caught:  # tensorstore's errors of the disk are ValueErrors.
            error = caught
        why = self._words.error_of_any(error)
        if why is None:
            return None
        with contextlib.suppress(Exception):
            self._writer.close()
        # Only when nobody writes any more may what has been written be removed.
        self._words.of_all(None)
        self._saving = None
        self._open()
        if self._latest == step:
            _log.warning(f"the checkpoint of step {step} is whole, but older ones remain: {why}.")
            return None
        before = (
            "there is no whole one"
            if self._latest is None
            else f"the last whole one is of step {self._latest}"
        )
        missed = OSError(
            f"the checkpoint of step {step} could not be written to {self._folder}: {why}; {before}"
        )
        missed.__cause__ = error
        return missed

    def _open(self) -> None:
        error: Exception | None = None
        latest: int | None = None
        try:
            if jax.process_index() == 0:
                first = writers.First(self._folder, self._options, self._words)
                self._writer, latest = first, first.latest()
            else:
                self._writer = writers.Other(self._folder, self._words)
        except Exception as caught:
            error = caught
        why = self._words.error_of_any(error)
        if why is not None:
            raise OSError(f"{self._folder} cannot be used for checkpoints: {why}.") from error
        self._latest = self._words.of_all(latest)[0]

    def _steps(self) -> list[int]:
        """What the first process sees: a shared file system may be late elsewhere."""
        steps = self._writer.steps() if isinstance(self._writer, writers.First) else []
        return self._words.of_all(steps)[0]

    def _read(
        self, step: int, abstract: Any, require: Callable[[dict[str, Any]], None]
    ) -> Restored | str:
        """Read a checkpoint; or say how it is damaged, by the first process that finds so."""
        read: Restored | None = None
        error: Exception | None = None
        try:
            read = self._read_alone(step, abstract, require)
        except Exception as caught:  # Whatever a reader makes of a file that is not whole.
            error = caught
        seal = None if read is None else read.about["seal"]
        words = self._words.of_all([isinstance(error, MismatchError), in_words(error), seal])
        for is_other, why, _ in words:
            if is_other:
                raise MismatchError(why) from error
        for _, why, _ in words:
            if why is not None:
                return why
        if len({seal for _, _, seal in words}) > 1:
            return "processes read different checkpoints of the same step and name"
        assert read is not None
        # A collective: all processes have read.
        found = checksums.sum_arrays(read.state)
        said = {name: array[2] for name, array in read.about["arrays"].items()}
        changed = [name for name in said if found.get(name) != said[name]]
        if any(self._words.of_all(bool(changed))):
            names = changed or ["an array"]
            return f"the bits of {names[0]} are not those that were saved"
        return read

    def _read_alone(
        self, step: int, abstract: Any, require: Callable[[dict[str, Any]], None]
    ) -> Restored:
        """Read a checkpoint while no other process is waited for; its arrays are not checked."""
        place = f"the checkpoint of step {step} in {self._folder}"
        folder = epath.Path(self._folder / str(step))
        about, data = sealed.read(folder)
        if about["step"] != step:
            raise sealed.DamageError(f"it is that of step {about['step']} under another name")
        # The seal holds: what differs from here on was written so.
        self._require_same_model(about["model"], place)
        try:
            require(about)
        except ValueError as error:
            raise MismatchError(f"{place}: {error}") from None
        _require_same_arrays(about["arrays"], place, abstract)
        state = writers.handlers()["state"].restore(
            folder / "state", args=ocp.args.StandardRestore(abstract)
        )
        return Restored(state, data, about)

    def _put_aside(self, damaged: list[int], whole: int) -> None:
        """Out of the way of the checkpoints that training will make of these steps again."""
        if not damaged:
            return
        error: Exception | None = None
        aside = self._folder.with_name("checkpoints-damaged")
        try:
            if isinstance(self._writer, writers.First):
                aside.mkdir(exist_ok=True)
                for step in damaged:
                    shutil.rmtree(aside / str(step), ignore_errors=True)
                    (self._folder / str(step)).rename(aside / str(step))
                self._writer.steps()
                _log.warning(f"what is damaged is in {aside} now.")
        except Exception as caught:
            error = caught
        why = self._words.error_of_any(error)
        if why is not None:
            raise OSError(f"what is damaged cannot be put into {aside}: {why}.") from error
        self._latest = whole

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


def _require_same_arrays(theirs: dict[str, Any], place: str, abstract: Any) -> None:
    """Orbax would find this out too, but half-way, and with pages of output."""
    ours = sealed.describe_arrays(abstract)
    for key in [*ours, *theirs]:
        there, here = theirs.get(key, ["missing"])[:2], ours.get(key, ["missing"])
        if there != here:
            raise MismatchError(
                f"{place} does not fit: {key} is {_in_words(there)} there and {_in_words(here)} "
                "here. Was the optimizer another one?"
            )


def _in_words(array: list[Any]) -> str:
    return " of ".join(str(part) for part in reversed(array))


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
