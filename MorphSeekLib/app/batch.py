"""Register many pairs, by local processes or a Dask cluster, into a folder that the same call goes on with."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..protocol import batch as folders
from ..protocol.batch import BatchPair, BatchSettings, Outcome
from ..protocol.errors import InUseError, MorphSeekError
from ..protocol.job import SILENT, Job
from ..protocol.journal import Journal, followed
from ..protocol.lock import try_lock
from ..protocol.settings import to_dict, to_json
from ..protocol.startup import check_output_folder
from ..protocol.version import __version__
from .crew import Crew
from .pair_worker import Request


@dataclass(frozen=True)
class BatchOptions:
    """Every choice of a batch but its pairs.

    Attributes:
        output: the folder of the batch.
        settings: what all pairs share.
        workers: local processes.
        threads: of each; None for an equal share of the processor.
        device: auto, cpu or cuda:N.
        retry: register those again that failed.
        strict: refuse the batch if any row has a problem.
        bids: the BIDS data set of the moving images, whose derivatives the results are named as.
    """

    output: Path
    settings: BatchSettings = field(default_factory=BatchSettings)
    workers: int = 1
    threads: int | None = None
    device: str = "auto"
    retry: bool = False
    strict: bool = False
    bids: Path | None = None


def batch(
    pairs: Iterable[Mapping[str, str]], options: BatchOptions, client: Any = None, job: Job = SILENT
) -> list[Outcome]:
    """Register pairs into a folder; the same call goes on where an earlier one was stopped.

    Args:
        pairs: rows with the columns of :data:`MorphSeekLib.protocol.batch.FILES`, name, model, and any option.
        options: all else.
        client: a dask.distributed.Client; None for local processes.
        job: told how many pairs are done.

    Returns:
        what became of each pair, in the order given. One bad pair never stops the others.

    Raises:
        MorphSeekError: nothing could begin: the folder is of other settings or in use, or with ``strict`` a row has a
            problem.
        Cancelled: the same call goes on.
    """
    from ..data.bids import name_derivatives
    from ..report.cohort import write_cohort
    from ..report.template import write_template

    crew = Crew(options.workers, options.threads, client)
    planned = folders.plan(pairs, options.settings)
    problems = [f"{pair.name}: {' '.join(pair.problems)}" for pair in planned if pair.problems]
    if not planned:
        raise MorphSeekError("The batch has no pairs; check the table.")
    if problems and options.strict:
        raise MorphSeekError("\n".join([f"{len(problems)} of {len(planned)} rows have problems:", *problems]))
    check_output_folder(options.output)
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    with (output / folders.LOCK).open("a+", encoding="utf-8") as lock:
        if not try_lock(lock):
            raise InUseError(f"Another process works on the batch in {output}; wait for it or stop it first.")
        _claim(output, options.settings)
        known = folders.read_outcomes(output)
        left = folders.waiting([p for p in planned if not p.problems], known, output, options.retry)
        bad = {p.name: Outcome(p.name, "failed", "", " ".join(p.problems)) for p in planned if p.problems}
        try:
            if left:
                _check_room(left, options)
                _run(left, options, crew, known, job)
        finally:
            found = [bad.get(pair.name) or known.get(pair.name) for pair in planned]
            outcomes = [outcome for outcome in found if outcome is not None]
            write_cohort(output, outcomes)
        if options.bids is not None:
            done = {outcome.name for outcome in outcomes if outcome.state == "done"}
            name_derivatives(output, options.bids, {pair.name: pair.files for pair in planned if pair.name in done})
        if words := write_template(output, outcomes, job):
            job.report("write", 1.0, words)
    return outcomes


def _check_room(left: Sequence[BatchPair], options: BatchOptions) -> None:
    """Refuse a batch whose results are larger than what the disk has left.

    Raises:
        MorphSeekError: how much is needed, and how much is there.
    """
    from ..io.images import voxel_count

    voxels: dict[str, int] = {}
    for pair in left:
        if pair.files["fixed"] not in voxels:
            voxels[pair.files["fixed"]] = voxel_count(pair.files["fixed"])
    needed = 0.0
    for pair in left:
        for name in options.settings.keep:
            if name != "trust" or pair.settings.options.trust == "on":
                each, rate = folders.ROOM[name]
                needed += each + rate * voxels[pair.files["fixed"]]
    free = shutil.disk_usage(options.output).free
    if needed > free:
        raise MorphSeekError(
            f"The results of {len(left)} pairs need about {needed / 1e9:.1f} GB, and {options.output} has "
            f"{free / 1e9:.1f} GB left; free some space, keep less with --keep, or choose another folder."
        )


def _claim(output: Path, settings: BatchSettings) -> None:
    """Write the settings into a fresh folder.

    Raises:
        MorphSeekError: the folder holds a batch of other settings.
    """
    from ..io.files import write_atomically

    path, wanted = output / folders.SETTINGS, to_dict(settings)
    if not path.is_file():
        write_atomically(path, to_json({"morphseek": __version__, **wanted}, indent=1).encode())
        return
    try:
        found = {k: v for k, v in json.loads(path.read_text(encoding="utf-8")).items() if k != "morphseek"}
    except (OSError, ValueError, AttributeError) as error:
        raise MorphSeekError(f"{path} cannot be read ({error}); choose another folder.") from error
    if changed := sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name)):
        raise MorphSeekError(
            f"{output} holds a batch of other settings ({', '.join(changed)}); choose another folder, or the same "
            "settings."
        )


def _run(left: Sequence[BatchPair], options: BatchOptions, crew: Crew, known: dict[str, Outcome], job: Job) -> None:
    """Register pairs and write down what becomes of each."""
    output = options.output.resolve()
    keys = {pair.name: pair.key() for pair in left}
    requests = [_request(pair, options, output) for pair in left]
    answers = crew.answers(requests, job)
    rows = Journal(output / folders.ROWS)
    for request, answer in followed(answers, len(left), job, lambda given: bool(given[1]["problem"])):
        name, problem = request["name"], answer["problem"]
        known[name] = Outcome(name, "failed" if problem else "done", keys[name], problem, answer["figures"])
        rows.add(dataclasses.asdict(known[name]))


def _request(pair: BatchPair, options: BatchOptions, output: Path) -> Request:
    """Return what a worker is asked for a pair."""
    settings = options.settings
    return {
        "name": pair.name,
        "model": pair.settings.model,
        "options": to_dict(pair.settings.options),
        "device": options.device,
        "paths": [str(output), *map(str, pair.inputs())],
        "scored": None,
        "files": {
            "files": dict(pair.files),
            "nifti_form": settings.nifti_form,
            "output": str(output / pair.name),
            "keep": [name for kept in settings.keep for name in folders.KEPT[kept]],
        },
    }
