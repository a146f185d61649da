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
from typing import Any, cast

import torch

from ..data.cases import TEST, VALIDATION, all_cases, choice_pairs, find_cases, hold_out
from ..data.datasets import Dataset
from ..evaluation.evaluate import Evaluation, evaluate
from ..io.files import write_atomically
from ..measures.scores import DELIVERED, definitions
from ..networks import model_file
from ..networks.devices import pick_device
from ..networks.loading import load_model
from ..networks.model_file import Card
from ..networks.policy import ModelSettings, RegistrationModel
from ..protocol.errors import Cancelled, MorphSeekError
from ..protocol.job import SILENT, Event, Job
from ..protocol.options import RegistrationOptions, TrainingOptions
from ..protocol.run_folder import EVALUATE, SETTINGS, STAGES, STATUS, STOP, HeldOut, Stage, Status, locked, parts
from ..protocol.settings import from_dict, override, to_dict, to_json
from ..protocol.settings_file import read_values
from ..protocol.startup import bundled, check_output_file, check_run, find
from ..registration.plans import SHARE
from ..space.preprocessing import Preprocessing
from ..training.finetuning import FinetuneConfig, finetune
from ..training.sac import SACConfig, train_spac
from ..training.segmentation import SegmentationConfig, suited, train_features
from ..training.warmup import TrainingConfig, warmup
from .settings_file import load

Config = TrainingConfig | FinetuneConfig | SegmentationConfig
Configs = dict[Stage, Config]
"""The settings of each stage of a run, in the order of the stages."""

_WARMUP_RATE = 3.0  # times the learning rate of the fine-tuning
_FINAL_RATE = 1 / 3  # times the learning rate of the fine-tuning
_SPACING = 1.5  # mm, of a run that says none, as nothing makes any more
_VALIDATIONS = 10  # of a stage
_SAVE_EVERY = 25  # iterations
_TRIAL = 4  # iterations that are timed when the budget is given in minutes
_FEWEST = 10  # iterations that such a budget must allow
_STATUS_SECONDS = 0.5
_FIT_PAIRS = 6  # pairs on which ways to an answer are compared
_AS_GOOD = 0.002  # of Dice; so few pairs do not tell less apart
_TABLES: tuple[Stage, ...] = ("warmup", "finetune", "final")  # of a run.json of MorphSeek 0.1
_CHOICE = "with_fit"  # of a card's results, what came out
_ALONE: dict[str, Any] = {"compare": "intensities", "share": 1.0}  # of a network, without its finder
_ANSWERS: dict[str, dict[str, tuple[RegistrationOptions, dict[str, Any]]]] = {
    "steps": {
        "steps": (RegistrationOptions(search="off", fit="off"), {"fit": False, **_ALONE}),
        "fitted": (RegistrationOptions(search="off", fit="on"), {"fit": True, **_ALONE}),
    },
    "mean": {
        "mean": (RegistrationOptions(search="off"), {"fit": True, "compare": "features", "share": SHARE}),
    },
    "features": {
        "features": (RegistrationOptions(search="off", fit="on"), {"search": False, "compare": "features"}),
        "searched_features": (RegistrationOptions(search="on", fit="on"), {"search": True, "compare": "features"}),
        "both": (RegistrationOptions(search="off", fit="on"), {"search": False, "compare": "both"}),
        "searched_both": (RegistrationOptions(search="on", fit="on"), {"search": True, "compare": "both"}),
        "intensities": (RegistrationOptions(fit="on"), {"search": True, "compare": "intensities"}),
    },
}
"""Ways to an answer by what a model knows: how it is asked for, and what the card says of it then."""
_TITLES = {
    "features": "Features",
    "warmup": "Warm-up",
    "finetune": "Fine-tuning",
    EVALUATE: "Figures",
    "final": "All cases",
}
_BEFORE_FINAL = "held-out pairs, measured before the last stage of the training, which has seen their cases too"
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
        teller = _Teller(folder, job)
        status = teller.status
        teller.write()
        try:
            _run(folder, teller, job.heard_by(teller.tell).until(stop.exists))
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
            teller.write()


class _Teller:
    """Writes status.json, and passes on what happens, with the stage and the time left of all."""

    def __init__(self, folder: Path, job: Job) -> None:
        self.folder, self.job, self.status = folder, job, Status(message="Starting")
        self.minutes: float | None = None
        self._written = 0.0

    def tell(self, event: Event) -> None:
        """Pass on an event, and write the status if that is due."""
        message = event.message
        if self.minutes is not None and event.phase == "train" and event.fraction < 1:
            left = max(1, round(self.minutes * (1 - event.fraction)))
            message += f" (about {left} min to the end of the training)"
        self.status.fraction, self.status.message = event.fraction, message
        title = _TITLES.get(self.status.stage)
        self.job.tell(dataclasses.replace(event, message=f"{title}: {message}" if title else message))
        if time.monotonic() - self._written > _STATUS_SECONDS:
            self.write()

    def write(self) -> None:
        """Write the status as it is."""
        write_atomically(self.folder / STATUS, to_json(dataclasses.asdict(self.status), indent=1).encode())
        self._written = time.monotonic()


def read_run(path: Path) -> tuple[TrainingOptions, Configs]:
    """Return what a run.json asks for, and the settings of its stages.

    A run.json of MorphSeek 0.1 holds no choices but the settings of each stage as tables, which still count.

    Raises:
        MorphSeekError: a file that cannot be read, an unknown key or an unusable value.
    """
    values = read_values(path)
    tables = {stage: values.pop(stage) for stage in _TABLES if isinstance(values, dict) and stage in values}
    if not tables:
        options = from_dict(TrainingOptions, values, path.name).suited(labeled=True)
        return options, stage_settings(options)
    given = {stage: table for stage, table in tables.items() if table is not None}
    if not given:
        raise MorphSeekError(f"{path.name}: there is neither a warmup nor a finetune stage.")
    options = from_dict(TrainingOptions, {"minutes": None, **values, "stages": list(given)}, path.name)
    kinds: dict[Stage, type] = {"warmup": TrainingConfig}
    return options, {
        stage: from_dict(kinds.get(stage, FinetuneConfig), table, f"{path.name}.{stage}")
        for stage, table in given.items()
    }


def stage_settings(options: TrainingOptions) -> Configs:
    """Return the settings of each stage that a run's choices come to.

    Raises:
        MorphSeekError: a value that a stage refuses.
    """
    if "features" in options.stages:
        return {stage: _features_settings(options, stage) for stage in STAGES if stage in options.stages}
    config: TrainingConfig | FinetuneConfig
    configs: Configs = {}
    for stage in (stage for stage in STAGES if stage in options.stages):
        if stage == "warmup":
            network, preprocessing = fresh_network(options.backbone), fresh_grid(options)
            config = TrainingConfig(model=network, preprocessing=preprocessing)
            rate, smoothness = _WARMUP_RATE * options.learning_rate, options.smoothness
        else:
            config = FinetuneConfig()
            config = override(config, "policy", trajectories=options.trajectories, weight=options.policy)
            weights = {"dice": options.reward_dice, "folding": options.reward_folding}
            config = override(config, "reward", weights=weights)
            config = override(config, "loss", dice=options.dice, features=options.features)
            config = override(config, "training", kl_target=options.kl_target, augmentation=options.augmentation)
            rate, smoothness = options.learning_rate, options.finetune_smoothness
            if stage == "final":
                rate *= _FINAL_RATE
        loss = {"similarity": options.similarity, "regularization": smoothness, "folding": options.folding}
        config = override(config, "loss", **loss)
        configs[stage] = override(config, "training", steps=options.steps, **_course(options, rate))
    return configs


def _features_settings(options: TrainingOptions, stage: Stage) -> SegmentationConfig:
    """Return the settings of features, or of the last stage, in which they go on with all cases."""
    config = SegmentationConfig(preprocessing=dataclasses.replace(fresh_grid(options), low=0.0))
    rate = config.training.learning_rate * (_FINAL_RATE if stage == "final" else 1.0)
    return override(config, "training", **_course(options, rate))


def _course(options: TrainingOptions, rate: float) -> dict[str, float]:
    """Return what the runs of all stages have in common."""
    return {
        "iterations": options.iterations,
        "learning_rate": rate,
        "seed": options.seed,
        "validate_every": max(1, options.iterations // _VALIDATIONS),
        "save_every": _SAVE_EVERY,
    }


def fresh_network(backbone: str) -> ModelSettings:
    """Return the settings of a network that is trained from scratch: its recipe's where it has one, else its own."""
    recipe = bundled("recipe").get(f"scratch-{backbone}")
    return ModelSettings(backbone) if recipe is None else load(TrainingConfig, recipe).model


def fresh_grid(options: TrainingOptions) -> Preprocessing:
    """Return how images are fed to a network that is trained from scratch."""
    return Preprocessing(spacing=(options.spacing or _SPACING,) * 3, align="center")


def _run(folder: Path, teller: _Teller, job: Job) -> None:
    status, (options, configs) = teller.status, read_run(folder / SETTINGS)
    teller.minutes = options.minutes
    check_output_file(folder / options.model)
    job.report("read", 0.0, "Looking through the cases")
    found = find_cases(folder / options.dataset)
    dataset = hold_out(found, options.leave_out)
    device = pick_device(options.device)
    start = None if options.init is None else find(_path(folder, options.init))
    labeled = all(c.label is not None for pair in dataset.pairs[TEST] for c in (pair.fixed, pair.moving))
    measured, current = None, start
    for part, (begin, end) in parts(configs, labeled).items():
        status.stage, part_job = part, job.part(begin, end)
        if part == EVALUATE:
            assert current is not None  # every run trains something before
            status.held_out = _measure(folder, dataset, (start, current), options.device, part_job)
            measured = model_file.read_card(current)
            continue
        stage = cast("Stage", part)
        if current is None and stage == "finetune":
            current = _fresh(folder / "fresh.safetensors", options)
        cases = all_cases(found, options.leave_out) if stage == "final" else dataset
        out = folder / f"{stage}.safetensors"
        if not out.is_file():
            minutes = None if options.minutes is None else options.minutes * (end - begin)
            plan = folder / f"{stage}.json"
            planned = _planned(plan, configs[stage], minutes, cases, current, device, part_job)
            train_stage(planned, cases, current, out, device, part_job)
        if stage == "warmup" and start is None and "finetune" in configs:
            start = out  # what the fine-tuning is compared with
        current = out

    assert current is not None
    network, card = model_file.load(current)
    if measured is not None:  # the choice is of cases that the last stage may have trained on
        kept = {name: measured.results[name] for name in (_CHOICE,) if name in measured.results}
        chosen = {name: getattr(measured, name) for name in ("search", "fit", "compare", "share")}
        card = dataclasses.replace(card, **chosen, results=card.results | kept)
    if "final" in configs and status.held_out:
        status.held_out["definitions"] = status.held_out["definitions"] | {"pairs": _BEFORE_FINAL}
    card = dataclasses.replace(card, title=options.name, results=card.results | {"held_out": status.held_out})
    model_file.save(folder / options.model, network, card)
    status.model = str((folder / options.model).resolve())
    job.report("write", 1.0, f"Wrote {status.model}")


def _fresh(path: Path, options: TrainingOptions) -> Path:
    """Write a network that was not trained yet, for a fine-tuning from scratch; return its file."""
    if not path.is_file():
        torch.manual_seed(options.seed)
        card = Card(f"{options.backbone}, not trained", preprocessing=fresh_grid(options))
        model_file.save(path, RegistrationModel(fresh_network(options.backbone)), card)
    return path


def train_stage(
    config: Config | SACConfig,
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
    elif isinstance(config, SegmentationConfig):
        train_features(dataset, config, out, device=device, init=init, job=job)
    elif isinstance(config, TrainingConfig):
        warmup(dataset, config, out, device=device, init=init, job=job)
    elif init is None:
        raise MorphSeekError("Fine-tuning needs a model to start from.")
    else:
        finetune(dataset, config, init, out, device=device, job=job)


def _planned(
    path: Path,
    config: Config,
    minutes: float | None,
    dataset: Dataset,
    init: Path | None,
    device: torch.device,
    job: Job,
) -> Config:
    """Return the settings of a stage, decided once and kept in a file, so that a resumed run has the same."""
    if path.is_file():
        return load(type(config), path)
    if isinstance(config, TrainingConfig) and init is not None:
        card = model_file.read_card(init)
        config = dataclasses.replace(config, model=card.model, preprocessing=card.preprocessing)
    if isinstance(config, FinetuneConfig) and init is not None and config.loss.features > 0:
        network, _ = model_file.load(init)
        if network.with_features(2) is None:
            config = override(config, "loss", features=0.0)
    if isinstance(config, SegmentationConfig):
        config = suited(config, dataset, init)
    if minutes is not None and isinstance(config, SegmentationConfig):
        config = override(config, "training", minutes=minutes)
    elif minutes is not None:
        began = time.monotonic()
        seconds = seconds_per_iteration(config, dataset, init, device, job)
        left = max(minutes - (time.monotonic() - began) / 60, 0.5 * minutes)
        if path.stem == "final":  # no reason to lose what was trained before
            left = max(left, 1.001 * fewest_minutes(*seconds))
        iterations, validate_every = planned_iterations(left, *seconds)
        config = override(config, "training", iterations=iterations, validate_every=validate_every)
    write_atomically(path, json.dumps(to_dict(config), indent=1).encode())
    return config


def seconds_per_iteration(
    config: Config | SACConfig,
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


def fewest_minutes(iteration: float, validation: float) -> float:
    """Return the minutes that a stage must have, from the seconds of an iteration and of a validation."""
    return (_FEWEST * iteration / 0.8 + validation) / 60  # validations may take a fifth


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
        least = fewest_minutes(iteration, validation)
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


def _measure(folder: Path, dataset: Dataset, models: tuple[Path | None, Path], device: str, job: Job) -> HeldOut:
    """Choose the answer of the second model, and return the figures of both on the held-out pairs."""
    start, current = models
    choose_answer(folder, dataset, current, device, job.part(0.0, 0.0, "Choosing the answer: "))
    figures = {}
    for number, (name, model) in enumerate((("start", start), ("result", current))):
        if model is not None and (name == "result" or model != current):
            prefix = "Before: " if name == "start" else "After: "
            measuring = job.part(0.5 * number, 0.5 * (number + 1), prefix)
            figures[name] = _figures(folder / f"{name}.json", dataset, model, device, measuring)
    return _held_out(figures)


def choose_answer(folder: Path, dataset: Dataset, model: Path, device: str, job: Job) -> None:
    """Write on a model's card what it does when nothing is asked for: what came to the best mean Dice on pairs of cases
    that it was not trained on, or nearly so and smoother.

    A network's steps may be better with a fit after them, or without: one without labels can undo what labels have
    taught. Features may be better with a search before the fit, with the intensities beside them, or without them.
    """
    pairs = choice_pairs(dataset)[:_FIT_PAIRS]
    if not pairs:
        return
    few, card = dataclasses.replace(dataset, pairs={VALIDATION: pairs}), model_file.read_card(model)
    dice: dict[str, float] = {}
    roughness: dict[str, float] = {}
    for name, (options, said) in (answers := _answers(card)).items():
        out = folder / f"validation-{name}.json"
        if not out.is_file():
            loaded = load_model(str(model), device)
            loaded = dataclasses.replace(loaded, card=dataclasses.replace(card, **said))
            evaluate(few, VALIDATION, loaded, out, options, job)
        mean = json.loads(out.read_text(encoding="utf-8"))["mean"]
        dice[name], roughness[name] = mean["dice"] or 0.0, mean["sdlogj"]
    best = smoothest_of_the_best(dice, roughness)
    found = {
        "pairs": len(pairs),
        **{f"dice_{name}": value for name, value in dice.items()},
        "definition": "mean Dice of pairs of cases not trained on, by each way to an answer: by the steps alone and "
        "with a fit after them, or by a fit of features, and of features and intensities, both without and with a "
        "search before it, and of intensities; the best is done when nothing is asked for, or one as good and smoother",
    }
    better = dataclasses.replace(card, **answers[best][1], results=card.results | {_CHOICE: found})
    if better != card:
        model_file.rewrite_card(model, better)


def smoothest_of_the_best(dice: dict[str, float], roughness: dict[str, float]) -> str:
    """Return the answer with the lowest SDlogJ among those whose Dice is the highest, or less by 0.002 at most."""
    most = max(dice.values())
    return min((name for name in dice if dice[name] >= most - _AS_GOOD), key=lambda name: roughness[name])


def _answers(card: model_file.Card) -> dict[str, tuple[RegistrationOptions, dict[str, Any]]]:
    """Return the ways to an answer that a model has."""
    if card.model.backbone == "segmenter":
        return _ANSWERS["features"]
    return _ANSWERS["steps"] | (_ANSWERS["mean"] if card.model.finder is not None else {})


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
