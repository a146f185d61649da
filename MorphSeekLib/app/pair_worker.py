"""Work on pairs, one after another: a process of its own, or a task of a Dask worker.

As a process it reads a request a line from standard input and answers a line on standard output. It ends when standard
input does, so none outlives the process that started it, however that ended.
"""

from __future__ import annotations

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

from ..data.datasets import Dataset, load_dataset, scored_pairs
from ..evaluation.evaluate import measure
from ..io.files import write_atomically
from ..networks.devices import gpu_turn, use_threads
from ..networks.loading import LoadedModel, load_model
from ..protocol.errors import Cancelled, MorphSeekError
from ..protocol.job import SILENT, Job
from ..protocol.options import RegistrationOptions
from ..protocol.settings import from_dict, to_json
from ..protocol.settings_file import RegistrationSettings
from ..protocol.startup import AUTO, NO_MODEL, find, sha256
from ..protocol.version import __version__
from ..registration.choice import chosen_model
from ..report.cohort import cohort_row, thumbnail
from .pair_files import Around, PairFiles, register_files

_PATIENCE = 3.0  # seconds that a pair may take to end when nobody waits for it anymore
_one_pair = threading.Lock()


class Files(TypedDict):
    """A pair of files, to be registered into a folder."""

    files: dict[str, str]
    nifti_form: str | None
    output: str
    keep: list[str]


class Scored(TypedDict):
    """A pair of a data set, to be registered and scored."""

    dataset: str
    split: str
    index: int


class Request(TypedDict):
    """A pair to be worked on, one of ``files`` and ``scored``; ``paths`` are what a worker must see."""

    name: str
    model: str
    options: dict[str, Any]
    device: str
    paths: list[str]
    files: Files | None
    scored: Scored | None


class Answer(TypedDict):
    """What became of it: the figures, or what is wrong."""

    figures: dict[str, Any]
    problem: str


class Probe(TypedDict):
    """What a worker says of itself before the first pair: its version, the check sums of the models, what it misses."""

    version: str
    models: dict[str, str | None]
    missing: list[str]


@functools.lru_cache(maxsize=2)
def loaded_once(name: str, device: str) -> LoadedModel:
    """Return a model, kept for the next pair."""
    return load_model(name, device)


@functools.lru_cache(maxsize=1)
def _dataset_once(path: str, changed: int) -> Dataset:
    """Return a data set, kept for the next pair unless its file was ``changed``."""
    return load_dataset(path)


def answer_request(request: Request, job: Job = SILENT) -> Answer:
    """Work on a pair; anything that is wrong with it becomes a sentence.

    Raises:
        Cancelled: the job was cancelled.
    """
    try:
        with _one_pair:  # threads of a Dask worker share its model and its device
            if (files := request["files"]) is not None:
                figures = _registered(request, files, job)
            elif (scored := request["scored"]) is not None:
                figures = _scored(request, scored, job)
    except MorphSeekError as error:
        return {"figures": {}, "problem": str(error)}
    except Cancelled:
        raise
    except Exception as error:  # one pair never stops the others
        return {"figures": {}, "problem": f"The registration failed ({type(error).__name__}: {error})."}
    finally:
        gc.collect()
    return {"figures": figures, "problem": ""}


def _registered(request: Request, given: Files, job: Job) -> dict[str, Any]:
    """Register a pair of files into its folder; return its row of cohort.csv."""
    output = Path(given["output"])
    options = from_dict(RegistrationOptions, request["options"], "the options")
    around = Around(load=loaded_once, turn=lambda where: gpu_turn(where, job))
    report, result, fixed = register_files(
        PairFiles(given["files"], given["nifti_form"]),
        RegistrationSettings("", request["model"], options),
        output,
        request["device"],
        job,
        given["keep"],
        around,
    )
    write_atomically(output / "thumbnail.jpg", thumbnail(fixed, result.warped))
    return cohort_row(report)


def _scored(request: Request, given: Scored, job: Job) -> dict[str, Any]:
    """Register a pair of a data set; return its row of an evaluation."""
    path = Path(given["dataset"])
    dataset = _dataset_once(str(path), path.stat().st_mtime_ns)
    pair = scored_pairs(dataset, given["split"])[given["index"]]
    options = from_dict(RegistrationOptions, request["options"], "the options")
    model, where, _ = chosen_model(request["model"], (), request["device"], job, loaded_once)
    with gpu_turn(where, job):
        return measure(pair, dataset, model, options, job, where)


def probe(models: list[str], paths: list[str]) -> Probe:
    """Return this worker's version, the models' check sums here, and which of the paths it does not see."""
    found: dict[str, str | None] = {}
    for model in models:
        try:
            found[model] = None if model in (AUTO, NO_MODEL) else sha256(find(model))
        except MorphSeekError:
            found[model] = ""
    return {"version": __version__, "models": found, "missing": [path for path in paths if not Path(path).exists()]}


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
            answer = answer_request(Request(**given), job)  # type: ignore[typeddict-item]
            print(to_json(answer), file=sink, flush=True)
        except (Cancelled, BrokenPipeError):
            break
    os._exit(0)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
