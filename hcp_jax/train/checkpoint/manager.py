"""Save, check and restore the checkpoints of a run, with Orbax.

A checkpoint holds three items: `state` (parameters, optimizer state and step, every array bit by
bit, whatever mesh it is on), `data` (the state of the data pipeline) and `about`: the step, the
model's config, the whole config, the fingerprint of the text, and a checksum of every array, which
does not depend on how the array is cut. A seal over `about` and `data` (`sealed.py`) is checked
before they are used. So a checkpoint is reported as one of another model only if it was written so,
and not because a bit has changed.

A checkpoint is written, and its checksums are computed, while training goes on; it gets its name
only once it is whole. A damaged one is reported and moved away, and the one before it is used. A
checkpoint can be restored onto another mesh, with another comm type, or by another number of
processes.

With several processes, an error in one is an error in all: after each operation that can fail, they
exchange the results before anything that needs all of them.
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
from hcp_jax.train.hosts.kv_store import Messages, describe_error
from hcp_jax.train.sections import CheckpointConfig

StateT = TypeVar("StateT")

_log = logging.getLogger("hcp_jax")


@dataclasses.dataclass(frozen=True)
class Restored(Generic[StateT]):
    """The contents of a checkpoint.

    Attributes:
        state: on the devices that the caller asked for.
        data: the state of the data pipeline.
        about: the checkpoint's description: "step", "model", "config", "files", "arrays".
    """

    state: StateT
    data: dict[str, Any]
    about: dict[str, Any] = field(default_factory=dict)


class MismatchError(ValueError):
    """A checkpoint is whole, but of another model, optimizer or run."""


class Checkpoints:
    """The checkpoints of one run, in the folder `checkpoints` of its run folder.

    With several processes, all must call the same methods in the same order; an error in one of
    them is raised in all, with that one's number and host.

    Args:
        folder: the run folder.
        model: the part of the model's config that no run can change, as a dict of plain values.
        config: when to save, and how many to keep.
        run: the whole run's config, to be kept with each checkpoint.
        files: the fingerprint of the run's text (`data/fingerprint.py`), to be kept likewise.

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
        self._continues = config.on_error == "continue"
        self._folder = folder.absolute() / "checkpoints"
        self._options = {"max_to_keep": config.keep, "keep_period": config.keep_every}
        self._messages = Messages("checkpoints")
        self._saves = itertools.count()
        self._saving: tuple[int, str] | None = None
        self._failure: OSError | None = None
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
            OSError: if this one or the one before cannot be written, and `config.on_error` is
                "stop".
        """
        self.wait()
        if self._latest == step:
            return
        data = sealed.plain(data)
        about = {"step": step, "model": self._model, **self._run}
        described, sums = sealed.describe_arrays(state), checksums.start(state)

        def sealed_about() -> dict[str, Any]:
            found = sums()
            arrays = {name: [*x, found[name]] for name, x in described.items()}
            return sealed.seal(about | {"arrays": arrays}, data)

        number = next(self._saves)
        self._messages.delete(f"save-{number - 1}")
        self._saving = step, f"save-{number}"
        self._latest = step
        self._handle(
            self._write(lambda name: self._writer.begin(name, step, state, data, sealed_about))
        )

    def restore(
        self, like: StateT, require: Callable[[dict[str, Any]], None] = lambda about: None
    ) -> Restored[StateT]:
        """Restore the newest whole checkpoint; move damaged ones after it away.

        Args:
            like: a state, or its `jax.ShapeDtypeStruct`s with shardings: where to put the arrays.
            require: called with the `Restored.about` of a whole checkpoint before its arrays are
                read; raises a ValueError if this run cannot go on from it.

        Raises:
            ValueError: if no checkpoint is whole, or it is of another model or optimizer, or
                `require` raises; says what differs.
            OSError: if a damaged checkpoint cannot be moved away.
        """
        abstract = jax.tree.map(_abstract, like)
        damaged: list[int] = []
        why = ""
        for step in self._steps_on_disk():
            found = self._read(step, abstract, require)
            if isinstance(found, Restored):
                self._move_away(damaged, step)
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
        """Wait until the checkpoint that is being written is on disk.

        Raises:
            OSError: as `save`.
        """
        self._handle(self._finish())

    def finish(self) -> None:
        """Wait for the last checkpoint of a run, which no later one can replace.

        Raises:
            OSError: if it could not be written, even with `config.on_error` "continue".
        """
        failure = self._finish() or self._failure
        self._failure = None
        if failure is not None:
            raise OSError(f"{failure}; and it was the last one of this run.") from failure

    def close(self) -> None:
        """Call `finish`, then stop the threads in the background.

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
        failure = self._write(lambda _: self._writer.finish())
        if failure is None:
            self._saving = self._failure = None
        return failure

    def _handle(self, failure: OSError | None) -> None:
        """Raise an error, or log it and go on, as the config says."""
        if failure is None:
            return
        if not self._continues:
            raise OSError(f"{failure} (checkpoint.on_error: stop).") from failure
        self._failure = failure
        _log.warning(f"{failure}. Training goes on (checkpoint.on_error: continue).")

    def _write(self, write: Callable[[str], None]) -> OSError | None:
        """Call `write`; if it fails in one process, remove the files; return the error in all."""
        assert self._saving is not None
        step, name = self._saving
        error: Exception | None = None
        try:
            write(name)
        except Exception as caught:  # tensorstore's errors of the disk are ValueErrors.
            error = caught
        why = self._messages.first_error(error)
        if why is None:
            return None
        with contextlib.suppress(Exception):
            self._writer.close()
        # The files may be removed only when no process writes any more.
        self._messages.gather(None)
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
        failure = OSError(
            f"the checkpoint of step {step} could not be written to {self._folder}: {why}; {before}"
        )
        failure.__cause__ = error
        return failure

    def _open(self) -> None:
        error: Exception | None = None
        latest: int | None = None
        try:
            if jax.process_index() == 0:
                first = writers.First(self._folder, self._options, self._messages)
                self._writer, latest = first, first.latest()
            else:
                self._writer = writers.Other(self._folder, self._messages)
        except Exception as caught:
            error = caught
        why = self._messages.first_error(error)
        if why is not None:
            raise OSError(f"{self._folder} cannot be used for checkpoints: {why}.") from error
        self._latest = self._messages.gather(latest)[0]

    def _steps_on_disk(self) -> list[int]:
        """Return the steps that process 0 sees: a shared file system may be late elsewhere."""
        steps = self._writer.steps() if isinstance(self._writer, writers.First) else []
        found: list[int] = self._messages.gather(steps)[0]
        return found

    def _read(
        self, step: int, abstract: Any, require: Callable[[dict[str, Any]], None]
    ) -> Restored[Any] | str:
        """Return a checkpoint, or how it is damaged, as the first process that noticed it says."""
        read: Restored[Any] | None = None
        error: Exception | None = None
        try:
            read = self._read_alone(step, abstract, require)
        except Exception as caught:  # Whatever a reader makes of a file that is not whole.
            error = caught
        seal = None if read is None else read.about["seal"]
        mine = isinstance(error, MismatchError), describe_error(error), seal
        results = self._messages.gather(mine)
        for is_mismatch, why, _ in results:
            if is_mismatch:
                raise MismatchError(why) from error
        for _, why, _ in results:
            if why is not None:
                return str(why)
        if len({seal for _, _, seal in results}) > 1:
            return "processes read different checkpoints of the same step and name"
        assert read is not None
        # A collective: all processes have read.
        found = checksums.sum_arrays(read.state)
        saved = {name: array[2] for name, array in read.about["arrays"].items()}
        changed = [name for name in saved if found.get(name) != saved[name]]
        if any(self._messages.gather(bool(changed))):
            names = changed or ["an array"]
            return f"the bits of {names[0]} are not those that were saved"
        return read

    def _read_alone(
        self, step: int, abstract: Any, require: Callable[[dict[str, Any]], None]
    ) -> Restored[Any]:
        """Read a checkpoint without waiting for other processes or checking its arrays."""
        name = f"the checkpoint of step {step} in {self._folder}"
        folder = epath.Path(self._folder / str(step))
        about, data = sealed.read(folder)
        if about["step"] != step:
            raise sealed.DamageError(f"it is that of step {about['step']} under another name")
        # The seal is right: a difference found from here on was written so.
        self._require_same_model(about["model"], name)
        try:
            require(about)
        except ValueError as error:
            raise MismatchError(f"{name}: {error}") from None
        _require_same_arrays(about["arrays"], name, abstract)
        state = writers.handlers()["state"].restore(
            folder / "state", args=ocp.args.StandardRestore(abstract)
        )
        return Restored(state, data, about)

    def _move_away(self, damaged: list[int], whole: int) -> None:
        """Move damaged checkpoints away: training will write those steps again."""
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
                _log.warning(f"the damaged checkpoints are in {aside} now.")
        except Exception as caught:
            error = caught
        why = self._messages.first_error(error)
        if why is not None:
            raise OSError(f"damaged checkpoints cannot be moved to {aside}: {why}.") from error
        self._latest = whole

    def _require_same_model(self, theirs: dict[str, Any], name: str) -> None:
        differ = [
            f"{key} {theirs.get(key)!r} there and {self._model.get(key)!r} here"
            for key in sorted(theirs.keys() | self._model.keys())
            if theirs.get(key) != self._model.get(key)
        ]
        if differ:
            raise MismatchError(
                f"{name} is of another model: {'; '.join(differ)}. Resume with the run's own "
                "config, or begin a new run."
            )


def _require_same_arrays(theirs: dict[str, Any], name: str, abstract: Any) -> None:
    """Refuse arrays of other shapes; Orbax would too, but half-way and with pages of output."""
    ours = sealed.describe_arrays(abstract)
    for key in [*ours, *theirs]:
        there, here = theirs.get(key, ["missing"])[:2], ours.get(key, ["missing"])
        if there != here:
            raise MismatchError(
                f"{name} does not fit: {key} is {_describe(there)} there and {_describe(here)} "
                "here. Was the optimizer another one?"
            )


def _describe(array: list[Any]) -> str:
    return " of ".join(str(part) for part in reversed(array))


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
