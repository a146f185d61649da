"""A training in a folder (:mod:`MorphSeekLib.protocol.run_folder`): `morphseek train FOLDER` does what run.json says.

The same command goes on after a stop or a crash.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data.cases import TEST, find_cases, hold_out
from ..data.datasets import Dataset
from ..evaluation.evaluate import DEFINITIONS, evaluate
from ..io.files import write_atomically
from ..networks import model_file as checkpoints
from ..networks.devices import pick_device
from ..networks.loading import load_model
from ..protocol.errors import Cancelled, MorphSeekError
from ..protocol.job import SILENT, Event, Job
from ..protocol.run_folder import SETTINGS, STATUS, STOP, Status, locked
from ..protocol.settings import override, to_dict, to_json
from ..protocol.startup import check_output_file, check_run, find
from ..training.finetuning import FinetuneConfig, finetune
from ..training.sac import SACConfig, train_spac
from ..training.warmup import TrainingConfig, warmup
from .settings_file import load

WARMUP, FINETUNE = "warmup", "finetune"
_TRIAL = 4  # iterations that are timed when the budget is given in minutes
_FEWEST = 10  # iterations that such a budget must allow
_STATUS_SECONDS = 0.5
_FIGURES = ("dice", "hd95", "folded_percent", "njd_percent", "sdlogj")


@dataclass(frozen=True)
class RunSettings:
    """run.json.

    Attributes:
        name: the model's, for its card.
        dataset: dataset.json or folder, see :func:`MorphSeekLib.data.cases.find_cases`; relative to the run's folder.
        model: where the finished checkpoint goes (.safetensors); relative to the run's folder.
        init: bundled name or file of the checkpoint to start from; None: from scratch.
        warmup, finetune: the settings of each stage; None leaves it out. With ``init`` the warm-up's model and
            preprocessing are that checkpoint's.
        minutes: how long each stage may take, about; None: as many iterations as its settings say.
        device: auto, cpu or cuda:N.
        leave_out: names of cases not to use.
    """

    name: str
    dataset: str
    model: str
    init: str | None = None
    warmup: TrainingConfig | None = None
    finetune: FinetuneConfig | None = None
    minutes: float | None = None
    device: str = "auto"
    leave_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.warmup is None and self.finetune is None:
            raise ValueError("there is neither a warmup nor a finetune stage")
        if self.warmup is None and self.init is None:
            raise ValueError("fine-tuning needs a checkpoint to start from (init) or a warmup stage before it")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError("minutes must be above 0")
        if not self.model.endswith(".safetensors"):
            raise ValueError("model must end with .safetensors")


def run(folder: Path | str, job: Job = SILENT) -> Path:
    """Train what a folder's run.json says, from where an earlier process stopped; returns the finished checkpoint.

    Args:
        folder: the run's.
        job: told of everything, in fractions of the whole run; cancelled, it stops as by the file "stop" in the folder.

    Raises:
        MorphSeekError: unusable settings or cases, a run that collapsed, or a folder that another process works in.
        Cancelled: it was stopped; the same call goes on.
    """
    folder = Path(folder).resolve()
    check_run(folder)
    stop = folder / STOP
    with locked(folder):
        stop.unlink(missing_ok=True)
        status, written = Status(message="Starting"), 0.0

        def tell(event: Event | None = None) -> None:
            nonlocal written
            if event is not None:
                status.fraction, status.message = event.fraction, event.message
                job.tell(event)
            if event is None or time.monotonic() - written > _STATUS_SECONDS:
                write_atomically(folder / STATUS, to_json(dataclasses.asdict(status), indent=1).encode())
                written = time.monotonic()

        tell()
        try:
            _run(folder, status, job.heard_by(tell).until(stop.exists))
        except Cancelled:
            status.state, status.message = "stopped", "Stopped; it can be resumed."
            raise
        except MorphSeekError as problem:
            status.state, status.message = "failed", str(problem)
            raise
        except Exception as problem:
            status.state = "failed"
            status.message = f"The training failed ({type(problem).__name__}: {problem}); its log.txt says where."
            raise
        else:
            status.state, status.fraction = "done", 1.0
            return Path(status.model)
        finally:
            tell()


def _run(folder: Path, status: Status, job: Job) -> None:
    settings = load(RunSettings, folder / SETTINGS)
    check_output_file(folder / settings.model)
    job.report("read", 0.0, "Looking through the cases")
    dataset = hold_out(find_cases(folder / settings.dataset), settings.leave_out)
    device = pick_device(settings.device)
    start = None if settings.init is None else find(_path(folder, settings.init))
    stages = [stage for stage in (WARMUP, FINETUNE) if getattr(settings, stage) is not None]
    labelled = all(c.label is not None for pair in dataset.pairs[TEST] for c in (pair.fixed, pair.moving))
    share = (0.9 if labelled else 1.0) / len(stages)  # of the whole, for each stage

    current = start
    for number, stage in enumerate(stages):
        status.stage = stage
        stage_job = job.part(number * share, (number + 1) * share)
        out = folder / f"{stage}.safetensors"
        if not out.is_file():
            config = _planned(folder, settings, stage, dataset, current, device, stage_job)
            train_stage(config, dataset, current, out, device, stage_job)
        if number == 0 and start is None and len(stages) == 2:
            start = out  # what GRPO starts from
        current = out

    status.stage = "evaluate"
    if labelled:
        figures = {}
        for number, (name, model) in enumerate((("start", start), ("result", current))):
            if model is not None and (name == "result" or model != current):
                begin, prefix = 0.9 + 0.05 * number, "Before: " if name == "start" else "After: "
                measuring = job.part(begin, begin + 0.05, prefix)
                figures[name] = _figures(folder / f"{name}.json", dataset, model, settings.device, measuring)
        status.held_out = _held_out(figures)
    model, card = checkpoints.load(current)
    card = dataclasses.replace(card, title=settings.name, results=card.results | {"held_out": status.held_out})
    checkpoints.save(folder / settings.model, model, card)
    status.model = str((folder / settings.model).resolve())
    job.report("write", 1.0, f"Wrote {status.model}")


def train_stage(
    config: TrainingConfig | FinetuneConfig | SACConfig,
    dataset: Dataset,
    init: Path | None,
    out: Path,
    device: torch.device | str,
    job: Job = SILENT,
) -> None:
    """The training that the settings are of, from a checkpoint or from scratch, or on from where it stopped.

    Raises:
        MorphSeekError, Cancelled: as that training.
    """
    common = {"out": out, "device": device, "job": job}
    if isinstance(config, SACConfig):
        train_spac(dataset, config, **common)
    else:
        train = warmup if isinstance(config, TrainingConfig) else finetune
        train(dataset, config, init=init, **common)


def _planned(
    folder: Path, settings: RunSettings, stage: str, dataset: Dataset, init: Path | None, device, job: Job
) -> TrainingConfig | FinetuneConfig:
    """The settings of a stage, decided once and kept in a file, so that a resumed run has the same."""
    path = folder / f"{stage}.json"
    config = getattr(settings, stage)
    if path.is_file():
        return load(type(config), path)
    if stage == WARMUP and init is not None:
        card = checkpoints.read_card(init)
        config = dataclasses.replace(config, model=card.model, preprocessing=card.preprocessing)
    if settings.minutes is not None:
        seconds = seconds_per_iteration(config, dataset, init, device, job)
        iterations, validate_every = planned_iterations(settings.minutes, *seconds)
        config = override(config, "training", iterations=iterations, validate_every=validate_every)
    write_atomically(path, json.dumps(to_dict(config), indent=1).encode())
    return config


def seconds_per_iteration(
    config: TrainingConfig | FinetuneConfig | SACConfig,
    dataset: Dataset,
    init: Path | None,
    device: torch.device | str,
    job: Job = SILENT,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[float, float]:
    """(seconds of an iteration, seconds of a validation): a few iterations are done and timed, their weights dropped.

    Args:
        clock: seconds by which it is timed.

    Raises:
        MorphSeekError, Cancelled: as the training.
    """
    times = [clock()]

    def watch(event: Event) -> None:
        if event.phase == "train":
            times.append(clock())
        job.report(event.phase, 0.0, "Measuring how long an iteration takes", event.step, event.steps)

    trial = override(config, "training", iterations=_TRIAL, validate_every=_TRIAL, save_every=10**9)
    if isinstance(trial, SACConfig):  # its first episodes only gather
        trial = override(trial, "training", explore=0)
    with tempfile.TemporaryDirectory(prefix="morphseek-trial-", ignore_cleanup_errors=True) as scratch:
        train_stage(trial, dataset, init, Path(scratch) / "trial.safetensors", device, job.heard_by(watch))
    waits = [after - before for before, after in itertools.pairwise(times)]
    iteration = statistics.median(waits[1:-1])  # the first one reads files, the last one validates
    return iteration, max(0.0, waits[-1] - iteration)


def planned_iterations(minutes: float, iteration: float, validation: float) -> tuple[int, int]:
    """(iterations, iterations between validations) that take so many minutes.

    The learning rate falls along the whole run, so its length must be known before it begins.

    Args:
        minutes: for all of it.
        iteration, validation: seconds of one, as :func:`seconds_per_iteration` measures them.

    Raises:
        MorphSeekError: the minutes are too short.
    """
    # at most ten validations, and at least one, in a fifth of the time
    validations = min(10, max(1, int(0.2 * 60 * minutes / max(validation, 1e-6))))
    iterations = int((60 * minutes - validations * validation) / iteration)
    if iterations < _FEWEST:
        least = (_FEWEST * iteration + validation) / 60
        raise MorphSeekError(
            f"{minutes:g} minutes are too short: {_FEWEST} iterations and a validation take {least:.1f} minutes here; "
            "give more time, or a coarser working grid."
        )
    return iterations, math.ceil(iterations / validations)


def _figures(out: Path, dataset: Dataset, model: Path, device: str, job: Job) -> dict[str, Any]:
    """The figures of a checkpoint on the held-out pairs; kept in a file, and read from there when resumed."""
    if not out.is_file():
        evaluate(dataset, TEST, load_model(str(model), device), out, job=job)
    return json.loads(out.read_text(encoding="utf-8"))


def _held_out(figures: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """For card and panel: the finished model's figures as `morphseek evaluate` gives them ("pairs", "mean",
    "definitions"), and in "start" the same means of what it was started from, where there was something."""
    result = figures["result"]
    found = {
        "pairs": len(result["pairs"]),
        "mean": {name: result["mean"][name] for name in (*_FIGURES, "dice_aligned")},
        "definitions": {k: v for k, v in DEFINITIONS.items() if k in _FIGURES},
    }
    if "start" in figures:
        found["start"] = {name: figures["start"]["mean"][name] for name in _FIGURES}
    return found


def _path(folder: Path, name: str) -> str:
    """A file beside the run where there is one of that name; else the name as it is."""
    return str(folder / name) if (folder / name).is_file() else name
