"""A file that grows by a line for each piece of work that is done, and the words that tell how far all of it is."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from .errors import MorphSeekError
from .job import Job
from .settings import to_json

_Answer = TypeVar("_Answer")


class Journal:
    """Lines of JSON, of which a process that is killed leaves at most the last one unfinished.

    Args:
        path: the file; made with the first line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> Iterator[Any]:
        """Yield what the lines hold; an unfinished one is passed over."""
        if not self.path.is_file():
            return
        with self.path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    yield json.loads(line)
                except ValueError:
                    continue

    def add(self, entry: object) -> None:
        """Write a line; it is on the disk when this returns.

        Raises:
            MorphSeekError: it cannot be written, such as on a full disk.
        """
        try:
            with self.path.open("a+b") as file:
                begin = b"" if _ends_whole(file) else b"\n"
                file.write(begin + to_json(entry).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise MorphSeekError(f"{self.path} cannot be written ({error.strerror}); free some space.") from error


def _ends_whole(file: Any) -> bool:
    """Return whether an open file is empty or ends with a whole line."""
    if file.seek(0, os.SEEK_END) == 0:
        return True
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) == b"\n")


def followed(
    answers: Iterable[_Answer], count: int, job: Job, failed: Callable[[_Answer], bool] = lambda answer: False
) -> Iterator[_Answer]:
    """Yield the answers for pairs as they come; tell how many there are, how fast they come, and how long it takes.

    Args:
        answers: as they come.
        count: how many will come.
        job: told after each.
        failed: whether an answer says that its pair failed.
    """
    begin, failures = time.monotonic(), 0
    job.report("step", 0.0, f"{count} pairs to register", 0, count)
    for done, answer in enumerate(answers, 1):
        failures += failed(answer)
        pace = (time.monotonic() - begin) / done
        words = f"{done} of {count} pairs, {failures} failed; {3600 / max(pace, 1e-6):.0f} pairs per hour"
        yield answer
        job.report("step", done / count, f"{words}, {pace * (count - done) / 60:.0f} minutes left", done, count)
