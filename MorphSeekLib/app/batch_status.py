"""What a batch tells the one who started it: a file in its folder, and how it is stopped."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..io.files import write_atomically
from ..protocol.batch import BatchStatus
from ..protocol.errors import Cancelled, InUseError, MorphSeekError
from ..protocol.job import Event, Job
from ..protocol.run_folder import KEEP, STATUS, STOP
from ..protocol.settings import to_dict, to_json


@contextmanager
def told(folder: Path, job: Job, alone: threading.Event | None) -> Iterator[Job]:
    """Write into the folder of a batch how far it is and how it ends, and stop it when the folder says so.

    Args:
        folder: the batch's; without it nothing is written.
        job: of the one who runs the batch.
        alone: set when the one who started it has ended; it then stops, unless the folder holds a file "keep". None
            for a batch that nobody watches: a file "stop" that is left from before counts for nothing.

    Yields:
        the job for the batch.
    """
    diary = _Diary(folder)
    if alone is None:
        (folder / STOP).unlink(missing_ok=True)

    def hear(event: Event) -> None:
        job.tell(event)
        diary.hear(event)

    def stopped() -> bool:
        return (folder / STOP).exists() or (alone is not None and alone.is_set() and not (folder / KEEP).exists())

    try:
        yield job.heard_by(hear).until(stopped)
    except InUseError:
        raise  # the folder is another process's
    except Cancelled:
        diary.write(state="stopped", message="")
        raise
    except MorphSeekError as error:
        diary.write(state="failed", message=str(error))
        raise
    diary.write(state="done", message="")


class _Diary:
    """Keeps status.json."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._status = folder, BatchStatus()

    def hear(self, event: Event) -> None:
        """Write down an event of the batch."""
        if not self._status.begun and event.steps:
            self._status = dataclasses.replace(self._status, begun=time.time())
        counted = {"done": event.step, "count": event.steps} if event.steps else {}
        self.write(message=event.message, **counted)

    def write(self, **changes: Any) -> None:
        """Write the status with some changes; a full disk does not stop the batch."""
        self._status = dataclasses.replace(self._status, written=time.time(), **changes)
        if self._folder.is_dir():
            with suppress(MorphSeekError, OSError):
                write_atomically(self._folder / STATUS, to_json(to_dict(self._status)).encode())
