"""A training from cases to a model in one call.

The cases are checked, a run's folder is made beside the model, and what it says is trained
(:mod:`MorphSeekLib.app.runs`). The same call again resumes it.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from ..data.cases import check, find_cases
from ..data.datasets import Dataset
from ..io.files import write_atomically
from ..protocol.errors import MorphSeekError
from ..protocol.job import SILENT, Job
from ..protocol.options import TrainingOptions
from ..protocol.run_folder import SETTINGS, run_beside
from ..protocol.settings import from_dict, to_dict
from ..protocol.settings_file import read_values
from ..protocol.startup import check_device, check_model, check_output_file, check_readable
from .runs import run

_CHECK_SHARE = 0.02  # of the bar


def train(options: TrainingOptions, job: Job = SILENT) -> Path:
    """Train a model on a folder of cases, or resume what the same call began; return the model's file.

    Args:
        options: what to train; paths are relative to the working folder. Cases that cannot be used are left out, and
            without labels only the warm-up is done.
        job: told of everything, in fractions of the whole; cancelled, it keeps its folder, from which the same call or
            :func:`MorphSeekLib.app.runs.run` goes on.

    Raises:
        MorphSeekError: cases, options or files that cannot be used, or a folder beside the model that holds another
            training.
        Cancelled: it was stopped.
    """
    options = absolute(options)
    folder = run_beside(options.model)
    if (folder / SETTINGS).is_file():
        _check_same(folder, options)
        return run(folder, job)
    check_start(options)
    options = checked(options, job.part(0.0, _CHECK_SHARE))
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / SETTINGS, json.dumps(to_dict(options), indent=1).encode())
    return run(folder, job.part(_CHECK_SHARE, 1.0))


def absolute(options: TrainingOptions) -> TrainingOptions:
    """Return the same options, whose paths do not depend on the working folder."""
    init = options.init
    if init is not None and Path(init).is_file():
        init = str(Path(init).resolve())
    dataset, model = (str(Path(path).expanduser().resolve()) for path in (options.dataset, options.model))
    return dataclasses.replace(options, dataset=dataset, model=model, init=init)


def check_start(options: TrainingOptions) -> None:
    """Refuse a training that could not begin, before its cases are read.

    Raises:
        MorphSeekError: a path or a name that cannot be used, or files that are there already.
    """
    check_device(options.device)
    check_readable(options.dataset)
    if options.init is not None:
        check_model(options.init)
    check_output_file(options.model, ".safetensors", [options.dataset, options.init])
    folder = run_beside(options.model)
    for path in (Path(options.model), folder):
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise MorphSeekError(f"{path} is there already; choose another name for the model, or remove it.")


def checked(options: TrainingOptions, job: Job = SILENT) -> TrainingOptions:
    """Return the options with what a check of the cases says: which to leave out, the working grid, the stages.

    Raises:
        MorphSeekError: no training is possible, with the reasons.
        Cancelled: the user stopped it.
    """
    dataset = find_cases(options.dataset)
    labeled = _has_labels(dataset)
    report = check(dataset, labels=labeled, job=job)
    if report.problems:
        cases = [f"{case.name}: {case.problems[0]}" for case in report.cases if case.problems]
        raise MorphSeekError(" ".join([*report.problems, *cases[:3]]))
    return dataclasses.replace(
        options.suited(labeled),
        spacing=options.spacing or report.spacing or None,
        leave_out=tuple(sorted({*options.leave_out, *report.unusable})),
    )


def _has_labels(dataset: Dataset) -> bool:
    return any(case.label is not None for case in dataset.cases.get("training", []))


def _check_same(folder: Path, options: TrainingOptions) -> None:
    """Refuse to resume a training that was begun with other options.

    Raises:
        MorphSeekError: the first option that differs.
    """
    begun = from_dict(TrainingOptions, read_values(folder / SETTINGS), SETTINGS)
    same = dataclasses.replace(options, leave_out=begun.leave_out, spacing=options.spacing or begun.spacing)
    same = same.suited(begun.stages != ("warmup",))  # that stage alone: there were no labels
    for field in dataclasses.fields(TrainingOptions):
        old, new = getattr(begun, field.name), getattr(same, field.name)
        if old != new:
            raise MorphSeekError(
                f"{folder} holds a training that was begun with {field.name} {_text(old)}, not {_text(new)}; go on "
                f"with it (morphseek train {folder}), choose another name for the model, or remove the folder."
            )


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
