"""Write events for TensorBoard in the caller's thread.

tensorboardX's own `SummaryWriter` writes in a thread, which ends when the disk is full; its queue
then fills up, and the eleventh number waits for ever.
"""

import pathlib
import time
from collections.abc import Mapping
from typing import Any

from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2


class Board:
    """Writes numbers for TensorBoard, and raises errors of the disk.

    Args:
        folder: the folder of the event files.
        start: the first step that will be written; TensorBoard then drops older events from this
            step on.
    """

    def __init__(self, folder: pathlib.Path, start: int):
        folder.mkdir(parents=True, exist_ok=True)
        # The library has no types.
        self._writer: Any = event_file_writer.EventsWriter(str(folder / "events"))
        started = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(event_pb2.Event(step=start, session_log=started))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the numbers of one step; they are on disk when this returns.

        Raises:
            OSError: if they cannot be written.
        """
        for name, value in values.items():
            self._write(event_pb2.Event(step=step, summary=summary.scalar(name, value)))
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the file.

        Raises:
            OSError: if the rest cannot be written.
        """
        self._writer.close()

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)
