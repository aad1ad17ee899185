"""A checkpoint that several processes write: each of them its part, and the first makes it one.

Orbax can do this by itself, but then its processes wait for each other on the way, at barriers to
which one whose write has failed does not come: the others stand there for 5 to 40 minutes, or,
where the barrier is a collective, until they are killed. So here Orbax's manager runs in process 0
alone and knows of no other one:

    process 0                                   every other process
    Orbax's manager makes the directory
    says where it is                  ------>   hears where it is
    copies its shards from the devices          copies its shards from the devices
      (training goes on)                          (training goes on)
    writes them                                 writes them
    hears how it went everywhere      <------   says how it went
    joins the parts, names the checkpoint

Whatever fails where, nobody waits for longer than the others take to write.
"""

import asyncio
import concurrent.futures
import contextlib
import logging
import pathlib
import shutil
import time
from collections.abc import Coroutine, Sequence
from typing import Any, Protocol

import jax
import orbax.checkpoint as ocp
from etils import epath

from hcp_jax.train.hosts.kv_store import ElsewhereError, Words, in_words

# Orbax logs a failed write with its tracebacks, in pages; who waits for it says in a line why.
logging.getLogger("absl").addFilter(
    lambda record: not (record.exc_info and "orbax" in record.pathname)
)

WRITE_SECONDS = 1200
"""A write that has neither ended nor failed after this long counts as failed."""


class Writer(Protocol):
    """One process's part in writing checkpoints."""

    def begin(self, name: str, step: int, state: Any, beside: dict[str, Any]) -> None:
        """Begins to write a checkpoint; the arrays have been copied when this returns.

        Args:
            name: of this save among the words of the processes.
            step: steps done.
            state: a pytree of arrays.
            beside: other items by their names, each of plain values.
        """
        ...

    def finish(self) -> None:
        """Waits until what was begun is written; raises what went wrong."""
        ...

    def close(self) -> None:
        """Waits until nothing is written here any more, well or not."""
        ...


class First:
    """Process 0, or the only one: Orbax's manager, which knows of no other process.

    Args:
        folder: where checkpoints are; what was left half-written there is removed.
        options: which checkpoints to keep, as `ocp.CheckpointManagerOptions` has it.
        words: to the other processes.
    """

    def __init__(self, folder: pathlib.Path, options: dict[str, Any], words: Words):
        self._folder, self._words = folder, words
        self._name, self._told = "", False
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)
        self._manager = ocp.CheckpointManager(
            folder,
            options=ocp.CheckpointManagerOptions(
                **options,
                create=False,
                # It does all that it does by itself, and asks no other process to come.
                multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes={0}),
                async_options=ocp.AsyncOptions(
                    timeout_secs=WRITE_SECONDS,
                    # The others are told of a directory that is there.
                    create_directories_asynchronously=False,
                ),
            ),
            item_handlers=handlers(self._state_handler()),
        )

    def latest(self) -> int | None:
        """The step of the newest checkpoint; None if there is none."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """The steps of which there are checkpoints, as they are on disk, the newest first."""
        self._manager.reload()
        return sorted(self._manager.all_steps(), reverse=True)

    def begin(self, name: str, step: int, state: Any, beside: dict[str, Any]) -> None:
        """See `Writer`."""
        self._name, self._told = name, False
        items = {item: ocp.args.JsonSave(values) for item, values in beside.items()}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), **items)
        try:
            self._manager.save(step, args=args, force=True)
        finally:
            if not self._told:
                self._words.say(f"{name}/place", None)

    def finish(self) -> None:
        """See `Writer`."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """See `Writer`."""
        with contextlib.suppress(Exception):
            self._manager.wait_until_finished()
        self._manager.close()

    def _state_handler(self) -> ocp.StandardCheckpointHandler:
        """Orbax's own, which also tells the other processes where, and hears from them."""
        handler = ocp.StandardCheckpointHandler()
        if jax.process_count() == 1:
            return handler

        async def tell_and_write(directory: epath.Path, *args: Any, **kwargs: Any) -> Any:
            # Orbax in the others waits for this one, up to ten minutes, before it writes.
            (directory / "array_metadatas").mkdir()
            self._words.say(f"{self._name}/place", str(directory.relative_to(self._folder)))
            self._told = True
            return await ocp.StandardCheckpointHandler.async_save(
                handler, directory, *args, **kwargs
            )

        def hear_and_join(directory: epath.Path) -> None:
            for process in range(1, jax.process_count()):
                error = self._words.hear(f"{self._name}/part", process, WRITE_SECONDS)
                if error is not None:
                    raise ElsewhereError(error)
            ocp.StandardCheckpointHandler.finalize(handler, directory)

        # Of a subclass Orbax would write the name into the checkpoint, and look for it to read it.
        handler.async_save = tell_and_write
        handler.finalize = hear_and_join
        return handler


class Other:
    """Any other process: writes its shards of the arrays where process 0 says.

    Args:
        folder: where checkpoints are.
        words: to the other processes.
    """

    def __init__(self, folder: pathlib.Path, words: Words):
        self._folder, self._words = folder, words
        self._handler = ocp.StandardCheckpointHandler()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._part: concurrent.futures.Future[None] | None = None

    def begin(self, name: str, step: int, state: Any, beside: dict[str, Any]) -> None:
        """See `Writer`; only the arrays are written here."""
        self._part = None
        place = self._words.hear(f"{name}/place", 0)
        if place is None:
            return  # Process 0 says why.
        directory = epath.Path(self._folder / place)
        try:
            args = ocp.args.StandardSave(state)
            writes = _run(self._handler.async_save(directory, args=args))
        except Exception as error:
            self._words.say(f"{name}/part", in_words(error))
            raise
        self._part = self._thread.submit(self._write, name, writes or ())

    def finish(self) -> None:
        """See `Writer`."""
        if self._part is not None:
            self._part.result()

    def close(self) -> None:
        """See `Writer`."""
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
            self._words.say(f"{name}/part", in_words(failed))


def handlers(state: ocp.StandardCheckpointHandler | None = None) -> dict[str, Any]:
    """What reads and writes the items of a checkpoint."""
    return {
        "state": state or ocp.StandardCheckpointHandler(),
        "data": ocp.JsonCheckpointHandler(),
        "about": ocp.JsonCheckpointHandler(),
    }


def _run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """As `asyncio.run`, which must not end while Orbax's threads begin tasks in their own loops."""
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(coroutine)
    finally:
        loop.close()
