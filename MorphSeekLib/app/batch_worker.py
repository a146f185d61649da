"""Register the pairs of a batch, one after another: a process of its own, or a task of a Dask worker.

As a process it reads a request a line from standard input and answers a line on standard output. It ends when standard
input does, so none outlives the process that started it, however that ended.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from ..io.files import write_atomically
from ..networks.devices import use_threads
from ..networks.loading import LoadedModel, load_model
from ..protocol.batch import BatchPair, BatchSettings
from ..protocol.errors import Cancelled, MorphSeekError
from ..protocol.job import SILENT, Job
from ..protocol.options import RegistrationOptions
from ..protocol.settings import from_dict, to_json
from ..protocol.settings_file import RegistrationSettings
from ..protocol.startup import AUTO, NO_MODEL, find, sha256
from ..protocol.version import __version__
from ..report.cohort import cohort_row, thumbnail
from .pair_files import PairFiles, register_files

_PATIENCE = 3.0  # seconds that a pair may take to end when nobody waits for it anymore
_one_pair = threading.Lock()


class Request(TypedDict):
    """A pair to be registered."""

    name: str
    files: dict[str, str]
    model: str
    options: dict[str, Any]
    nifti_form: str | None
    output: str
    device: str
    keep: list[str]


class Answer(TypedDict):
    """What became of it: the figures, or what is wrong."""

    figures: dict[str, Any]
    problem: str


class Probe(TypedDict):
    """What a worker says of itself before the first pair."""

    version: str
    model: str | None
    missing: list[str]


@functools.lru_cache(maxsize=2)
def loaded_once(name: str, device: str) -> LoadedModel:
    """Return a model, kept for the next pair."""
    return load_model(name, device)


def register_request(request: Request, job: Job = SILENT) -> Answer:
    """Register a pair; anything that is wrong with it becomes a sentence.

    Raises:
        Cancelled: the job was cancelled.
    """
    output = Path(request["output"])
    options = from_dict(RegistrationOptions, request["options"], "the options")
    try:
        with _one_pair:  # threads of a Dask worker share its model and its device
            files = PairFiles(request["files"], request["nifti_form"])
            settings = RegistrationSettings("", request["model"], options)
            report, result, fixed = register_files(
                files, settings, output, request["device"], job, loaded_once, request["keep"]
            )
            write_atomically(output / "thumbnail.jpg", thumbnail(fixed, result.warped))
    except MorphSeekError as error:
        return {"figures": {}, "problem": str(error)}
    except Cancelled:
        raise
    except Exception as error:  # one pair never stops the others
        return {"figures": {}, "problem": f"The registration failed ({type(error).__name__}: {error})."}
    finally:
        gc.collect()
    return {"figures": cohort_row(report), "problem": ""}


def probe(model: str, paths: list[str]) -> Probe:
    """Return this worker's version, the model's check sum here, and which of the paths it does not see."""
    try:
        found = None if model in (AUTO, NO_MODEL) else sha256(find(model))
    except MorphSeekError:
        found = ""
    return {"version": __version__, "model": found, "missing": [path for path in paths if not Path(path).exists()]}


def serve(threads: int) -> None:
    """Answer requests until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Windows Ctrl-C reaches all processes; the parent decides
    sink = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # a library's print goes to the log
    use_threads(threads)
    requests: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
    alone = threading.Event()

    def listen() -> None:
        with os.fdopen(os.dup(0), encoding="utf-8") as source:
            for line in source:
                requests.put(json.loads(line))
        alone.set()
        requests.put(None)
        timer = threading.Timer(_PATIENCE, os._exit, (1,))
        timer.daemon = True
        timer.start()

    threading.Thread(target=listen, daemon=True).start()
    job = Job(cancelled=alone.is_set)
    while (given := requests.get()) is not None:
        try:
            answer = register_request(Request(**given), job)  # type: ignore[typeddict-item]
            print(to_json(answer), file=sink, flush=True)
        except (Cancelled, BrokenPipeError):
            break
    os._exit(0)


def as_request(pair: BatchPair, settings: BatchSettings, output: Path, device: str, keep: list[str]) -> Request:
    """Return the request of a pair."""
    return {
        "name": pair.name,
        "files": dict(pair.files),
        "model": pair.settings.model,
        "options": json.loads(to_json(dataclasses.asdict(pair.settings.options))),
        "nifti_form": settings.nifti_form,
        "output": str(output / pair.name),
        "device": device,
        "keep": keep,
    }


if __name__ == "__main__":
    serve(int(sys.argv[1]))
