"""A training in a folder (:mod:`MorphSeekLib.protocol.run_folder`): `morphseek train FOLDER` does what run.json says.

The same command resumes after a stop or a crash.
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
from pathlib import Path

import torch

from ..data.cases import TEST, VALIDATION, find_cases, hold_out
from ..data.datasets import Dataset
from ..evaluation.evaluate import Evaluation, evaluate
from ..io.files import write_atomically
from ..measures.scores import DELIVERED, definitions
from ..networks import model_file
from ..networks.devices import pick_device
from ..networks.loading import load_model
from ..networks.policy import ModelSettings
from ..protocol.errors import Cancelled, MorphSeekError
from ..protocol.job import SILENT, Event, Job
from ..protocol.options import RegistrationOptions, Switch, TrainingOptions
from ..protocol.run_folder import SETTINGS, STAGES, STATUS, STOP, HeldOut, Stage, Status, locked
from ..protocol.settings import from_dict, override, to_dict, to_json
from ..protocol.settings_file import read_values
from ..protocol.startup import bundled, check_output_file, check_run, find
from ..space.preprocessing import Preprocessing
from ..training.finetuning import FinetuneConfig, finetune
from ..training.sac import SACConfig, train_spac
from ..training.warmup import TrainingConfig, warmup
from .settings_file import load

Configs = dict[Stage, TrainingConfig | FinetuneConfig]
"""The settings of each stage of a run, in the order of the stages."""

_WARMUP_RATE = 3.0  # times the learning rate of the fine-tuning
_VALIDATIONS = 10  # of a stage
_SAVE_EVERY = 25  # iterations
_TRIAL = 4  # iterations that are timed when the budget is given in minutes
_FEWEST = 10  # iterations that such a budget must allow
_STATUS_SECONDS = 0.5
_FIT_PAIRS = 6  # validation pairs on which the steps are compared with and without a fit
_FIGURES = ("dice", "hd95", "folded_percent", "njd_percent", "sdlogj")


def run(folder: Path | str, job: Job = SILENT) -> Path:
    """Train what a folder's run.json says, from where an earlier process stopped; return the finished model.

    Args:
        folder: the run's.
        job: told of everything, in fractions of the whole run; cancelled, it stops as by the file "stop" in the folder.

    Raises:
        MorphSeekError: unusable settings or cases, a run that collapsed, or a folder that another process works in.
        Cancelled: it was stopped; the same call resumes it.
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


def read_run(path: Path) -> tuple[TrainingOptions, Configs]:
    """Return what a run.json asks for, and the settings of its stages.

    A run.json of MorphSeek 0.1 holds no choices but the settings of each stage as tables, which still count.

    Raises:
        MorphSeekError: a file that cannot be read, an unknown key or an unusable value.
    """
    values = read_values(path)
    tables = {stage: values.pop(stage) for stage in STAGES if isinstance(values, dict) and stage in values}
    if not tables:
        options = from_dict(TrainingOptions, values, path.name)
        return options, stage_settings(options)
    given = {stage: table for stage, table in tables.items() if table is not None}
    options = from_dict(TrainingOptions, {"minutes": None, **values, "stages": list(given)}, path.name)
    kinds: dict[Stage, type] = {"warmup": TrainingConfig, "finetune": FinetuneConfig}
    return options, {stage: from_dict(kinds[stage], table, f"{path.name}.{stage}") for stage, table in given.items()}


def stage_settings(options: TrainingOptions) -> Configs:
    """Return the settings of each stage that a run's choices come to.

    Raises:
        MorphSeekError: a value that a stage refuses.
    """
    config: TrainingConfig | FinetuneConfig
    configs: Configs = {}
    for stage in (stage for stage in STAGES if stage in options.stages):
        if stage == "warmup":
            preprocessing = Preprocessing(spacing=(options.spacing,) * 3, align="center")
            config = TrainingConfig(model=fresh_network(options.backbone), preprocessing=preprocessing)
            rate, smoothness = _WARMUP_RATE * options.learning_rate, options.smoothness
        else:
            config = FinetuneConfig()
            config = override(config, "policy", trajectories=options.trajectories, weight=options.policy)
            weights = {"dice": options.reward_dice, "folding": options.reward_folding}
            config = override(config, "reward", weights=weights)
            config = override(config, "loss", dice=options.dice)
            config = override(config, "training", kl_target=options.kl_target)
            rate, smoothness = options.learning_rate, options.finetune_smoothness
        loss = {"similarity": options.similarity, "regularization": smoothness, "folding": options.folding}
        config = override(config, "loss", **loss)
        configs[stage] = override(
            config,
            "training",
            iterations=options.iterations,
            learning_rate=rate,
            steps=options.steps,
            seed=options.seed,
            validate_every=max(1, options.iterations // _VALIDATIONS),
            save_every=_SAVE_EVERY,
        )
    return configs


def fresh_network(backbone: str) -> ModelSettings:
    """Return the settings of a network that is trained from scratch: its recipe's where it has one, else its own."""
    recipe = bundled("recipe").get(f"scratch-{backbone}")
    return ModelSettings(backbone) if recipe is None else load(TrainingConfig, recipe).model


def _run(folder: Path, status: Status, job: Job) -> None:
    options, configs = read_run(folder / SETTINGS)
    check_output_file(folder / options.model)
    job.report("read", 0.0, "Looking through the cases")
    dataset = hold_out(find_cases(folder / options.dataset), options.leave_out)
    device = pick_device(options.device)
    start = None if options.init is None else find(_path(folder, options.init))
    labeled = all(c.label is not None for pair in dataset.pairs[TEST] for c in (pair.fixed, pair.moving))
    share = (0.9 if labeled else 1.0) / len(configs)  # of the whole, for each stage

    current = start
    for number, (stage, config) in enumerate(configs.items()):
        status.stage = stage
        stage_job = job.part(number * share, (number + 1) * share)
        out = folder / f"{stage}.safetensors"
        if not out.is_file():
            plan = folder / f"{stage}.json"
            planned = _planned(plan, config, options.minutes, dataset, current, device, stage_job)
            train_stage(planned, dataset, current, out, device, stage_job)
        if number == 0 and start is None and len(configs) == 2:
            start = out  # what GRPO starts from
        current = out

    status.stage = "evaluate"
    if labeled:
        assert current is not None  # a run has at least one stage
        _choose_fit(folder, dataset, current, options.device, job.part(0.9, 0.9, "With or without a fit: "))
        figures = {}
        for number, (name, model) in enumerate((("start", start), ("result", current))):
            if model is not None and (name == "result" or model != current):
                begin, prefix = 0.9 + 0.05 * number, "Before: " if name == "start" else "After: "
                measuring = job.part(begin, begin + 0.05, prefix)
                figures[name] = _figures(folder / f"{name}.json", dataset, model, options.device, measuring)
        status.held_out = _held_out(figures)
    network, card = model_file.load(out)
    card = dataclasses.replace(card, title=options.name, results=card.results | {"held_out": status.held_out})
    model_file.save(folder / options.model, network, card)
    status.model = str((folder / options.model).resolve())
    job.report("write", 1.0, f"Wrote {status.model}")


def train_stage(
    config: TrainingConfig | FinetuneConfig | SACConfig,
    dataset: Dataset,
    init: Path | None,
    out: Path,
    device: torch.device | str,
    job: Job = SILENT,
) -> None:
    """Run the training that the settings are of, from a model or from scratch, or resume it.

    Raises:
        MorphSeekError, Cancelled: as that training.
    """
    if isinstance(config, SACConfig):
        train_spac(dataset, config, out, device=device, job=job)
    elif isinstance(config, TrainingConfig):
        warmup(dataset, config, out, device=device, init=init, job=job)
    elif init is None:
        raise MorphSeekError("Fine-tuning needs a model to start from.")
    else:
        finetune(dataset, config, init, out, device=device, job=job)


def _planned(
    path: Path,
    config: TrainingConfig | FinetuneConfig,
    minutes: float | None,
    dataset: Dataset,
    init: Path | None,
    device: torch.device,
    job: Job,
) -> TrainingConfig | FinetuneConfig:
    """Return the settings of a stage, decided once and kept in a file, so that a resumed run has the same."""
    if path.is_file():
        return load(type(config), path)
    if isinstance(config, TrainingConfig) and init is not None:
        card = model_file.read_card(init)
        config = dataclasses.replace(config, model=card.model, preprocessing=card.preprocessing)
    if minutes is not None:
        seconds = seconds_per_iteration(config, dataset, init, device, job)
        iterations, validate_every = planned_iterations(minutes, *seconds)
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
    """Return (seconds of an iteration, seconds of a validation): a few iterations are done and timed, their weights
    dropped.

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
    """Return (iterations, iterations between validations) that take the given minutes.

    The learning rate falls along the whole run, so its length must be known before it begins.

    Args:
        minutes: for all of it.
        iteration, validation: seconds of one, as :func:`seconds_per_iteration` measures them.

    Raises:
        MorphSeekError: the minutes are too short.
    """
    # at most ten validations, and at least one, in a fifth of the time
    validations = min(_VALIDATIONS, max(1, int(0.2 * 60 * minutes / max(validation, 1e-6))))
    iterations = int((60 * minutes - validations * validation) / iteration)
    if iterations < _FEWEST:
        least = (_FEWEST * iteration + validation) / 60
        raise MorphSeekError(
            f"{minutes:g} minutes are too short: {_FEWEST} iterations and a validation take {least:.1f} minutes here; "
            "give more time, or a coarser working grid."
        )
    return iterations, math.ceil(iterations / validations)


def _figures(out: Path, dataset: Dataset, model: Path, device: str, job: Job) -> Evaluation:
    """Return the figures of a model on the held-out pairs; kept in a file, and read from there when resumed."""
    if not out.is_file():
        evaluate(dataset, TEST, load_model(str(model), device), out, job=job)
    found: Evaluation = json.loads(out.read_text(encoding="utf-8"))
    return found


def _choose_fit(folder: Path, dataset: Dataset, model: Path, device: str, job: Job) -> None:
    """Write on a model's card whether its steps are better with a fit after them, by the Dice of validation pairs; a
    fit without labels can undo what labels have taught."""
    pairs = [pair for pair in dataset.pairs[VALIDATION] if pair.fixed.label and pair.moving.label][:_FIT_PAIRS]
    if not pairs:
        return
    few, dice = dataclasses.replace(dataset, pairs={VALIDATION: pairs}), {}
    choices: tuple[Switch, Switch] = ("off", "on")
    for fit in choices:
        out = folder / f"validation-fit-{fit}.json"
        if not out.is_file():
            options = RegistrationOptions(search="off", fit=fit)
            evaluate(few, VALIDATION, load_model(str(model), device), out, options, job)
        dice[fit] = json.loads(out.read_text(encoding="utf-8"))["mean"]["dice"]
    found = {
        "pairs": len(pairs),
        "dice_steps": dice["off"],
        "dice_fitted": dice["on"],
        "definition": "mean Dice of validation pairs by the steps alone, and with a fit after them; the better is done "
        "when nothing is asked for",
    }
    card = model_file.read_card(model)
    better = dataclasses.replace(card, fit=dice["on"] > dice["off"], results=card.results | {"with_fit": found})
    if better != card:
        model_file.rewrite_card(model, better)


def _held_out(figures: dict[str, Evaluation]) -> HeldOut:
    """Return, for card and panel, the finished model's figures as `morphseek evaluate` gives them ("pairs", "mean",
    "definitions"), and in "start" the same means of what it was started from, where there was something."""
    result = figures["result"]
    found: HeldOut = {
        "pairs": len(result["pairs"]),
        "mean": {name: result["mean"][name] for name in (*_FIGURES, "dice_aligned")},
        "definitions": definitions(DELIVERED, _FIGURES),
    }
    if "start" in figures:
        found["start"] = {name: figures["start"]["mean"][name] for name in _FIGURES}
    return found


def _path(folder: Path, name: str) -> str:
    """Return a file beside the run where there is one of that name; else the name as it is."""
    return str(folder / name) if (folder / name).is_file() else name
