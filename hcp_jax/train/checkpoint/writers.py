"""Write a checkpoint with several processes: each writes its part, and process 0 joins the parts.

Orbax can do this by itself, but then its processes wait for each other at barriers. A process whose
write has failed does not reach them: the others wait for 5 to 40 minutes, or, where the barrier is
a collective, until they are killed. So here Orbax's manager runs in process 0 alone and does not
know of the others:

    process 0                                   every other process
    Orbax's manager makes the directory
    sends its path                    ------>   receives the path
    copies its shards from the devices          copies its shards from the devices
      (training goes on)                          (training goes on)
    writes them, then their checksums           writes them
    receives the result of each       <------   sends its result
    joins the parts, names the checkpoint

Whatever fails in any process, no other waits for longer than the rest takes to write.
"""

import asyncio
import concurrent.futures
import contextlib
import logging
import pathlib
import shutil
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, Protocol

import jax
import orbax.checkpoint as ocp
from etils import epath

from hcp_jax.train.hosts.kv_store import Messages, RemoteError, describe_error

WRITE_SECONDS = 1200
"""A write that has neither ended nor failed after this long counts as failed."""

About = Callable[[], dict[str, Any]]
"""Returns the description of a checkpoint, as soon as the checksums in it are known."""


class Writer(Protocol):
    """One process's part in writing checkpoints."""

    def begin(self, name: str, step: int, state: Any, data: Any, about: About) -> None:
        """Begin to write a checkpoint; the arrays have been copied when this returns.

        Args:
            name: of this save, in the messages between the processes.
            step: steps done.
            state: a pytree of arrays.
            data: the item of that name, of plain values.
            about: returns the item of that name, of plain values; called by another thread.
        """
        ...

    def finish(self) -> None:
        """Wait until the checkpoint that was begun is written; raise the error if it failed."""
        ...

    def close(self) -> None:
        """Wait until this process writes nothing any more, and ignore errors."""
        ...


class First:
    """The writer of process 0, or of the only process: Orbax's manager, unaware of the others.

    Args:
        folder: where checkpoints are; half-written ones there are removed.
        options: which checkpoints to keep, as in `ocp.CheckpointManagerOptions`.
        messages: to and from the other processes.
    """

    def __init__(self, folder: pathlib.Path, options: dict[str, Any], messages: Messages):
        self._folder, self._messages = folder, messages
        self._name, self._path_sent = "", False
        self._about: About = dict
        self._quiet = contextlib.ExitStack()
        self._quiet.enter_context(quiet_orbax())
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)
        self._manager = ocp.CheckpointManager(
            folder,
            options=ocp.CheckpointManagerOptions(
                **options,
                create=False,
                # The manager waits for no other process.
                multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes={0}),
                async_options=ocp.AsyncOptions(
                    timeout_secs=WRITE_SECONDS,
                    # The directory must exist before the others receive its path.
                    create_directories_asynchronously=False,
                ),
            ),
            item_handlers=handlers(self._state_handler(), self._about_handler()),
        )

    def latest(self) -> int | None:
        """Return the step of the newest checkpoint; None if there is none."""
        step: int | None = self._manager.latest_step()
        return step

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints on disk, the newest first."""
        self._manager.reload()
        return sorted(self._manager.all_steps(), reverse=True)

    def begin(self, name: str, step: int, state: Any, data: Any, about: About) -> None:
        """See `Writer`."""
        self._name, self._path_sent, self._about = name, False, about
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(data),
            about=ocp.args.JsonSave({}),  # `_about_handler` writes what `about` returns.
        )
        try:
            self._manager.save(step, args=args, force=True)
        finally:
            if not self._path_sent:
                self._messages.send(f"{name}/path", None)

    def finish(self) -> None:
        """See `Writer`."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """See `Writer`."""
        with contextlib.suppress(Exception):
            self._manager.wait_until_finished()
        with self._quiet:
            self._manager.close()

    def _about_handler(self) -> ocp.JsonCheckpointHandler:
        """Return Orbax's handler; it waits for the checksums once all else is written.

        Only then, so that nothing is still being written if they fail. It is in the background, and
        before the checkpoint gets its name.
        """
        handler = ocp.JsonCheckpointHandler()

        async def nothing_yet(*_: Any, **__: Any) -> list[Any]:
            return []

        def write(directory: epath.Path) -> None:
            ocp.JsonCheckpointHandler().save(directory, args=ocp.args.JsonSave(self._about()))

        handler.async_save = nothing_yet
        handler.finalize = write
        return handler

    def _state_handler(self) -> ocp.StandardCheckpointHandler:
        """Return Orbax's handler; it also sends the path to the others, and gets their results."""
        handler = ocp.StandardCheckpointHandler()
        if jax.process_count() == 1:
            return handler

        async def send_path_and_write(directory: epath.Path, *args: Any, **kwargs: Any) -> Any:
            # Orbax in the others waits for this one, up to ten minutes, before it writes.
            (directory / "array_metadatas").mkdir()
            self._messages.send(f"{self._name}/path", str(directory.relative_to(self._folder)))
            self._path_sent = True
            return await ocp.StandardCheckpointHandler.async_save(
                handler, directory, *args, **kwargs
            )

        def receive_and_join(directory: epath.Path) -> None:
            for process in range(1, jax.process_count()):
                error = self._messages.receive(f"{self._name}/part", process, WRITE_SECONDS)
                if error is not None:
                    raise RemoteError(error)
            ocp.StandardCheckpointHandler.finalize(handler, directory)

        # Not a subclass: Orbax would write its name into the checkpoint, and need it to read it.
        handler.async_save = send_path_and_write
        handler.finalize = receive_and_join
        return handler


class Other:
    """The writer of any other process: writes its shards of the arrays to the path of process 0.

    Args:
        folder: where checkpoints are.
        messages: to and from the other processes.
    """

    def __init__(self, folder: pathlib.Path, messages: Messages):
        self._folder, self._messages = folder, messages
        self._quiet = contextlib.ExitStack()
        self._quiet.enter_context(quiet_orbax())
        self._handler = ocp.StandardCheckpointHandler()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._part: concurrent.futures.Future[None] | None = None

    def begin(self, name: str, step: int, state: Any, data: Any, about: About) -> None:
        """See `Writer`; only the arrays are written here."""
        self._part = None
        path = self._messages.receive(f"{name}/path", 0)
        if path is None:
            return  # Process 0 reports the error.
        directory = epath.Path(self._folder / path)
        try:
            args = ocp.args.StandardSave(state)
            writes = _run(self._handler.async_save(directory, args=args))
        except Exception as error:
            self._messages.send(f"{name}/part", describe_error(error))
            raise
        self._part = self._thread.submit(self._write, name, writes or ())

    def finish(self) -> None:
        """See `Writer`."""
        if self._part is not None:
            self._part.result()

    def close(self) -> None:
        """See `Writer`."""
        with self._quiet:
            self._thread.shutdown()

    def _write(self, name: str, writes: Sequence[Any]) -> None:
        failed: Exception | None = None
        deadline = time.monotonic() + WRITE_SECONDS
        try:
            for write in writes:
                write.result(timeout=max(deadline - time.monotonic(), 0.0))
        except Exception as error:
            failed = error
            raise
        finally:
            self._messages.send(f"{name}/part", describe_error(failed))


def handlers(
    state: ocp.StandardCheckpointHandler | None = None,
    about: ocp.JsonCheckpointHandler | None = None,
) -> dict[str, Any]:
    """Return Orbax's handler of each item of a checkpoint.

    Args:
        state: the handler of "state"; None for Orbax's own.
        about: the handler of "about"; None for Orbax's own.
    """
    return {
        "state": state or ocp.StandardCheckpointHandler(),
        "data": ocp.JsonCheckpointHandler(),
        "about": about or ocp.JsonCheckpointHandler(),
    }


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Drop Orbax's log records with tracebacks, which are pages long, while the context lasts.

    The caller reports the same error in one line.
    """

    def is_short(record: logging.LogRecord) -> bool:
        return not (record.exc_info and "orbax" in record.pathname)

    logger = logging.getLogger("absl")
    logger.addFilter(is_short)
    try:
        yield
    finally:
        logger.removeFilter(is_short)


def _run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine in a new event loop, and return its result.

    `asyncio.run` would also shut down the threads of the loop, in which Orbax may begin tasks.
    """
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(coroutine)
    finally:
        loop.close()
