"""The paper's main table: arms trained on one budget and measured on the same pairs, run by run.

A run is TASK/METHOD/ARM: a task is a data set with its working grid, a method a network or "classical", an arm a way to
train the network or one of the classical methods. Every run has a folder of its own:

| file in OUT/runs/TASK/METHOD/ARM | what it is |
|---|---|
| plan.json | the settings as they are used, with the number of iterations that the budget allows here |
| model.safetensors | the trained weights, with .jsonl (curves), .log (TensorBoard), .state (to resume from) |
| training.json | how they were trained, parameters, processor seconds; the training is done |
| result.json | figures of every test pair; the run is done |
| lock | held by the process at work |

A run that is done is not done again, so the same command resumes; two processes on the same OUT share the runs. The
report (:mod:`.table`) is written anew after every run.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from MorphSeekLib.app.runs import seconds_per_iteration, train_stage
from MorphSeekLib.app.settings_file import load
from MorphSeekLib.backbones.spac import SPACSettings
from MorphSeekLib.data.datasets import Dataset, load_dataset
from MorphSeekLib.io.files import write_atomically
from MorphSeekLib.io.images import read_image
from MorphSeekLib.networks.devices import pick_device
from MorphSeekLib.networks.loading import load_model
from MorphSeekLib.networks.model_file import read_card, sha256, software
from MorphSeekLib.networks.policy import ModelSettings
from MorphSeekLib.protocol.errors import MorphSeekError
from MorphSeekLib.protocol.job import SILENT, Job
from MorphSeekLib.protocol.options import RegistrationOptions, Switch
from MorphSeekLib.protocol.settings import from_dict, override, to_dict, to_json
from MorphSeekLib.protocol.startup import find
from MorphSeekLib.registration.alignment import align
from MorphSeekLib.registration.pipeline import register
from MorphSeekLib.registration.result import Registration
from MorphSeekLib.report.page import RegistrationPictures, draw_sheets
from MorphSeekLib.space.geometry import Transform, Volume
from MorphSeekLib.space.preprocessing import Preprocessing, working_grid
from MorphSeekLib.training.finetuning import FinetuneConfig
from MorphSeekLib.training.run_state import state_file
from MorphSeekLib.training.sac import SACConfig
from MorphSeekLib.training.warmup import TrainingConfig

from .classical import CLASSICAL
from .published import PUBLISHED
from .runner import do_all, do_once
from .scoring import ROW, Method, measure
from .table import write_report

TEST = "registration_test"
ALIGNMENTS = ("none", "affine")
FEWEST = 10
"""Iterations that a budget must allow."""
CLAIMED, CLAIMED_NETWORKS = (
    ("warm-up", "soft-dice", "early", "soft-dice-3", "morphseek", "paper"),
    ("voxelmorph", "transmorph"),
)
"""Arms and networks of "claims": one step with labels, three without a policy, and both forms of MorphSeek."""
CLAIMED_MINUTES = 40.0
"""Of the arm "soft-dice" there; the others have as many more as it. Not run yet: 24 hours of one core for each seed."""

Config = TrainingConfig | FinetuneConfig | SACConfig

SETTINGS = Path(__file__).resolve().parents[1] / "settings"
"""A TOML file for each benchmark."""


@dataclass(frozen=True)
class Task:
    """A data set and how it is worked on.

    Attributes:
        title: for the table.
        data: dataset.json, relative to the data's root; with ``layout`` the root of the original download.
        layout: a key of :data:`.published.PUBLISHED`, or "" for a dataset.json.
        preprocessing: of every network. Where its ``align`` is "none", greedy and SyN take the images as they lie, too;
            else they find an affine transform of their own first.
        similarity: of the losses: "lncc", "mse" or "mind".
        centered: put the middles of two images together in training.
        multimodal: whether the classical methods must compare two modalities.
    """

    title: str
    data: str
    layout: str = ""
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    similarity: str = "lncc"
    centered: bool = False
    multimodal: bool = False


@dataclass(frozen=True)
class Arm:
    """A way to make a model, or to use one.

    Attributes:
        title: for the table.
        start: the arm whose weights it starts from; "" for fresh ones.
        baseline: the arm of the same network that it is compared with; "" for none.
        minutes: of training.
        warmup, finetune, spac: the training's settings, one of them; the task's and the network's come over them.
        fit: fit every pair, from the steps of the start's model on; nothing is trained. The task says by which
            similarity.
        checkpoint: a bundled model or a .safetensors file to take as it is; nothing is trained.
    """

    title: str
    start: str = ""
    baseline: str = ""
    minutes: float = 0.0
    warmup: TrainingConfig | None = None
    finetune: FinetuneConfig | None = None
    spac: SACConfig | None = None
    fit: bool = False
    checkpoint: str = ""

    def __post_init__(self) -> None:
        trains = sum(config is not None for config in (self.warmup, self.finetune, self.spac))
        if trains + self.fit + (self.checkpoint != "") != 1:
            raise ValueError("an arm needs one of warmup, finetune, spac, fit and checkpoint")
        if (self.minutes > 0) != (trains > 0):
            raise ValueError("an arm that trains needs minutes, another must have none")
        if self.fit and not self.start:
            raise ValueError("an arm that fits needs a start")


@dataclass(frozen=True)
class Network:
    """A network, in the size that is trained.

    Attributes:
        title: for the table.
        model: backbone and policy.
        arms: the arms that it is trained in.
    """

    title: str
    arms: tuple[str, ...]
    model: ModelSettings = field(default_factory=ModelSettings)


@dataclass(frozen=True)
class MainTableSettings:
    """A whole settings file.

    Attributes:
        title: of the table.
        seed: of every training.
        threads: of every process, 0 for as many as the machine gives; the budget is in processor minutes on the CPU
            with one thread, else in minutes of the clock.
        pairs: only the first so many test pairs; None for all.
        classical: what needs no network: "none" (as the images lie), "affine" or keys of
            :data:`.classical.CLASSICAL`.
        tasks, networks, arms: by the names that a run's path is made of.
    """

    title: str
    tasks: dict[str, Task]
    networks: dict[str, Network]
    arms: dict[str, Arm]
    seed: int = 0
    threads: int = 1
    pairs: int | None = None
    classical: tuple[str, ...] = (*ALIGNMENTS, *CLASSICAL)

    def __post_init__(self) -> None:
        for name, network in self.networks.items():
            _known(self.arms, network.arms, f"networks.{name}.arms")
            for arm in network.arms:
                _known(network.arms, [a for a in (self.arms[arm].start, self.arms[arm].baseline) if a], f"arms.{arm}")
            for arm in network.arms:
                before = [arm]
                while start := self.arms[before[-1]].start:
                    if start in before:
                        raise ValueError(f"arms.{arm} starts from itself, by way of arms.{before[-1]}")
                    before.append(start)
        _known((*ALIGNMENTS, *CLASSICAL), self.classical, "classical")
        _known(PUBLISHED, [task.layout for task in self.tasks.values() if task.layout], "a task's layout")


def shipped_settings(name: str) -> MainTableSettings:
    """Return a benchmark's own settings: the file of its name, or the task of its name in paper.toml; or "claims".

    Raises:
        MorphSeekError: the file cannot be read.
    """
    file = SETTINGS / f"{name}.toml"
    if file.is_file():
        return load(MainTableSettings, file)
    if name == "claims":
        return _claims(load(MainTableSettings, SETTINGS / "main-table.toml"))
    paper = load(MainTableSettings, SETTINGS / "paper.toml")
    return dataclasses.replace(paper, tasks={name: paper.tasks[name]})


def _claims(table: MainTableSettings) -> MainTableSettings:
    """Return the main table with 40 minutes for each arm of what claims.py compares, for each of its networks."""
    minutes = {name: table.arms[name].minutes * CLAIMED_MINUTES / table.arms["soft-dice"].minutes for name in CLAIMED}
    return dataclasses.replace(
        table,
        title="What MorphSeek adds",
        classical=("affine",),
        arms={name: dataclasses.replace(table.arms[name], minutes=minutes[name]) for name in CLAIMED},
        networks={name: dataclasses.replace(table.networks[name], arms=CLAIMED) for name in CLAIMED_NETWORKS},
    )


@dataclass(frozen=True)
class Run:
    """TASK/METHOD/ARM, and the run whose model it starts from."""

    task: str
    method: str
    arm: str
    start: Run | None = None

    @property
    def name(self) -> str:
        """Its path under OUT/runs."""
        return f"{self.task}/{self.method}/{self.arm}"


def _known(names: Any, wanted: Any, where: str) -> None:
    """Refuse names that are not there."""
    for name in wanted:
        if name not in names:
            raise ValueError(f"{where} names '{name}'; there are: {', '.join(names)}")


def run_list(settings: MainTableSettings, only: str | None = None) -> list[Run]:
    """All runs in their order: a task's classical ones, then each network's arms, starts before what starts from them.

    Args:
        only: TASK/METHOD/ARM with shell wildcards; parts that are left out match all. A run brings its starts.

    Raises:
        MorphSeekError: nothing matches.
    """
    runs: dict[str, Run] = {}

    def add(task: str, method: str, arm: str) -> Run:
        start = settings.arms[arm].start if method in settings.networks else ""
        run = Run(task, method, arm, add(task, method, start) if start else None)
        return runs.setdefault(run.name, run)

    wanted = [*(only or "").split("/"), "", "", ""][:3]
    for task in settings.tasks:
        methods = {"classical": settings.classical} | {k: v.arms for k, v in settings.networks.items()}
        for method, arms in methods.items():
            for arm in arms:
                if all(fnmatch.fnmatch(n, w or "*") for n, w in zip((task, method, arm), wanted, strict=True)):
                    add(task, method, arm)
    if not runs:
        raise MorphSeekError(
            f"No run matches '{only}'; it is TASK/METHOD/ARM of tasks {', '.join(settings.tasks)}, methods classical, "
            f"{', '.join(settings.networks)} and arms {', '.join((*settings.classical, *settings.arms))}."
        )
    return list(runs.values())


def main_table(
    settings: MainTableSettings,
    data: Path | str,
    out: Path | str,
    *,
    only: str | None = None,
    device: str = "auto",
    job: Job = SILENT,
) -> None:
    """Do every run that is not done, and write the report after each.

    Args:
        settings: the settings.
        data: the root of the tasks' data.
        out: results go here; what must not be shared (weights, pictures of scans) to its folders runs and pictures.
        only: see :func:`run_list`.
        device: "auto", "cpu" or "cuda:N".

    Raises:
        MorphSeekError: unusable settings or data, a folder with runs of other settings.
        Cancelled: the person stopped it; states are kept.
    """
    data, out = Path(data), Path(out)
    where = pick_device(device)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    datasets: dict[str, Dataset] = {}
    write_report(settings, out)

    def do(run: Run, own: Job) -> None:
        if run.task not in datasets:
            datasets[run.task] = dataset_of(settings.tasks[run.task], data)
        if do_once(
            out / "runs" / run.name,
            lambda: result_of(settings, run, out) is not None,
            lambda: _do(settings, run, datasets[run.task], out, where, own),
        ):
            write_report(settings, out)

    do_all(run_list(settings, only), do, job)


def dataset_of(task: Task, data: Path) -> Dataset:
    """The data of a task.

    Raises:
        MorphSeekError: not there, or not in the layout.
    """
    return PUBLISHED[task.layout](data / task.data) if task.layout else load_dataset(data / task.data)


def settings_of(settings: MainTableSettings, run: Run) -> dict[str, Any]:
    """All settings that a run's result depends on."""
    found: dict[str, Any] = {
        "task": _plain(settings.tasks[run.task]),
        "seed": settings.seed,
        "threads": settings.threads,
        "pairs": settings.pairs,
    }
    if run.method in settings.networks:
        found["arm"] = _plain(settings.arms[run.arm])
        found["model"] = _plain(settings.networks[run.method].model)
    return found | ({"start": settings_of(settings, run.start)} if run.start else {})


def result_of(settings: MainTableSettings, run: Run, out: Path) -> dict[str, Any] | None:
    """A run's result; None where it is not done.

    Raises:
        MorphSeekError: it was done with other settings.
    """
    path = out / "runs" / run.name / "result.json"
    if not path.is_file():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    _check_same(result["settings"], settings_of(settings, run), path.parent)
    return result


def _do(
    settings: MainTableSettings,
    run: Run,
    dataset: Dataset,
    out: Path,
    device: torch.device,
    job: Job,
) -> None:
    """Do one run and write its result."""
    folder = out / "runs" / run.name
    task = settings.tasks[run.task]
    training: dict[str, Any] = {}
    if run.method in settings.networks:
        path, training = _model(settings, run, dataset, out, device, job)
        model = load_model(path, str(device))
        fit: Switch = "on" if settings.arms[run.arm].fit else "off"
        align, similarity = task.preprocessing.align, task.similarity
        options = RegistrationOptions(align=align, inverse=False, search="off", fit=fit, similarity=similarity)

        def method(fixed: Volume, moving: Volume) -> Transform:
            return register(fixed, moving, model, options).transform

        pair = dataset.split(TEST)[0]
        fixed, moving = (read_image(case.image) for case in (pair.fixed, pair.moving))
        draw(
            fixed,
            moving,
            register(fixed, moving, model, options),
            out / "pictures",
            run.name,
        )
    else:
        method = _classical(run.arm, task, settings.threads)
    rows = measure(
        dataset,
        TEST,
        method,
        device=str(device),
        pairs=settings.pairs,
        job=job.part(0.8, 1.0),
    )
    result = {
        "settings": settings_of(settings, run),
        "training": training,
        "pairs": [row.to_json(ROW) for row in rows],
        "device": str(device),
        "date": time.strftime("%Y-%m-%d"),
        "software": software(),
    }
    write_atomically(folder / "result.json", to_json(result, indent=1).encode())


def _classical(name: str, task: Task, threads: int) -> Method:
    """A method without a network."""
    if name in ALIGNMENTS:
        return lambda fixed, moving: align(fixed, moving, name)
    own = task.preprocessing.align != "none"
    run = CLASSICAL[name]
    return lambda fixed, moving: run(fixed, moving, affine=own, multimodal=task.multimodal, threads=threads)


def draw(fixed: Volume, moving: Volume, found: Registration, folder: Path, name: str) -> None:
    """Pictures of a registration for the eye: overlays, deformation grid, folds. They show the scans."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = RegistrationPictures(fixed, found.aligned, found.warped, found.jacobian, found.folding, found.transform)
    name = name.replace("/", "_")
    for stale in folder.glob(f"{name}_[0-9].png"):  # a run done anew may have fewer: no sheet of folds without folds
        stale.unlink()
    for number, sheet in enumerate(draw_sheets(pictures), start=1):
        (folder / f"{name}_{number}.png").write_bytes(sheet.png)


def _model(
    settings: MainTableSettings,
    run: Run,
    dataset: Dataset,
    out: Path,
    device: torch.device,
    job: Job,
) -> tuple[Path, dict[str, Any]]:
    """The run's model, trained if it is not there, and what there is to say of its training."""
    arm = settings.arms[run.arm]
    if arm.fit:
        return _model(settings, run.start, dataset, out, device, job)
    if arm.checkpoint:
        path = find(arm.checkpoint)
        return path, {"checkpoint": arm.checkpoint, "sha256": sha256(path)}
    folder = out / "runs" / run.name
    path, facts = folder / "model.safetensors", folder / "training.json"
    if facts.is_file():
        return path, json.loads(facts.read_text(encoding="utf-8"))
    init = out / "runs" / run.start.name / "model.safetensors" if run.start else None
    plan, minutes = folder / "plan.json", arm.minutes
    config = _config(settings, run, dataset)
    if plan.is_file():
        planned = json.loads(plan.read_text(encoding="utf-8"))
        _check_same(planned["settings"], settings_of(settings, run), folder)
    else:
        on_cpu = device.type == "cpu" and settings.threads == 1
        clock = time.process_time if on_cpu else time.monotonic
        seconds, _ = seconds_per_iteration(config, dataset, init, device, job, clock)
        iterations = int(60 * minutes / seconds)
        if iterations < FEWEST:
            raise MorphSeekError(
                f"{minutes:g} minutes are too short for {run.name}: {FEWEST} iterations take "
                f"{FEWEST * seconds / 60:.1f} minutes here; give the arm more in the settings."
            )
        planned = {"settings": settings_of(settings, run), "iterations": iterations, "seconds_per_iteration": seconds}
        write_atomically(plan, json.dumps(planned, indent=1).encode())
    iterations = planned["iterations"]
    config = override(config, "training", iterations=iterations, validate_every=iterations)
    begin, resumed = time.process_time(), state_file(path).is_file()
    train_stage(config, dataset, init, path, device, job.part(0.0, 0.8))
    card = read_card(path)
    training = {
        "iterations": iterations,
        "minutes": minutes,
        "seconds": card.provenance["seconds"],
        "cpu_seconds": None if resumed else round(time.process_time() - begin, 1),
        "parameters": card.parameters,
        "validation": card.results.get("validation", {}),
    }
    write_atomically(facts, json.dumps(training, indent=1).encode())
    return path, training


def _config(settings: MainTableSettings, run: Run, dataset: Dataset) -> Config:
    """The training's settings with what the task and the network say; its last weights count."""
    task, model, arm = settings.tasks[run.task], settings.networks[run.method].model, settings.arms[run.arm]
    common: dict[str, Any] = {"seed": settings.seed, "centered": task.centered}
    if arm.spac is not None:
        grid = read_image(dataset.split("training", "cases")[0].image).grid
        network = from_dict(SPACSettings, model.backbone_settings, f"networks.{run.method}")
        size = working_grid(grid, task.preprocessing, 2 ** len(network.encoder)).shape
        config = dataclasses.replace(
            arm.spac, network=dataclasses.replace(network, size=size), preprocessing=task.preprocessing
        )
    elif arm.warmup is not None:
        config = dataclasses.replace(arm.warmup, model=model, preprocessing=task.preprocessing)
        config = override(config, "loss", similarity=task.similarity)
    else:
        config = override(arm.finetune, "loss", similarity=task.similarity)
        common["folding_limit"] = 100.0
    return override(config, "training", **common)


def _plain(part: Task | Arm | ModelSettings) -> dict[str, Any]:
    """What of a part of the settings a result depends on."""
    values = {name: value for name, value in to_dict(part).items() if name not in ("title", "baseline")}
    return {name: value for name, value in values.items() if value} if isinstance(part, Arm) else values


def _check_same(found: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    """Refuse a folder of other settings."""
    if found != wanted:
        differ = [key for key in wanted if found.get(key) != wanted[key]]
        raise MorphSeekError(
            f"{folder} holds a run of other settings ({', '.join(differ) or 'more of them'}); give another --out, or "
            "move this folder away."
        )
