"""Runs that several processes share: what is done is not done again, what another process does is waited for."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from MorphSeekLib.protocol.errors import InUseError
from MorphSeekLib.protocol.job import Job
from MorphSeekLib.protocol.run_folder import locked


class Startable(Protocol):
    """A run with a name, and the run that must be done before it."""

    @property
    def name(self) -> str: ...

    @property
    def start(self) -> Startable | None: ...


R = TypeVar("R", bound=Startable)


def do_all(runs: Sequence[R], do: Callable[[R, Job], None], job: Job) -> None:
    """Do every run, starts before what starts from them.

    Args:
        runs: starts before what starts from them.
        do: does a run unless it is done; raises InUseError where another process is at work on it.
        job: each run gets its share.
    """
    left = list(runs)
    while left:
        before = len(left)
        for number, run in enumerate(runs):
            if run not in left or run.start in left:
                continue
            prefix = f"{number + 1}/{len(runs)} {run.name}: "
            with contextlib.suppress(InUseError):
                do(run, job.part(number / len(runs), (number + 1) / len(runs), prefix))
                left.remove(run)
        if len(left) == before:  # others are at work on all that is left
            job.report("read", 1 - len(left) / len(runs), f"Waiting for another process: {left[0].name}")
            for _ in range(20):
                job.check()
                time.sleep(0.5)


def do_once(folder: Path, is_done: Callable[[], bool], do: Callable[[], None]) -> bool:
    """Do a run under its folder's lock unless it is done; return whether there was something to do.

    Raises:
        InUseError: another process is at work on it.
    """
    if is_done():
        return False
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, patience=0.0):
        if is_done():
            return False
        do()
    return True
