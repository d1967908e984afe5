"""Writes scalars as TensorBoard event files, in the calling thread.

The `SummaryWriter` of tensorboardX passes events to a background thread. If the disk is full, this
thread ends, and the next call of `add_scalar` waits forever. `EventFile` raises an error instead.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary


class EventFile:
    """Writes scalars to a new TensorBoard event file in `directory`.

    TensorBoard ignores events from step `first_step` on in older event files, because a resumed run
    writes these events again. Raises OSError if the file cannot be written.
    """

    def __init__(self, directory: str | os.PathLike[str], first_step: int) -> None:
        os.makedirs(directory, exist_ok=True)
        # The suffix keeps two runs that start within one second out of each other's file.
        self._writer = EventsWriter(
            os.path.join(directory, "events"), filename_suffix=f".{os.getpid()}.{time.time_ns()}"
        )
        start = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=time.time(), step=first_step, session_log=start))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))

    def close(self) -> None:
        self._writer.close()

    def _write(self, event: Event) -> None:
        self._writer.write_event(event)
        self._writer.flush()
