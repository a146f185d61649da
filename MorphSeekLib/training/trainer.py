"""Training: the one loop, and what a training must say to run in it.

A :class:`Task` (warm-up, fine-tuning, SPAC) gives the :class:`Trainer` batches, an update and a validation. Every
iteration is a pure function of (settings, seed, iteration, weights, optimizer, the task's memory): a training that was
killed at any moment and is resumed ends with the same weights as one that was not.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar, get_args

import numpy as np
import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from ..data.datasets import Case, Dataset, PairLoader, PreparedPair, training_pair
from ..measures.metrics import mean
from ..measures.scores import WORKING, PairRow, definitions, score_displacement
from ..networks.devices import network_autocast
from ..networks.model_file import Card, not_finite, save, software
from ..networks.policy import RegistrationModel, take_steps
from ..protocol.card import Provenance
from ..protocol.errors import Cancelled, MorphSeekError
from ..protocol.job import SILENT, Job
from ..protocol.settings import to_dict
from ..protocol.startup import check_output_file
from ..space import fields
from ..space.preprocessing import Preprocessing
from .distributed import World
from .run_state import Memory, RunState, fingerprint_of, load_state, save_state, state_file

_VALIDATIONS = 10  # of a run of minutes

Stream = Literal["pairs", "policy", "layers"]
"""What random numbers are for: pairs and how they are changed, samples of a policy, layers that drop at random."""


@dataclass(frozen=True)
class RunSettings:
    """The run.

    Attributes:
        iterations: optimizer steps, one pair each.
        learning_rate: of Adam, falling to a hundredth along a half cosine.
        steps: steps T of the network in training; each is detached from the one before.
        seed: of everything random.
        validate_every, save_every: iterations between validations, and between states to resume from.
        validation_pairs: the most pairs of one validation.
        centered: put the middles of two images together before training; else their world coordinates count.
        gradient_clip: largest norm of a gradient.
        minutes: how long the run may take, with its validations; ``iterations`` and ``validate_every`` count no more,
            and the learning rate falls with the time. None: ``iterations`` count.
        average: share of the averaged weights that an iteration keeps (such as 0.99), the rest being the new weights;
            validations and the model are of the averaged weights. 0: no average.
        patience: validations in a row without a better score that end the run; None for no end but its own.
    """

    iterations: int = 2000
    learning_rate: float = 1e-3
    steps: int = 2
    seed: int = 0
    validate_every: int = 250
    save_every: int = 100
    validation_pairs: int = 8
    centered: bool = True
    gradient_clip: float = 1.0
    minutes: float | None = None
    average: float = 0.0
    patience: int | None = None

    def __post_init__(self) -> None:
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise ValueError(f"minutes is {self.minutes:g}; it must be above 0")
        if not 0 <= self.average < 1:
            raise ValueError(f"average is {self.average:g}; it must be 0 (none) or more, and below 1")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience is {self.patience}; it must be at least 1")


class Config(Protocol):
    """What the settings file of every training holds."""

    @property
    def title(self) -> str:
        """For the card."""

    @property
    def license(self) -> str:
        """For the card."""

    @property
    def training(self) -> RunSettings:
        """The run."""


B = TypeVar("B")


class Task(ABC, Generic[B]):
    """What one training does: its batches, its update, its validation, its card.

    Attributes:
        dataset, config: what it trains on, and its settings.
        run: ``config.training``.
        network: what the model file will hold; on the device.
        preprocessing: for the card, and of the pairs.
        device, world: where it runs, and the processes that share the work.
        loader: prepares pairs; one for training and validation, so that a run keeps one set of cases in memory.
        validation: functions that prepare this process's pairs of the split registration_val; none without one.
        trained, optimizer: all that is trained and kept to resume from, and by what.
        cases: what pairs are drawn from; set by the task.
        memory: the numbers that must survive a kill.
        origin: what beside the settings the training depends on; a state of others is refused.
        progress: the share of the run that is done, as the trainer sees it; None: that of its iterations.
        keeps_best: whether the weights with the best :meth:`score` are kept; else the last ones are.
    """

    keeps_best = True
    cases: list[Case]

    def __init__(
        self,
        dataset: Dataset,
        config: Config,
        network: RegistrationModel,
        preprocessing: Preprocessing,
        device: torch.device,
        world: World | None = None,
    ) -> None:
        self.dataset, self.config, self.run, self.network = dataset, config, config.training, network
        self.preprocessing, self.device, self.world = preprocessing, device, world or World()
        self.loader = PairLoader(preprocessing, network.multiple_of, self.run.centered)
        pairs = dataset.pairs.get("registration_val", [])[: self.run.validation_pairs]
        self.validation: list[Callable[[], PreparedPair]] = [
            partial(self.loader, pair) for pair in pairs[self.world.rank :: self.world.size]
        ]
        self.trained, self.optimizer = self.learner()
        self.memory = Memory()
        self.origin: dict[str, str | list[str] | None] = {}
        self.progress: float | None = None

    def learner(self) -> tuple[nn.Module, torch.optim.Adam]:
        """Return all that is trained, and its optimizer."""
        return self.network, torch.optim.Adam(self.network.parameters(), lr=self.run.learning_rate)

    @abstractmethod
    def batch(self, iteration: int) -> B:
        """Return what an iteration trains on: a pure function; called ahead, in a thread of its own."""

    @abstractmethod
    def update(self, iteration: int, batch: B) -> dict[str, float]:
        """Train on a batch; return the figures for the curves."""

    def validate(self, job: Job) -> dict[str, float]:
        """Return the figures of the network as it stands, on this process's validation pairs."""
        return validate(self.network, self.validation, self.run.steps, self.device, job)

    def score(self, figures: dict[str, float]) -> float:
        """Return how good a validation is."""
        return figures.get("dice", 0.0)

    @abstractmethod
    def card(self) -> Card:
        """Return what the model file says of the training; the trainer adds results, time and software."""

    def provenance(self, stage: str, cases: int, more: Provenance | None = None) -> Provenance:
        """Return a card's provenance, as far as it is known before the training."""
        about = self.dataset.about | {"file": self.dataset.path.name}
        return {"stage": stage, "data": about, "cases": cases, **(more or {}), "settings": to_dict(self.config)}

    def generator(self, stream: Stream, number: int) -> torch.Generator:
        """Return the random numbers of an iteration, a pair or an episode."""
        return torch.Generator().manual_seed(seed_for(self.run.seed, stream, number))

    def pair(self, generator: torch.Generator) -> PreparedPair:
        """Draw a training pair."""
        return self.loader(training_pair(self.cases, self.dataset.pairing, generator))


def begin(out: Path | str, dataset: Dataset, job: Job, init: Path | str | None = None) -> Path:
    """Check where a training will write before any work, and tell that it begins.

    Raises:
        MorphSeekError: ``out`` cannot be written, or is what the training reads.
    """
    out = Path(out)
    check_output_file(out, ".safetensors", [dataset.path, init])
    job.report("read", 0.0, "Reading the training cases")
    return out


def training_cases(dataset: Dataset, name: str, labeled: bool = False, most: int | None = None) -> list[Case]:
    """Return the cases of the split "training".

    Args:
        dataset: whose.
        name: of the training, for the refusal.
        labeled: only those with labels.
        most: only the first so many; None for all.

    Raises:
        MorphSeekError: fewer than two.
    """
    cases = [case for case in dataset.split("training", "cases") if case.label is not None or not labeled][:most]
    if len(cases) < 2:
        what = "labeled training cases" if labeled else "training cases"
        raise MorphSeekError(f"{dataset.path} offers {len(cases)} {what}; {name} needs at least two.")
    return cases


class Trainer:
    """Runs a task to its end, or resumes a killed run of the same settings.

    While training, it keeps beside ``out``: ``out.state`` (to resume from; removed once the model is written),
    ``out.log`` (TensorBoard) and ``out.jsonl`` (the same figures, a line an iteration). A cancelled run keeps its
    state.
    """

    def __init__(
        self, task: Task[Any], out: Path, job: Job = SILENT, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Set ``clock``: the seconds by which the run is timed."""
        self.task, self.out, self.job, self.world, self._clock = task, out, job, task.world, clock
        self._fingerprint = fingerprint_of(to_dict(task.config) | task.origin)
        saved = load_state(state_file(out), self._fingerprint, task.memory, task.trained, task.optimizer)
        self.state, task.memory = saved
        self._started = clock() - self.state.seconds
        self._log: Curves | None = None
        self._average = WeightAverage(task.trained, task.run.average, self.state)

    def run(self) -> Path:
        """Train, and write the model; return its path.

        Raises:
            MorphSeekError: weights that are NaN or infinite, or what the task refuses.
            Cancelled: the user stopped it; the state is saved.
        """
        if self.world.rank == 0:
            self._log = Curves(self.out, self.state.done - (self.state.owed is not None))
        try:
            self._iterate()
        except Cancelled:
            self._keep_state()
            raise
        finally:
            if self._log is not None:
                self._log.close()
        kept = self.state.best or self.state.average
        if kept:
            self.task.trained.load_state_dict(kept)
        with self.world.together():
            if self.world.rank == 0:
                save(self.out, self.task.network, self._card())
                state_file(self.out).unlink(missing_ok=True)
        self.job.report("write", 1.0, f"Wrote {self.out}")
        return self.out

    def _iterate(self) -> None:
        """Do all iterations that are not done; the next one's batch is made while this one trains."""
        task, state, run = self.task, self.state, self.task.run
        if state.owed is not None:
            self._conclude(state.owed)
        ahead_of = None if run.minutes is not None else run.iterations - 1
        with ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(task.batch, _within(state.done, ahead_of))
            while not (state.stopped or (state.done == run.iterations and run.minutes is None)):
                with self.world.together():
                    self.job.check()
                    batch = coming.result()
                coming = ahead.submit(task.batch, _within(state.done + 1, ahead_of))
                # layers that drop at random draw from there
                torch.manual_seed(seed_for(run.seed, "layers", state.done))
                task.progress = self._progress()
                state.owed = task.update(state.done, batch)
                state.done += 1
                self._average.update(state.done)
                self._conclude(state.owed)

    def _progress(self) -> float:
        """Return the share of the run that is done, the same in all processes.

        Of a run of minutes, the time of one more iteration and of the last validation is kept free.
        """
        run, state = self.task.run, self.state
        if run.minutes is None:
            return state.done / run.iterations
        spent = self._seconds()
        free = state.validation + (spent / state.done if state.done else 0.0)
        share = torch.tensor(spent / max(60 * run.minutes - free, 1e-3), device=self.world.device)
        return min(float(self.world.mean(share)), 1.0)

    def _due(self) -> bool:
        """Return whether the weights are to be validated after an iteration, before the last one.

        In a run of minutes, that is ten times, but in a fifth of the time at most.
        """
        run, state = self.task.run, self.state
        if run.minutes is None:
            return state.done % run.validate_every == 0
        wait = max(60 * run.minutes / _VALIDATIONS, 5 * state.validation)
        since = torch.tensor(self._seconds() - state.validated, device=self.world.device)
        return float(self.world.mean(since)) >= wait

    def _conclude(self, metrics: dict[str, float]) -> None:
        """End an iteration: validate where that is due, log, report, save.

        Cancelled in its validation, it can be done again by a resumed run.
        """
        state, run = self.state, self.task.run
        progress = self._progress()
        last = progress >= 1
        if self._due() or last:
            begin = self._seconds()
            metrics = metrics | {f"validation/{k}": v for k, v in self._validate().items()}
            state.validated = self._seconds()
            state.validation = state.validated - begin
            last |= self._in_vain()
        state.owed, state.stopped = None, last
        if self._log is not None:
            self._log.write(state.done, metrics)
        message, done, whole = self._standing(progress)
        self.job.report("train", 1.0 if last else progress, message, done, whole, **metrics)
        if state.done % run.save_every == 0 and not last:
            with self.world.together():
                self._keep_state()

    def _in_vain(self) -> bool:
        """Return whether so many validations were no better than the best that the run ends."""
        patience = self.task.run.patience
        return patience is not None and self.state.without_gain >= patience

    def _standing(self, progress: float) -> tuple[str, int, int]:
        """Return a message, the iterations that are done, and all of them, as far as that is known."""
        state, run = self.state, self.task.run
        if self._in_vain():
            return f"Stopped early: {run.patience} validations were not better than before", state.done, state.done
        whole = run.iterations if run.minutes is None else max(state.done, round(state.done / max(progress, 1e-6)))
        left = _clock(self._seconds() / max(progress, 1e-6) * (1 - progress))
        about = "" if run.minutes is None else "about "
        return f"Iteration {state.done} of {about}{whole}, {left} left", state.done, whole

    def _validate(self) -> dict[str, float]:
        """Return the figures of the weights as they stand, over all processes' pairs; keep the best weights."""
        task, state = self.task, self.state
        _check_weights(task.trained, state.done)
        with self._average.in_place():
            task.trained.eval()
            try:
                with self.world.together():
                    found = task.validate(self.job)
                found = self.world.mean_figures(found, len(task.validation))
            finally:
                task.trained.train()
            state.without_gain += 1
            if not (task.keeps_best and found):
                state.figures, state.without_gain = found, 0
            elif state.score is None or task.score(found) > state.score:
                state.figures, state.score, state.best_iteration = found, task.score(found), state.done
                state.best = {k: v.detach().cpu().clone() for k, v in task.trained.state_dict().items()}
                state.without_gain = 0
        return found

    def _keep_state(self) -> None:
        """Write what a killed run needs to resume; one process does it for all."""
        if self.world.rank == 0:
            task = self.task
            _check_weights(task.trained, self.state.done)
            self.state.seconds = self._seconds()
            where = state_file(self.out)
            save_state(where, self._fingerprint, self.state, task.memory, task.trained, task.optimizer)

    def _card(self) -> Card:
        """Return the task's card with what the training came to."""
        seconds, date = round(self._seconds()), time.strftime("%Y-%m-%d")
        card, state = self.task.card(), self.state
        spent: Provenance = {"seconds": seconds, "date": date, "software": software()}
        if self.task.run.average:
            spent["averaged"] = self.task.run.average
        if self.task.keeps_best:
            spent = {"best_iteration": state.best_iteration or state.done, **spent}
        known = definitions(WORKING, VALIDATION_FIGURES) | card.results.get("definitions", {})
        return dataclasses.replace(
            card,
            provenance=card.provenance | spent,
            results={"validation": state.figures, "definitions": known},
            license=self.task.config.license or card.license,
        )

    def _seconds(self) -> float:
        """Return the time spent on the run, by all processes that it was resumed in."""
        return self._clock() - self._started


class WeightAverage:
    """The exponential moving average of a network's weights, kept in a training's state; none where its share is 0.

    At first it follows the weights faster, so that it does not remember what the network began with.
    """

    def __init__(self, network: nn.Module, share: float, state: RunState) -> None:
        """Set ``share``: what an iteration keeps of the average."""
        self._network, self._share, self._state = network, share, state
        if share and not state.average:
            state.average = {name: value.detach().clone() for name, value in network.state_dict().items()}
        for name, value in network.state_dict().items() if share else ():
            state.average[name] = state.average[name].to(value)

    @torch.no_grad()
    def update(self, done: int) -> None:
        """Take in the weights after so many iterations."""
        if not self._share:
            return
        new = 1 - min(self._share, (1 + done) / (10 + done))
        for name, value in self._network.state_dict().items():
            kept = self._state.average[name]
            if value.is_floating_point():
                kept.lerp_(value, new)
            else:
                kept.copy_(value)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the average in the place of the weights for a while."""
        if not self._share:
            yield
            return
        weights = {name: value.detach().clone() for name, value in self._network.state_dict().items()}
        self._network.load_state_dict(self._state.average)
        try:
            yield
        finally:
            self._network.load_state_dict(weights)


def _within(number: int, most: int | None) -> int:
    return number if most is None else min(number, most)


def _check_weights(model: nn.Module, done: int) -> None:
    """Refuse to validate or keep weights that are NaN or infinite.

    Raises:
        MorphSeekError: with what to change.
    """
    if (name := not_finite(model.state_dict())) is not None:
        raise MorphSeekError(
            f"The training has become unstable: the weights '{name}' hold NaN or infinite values after iteration "
            f"{done}; lower training.learning_rate and start again."
        )


class Curves:
    """Curves for TensorBoard, and the same figures as JSON lines; what a killed run logged beyond its state is cut."""

    def __init__(self, out: Path, written: int) -> None:
        """``written``: iterations whose figures are to stay."""
        self._writer = SummaryWriter(str(out.with_name(out.name + ".log")), purge_step=written + 1)
        path = out.with_name(out.name + ".jsonl")
        lines = path.read_text(encoding="utf-8").splitlines() if written and path.is_file() else []
        self._file = path.open("w", encoding="utf-8")
        self._file.writelines(f"{line}\n" for line in lines[:written])

    def write(self, iteration: int, metrics: dict[str, float]) -> None:
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}  # JSON has no others
        for name, value in metrics.items():
            self._writer.add_scalar(name if "/" in name else f"training/{name}", value, iteration)
        self._file.write(json.dumps({"iteration": iteration} | metrics) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._writer.close()
        self._file.close()


VALIDATION_FIGURES = ("folded_percent", "njd_percent", "sdlogj", "dice", "dice_before", "lost_labels", "tre_mm")
"""What a validation measures, in the order of its curves and of the card."""


def validate(
    model: RegistrationModel,
    pairs: list[Callable[[], PreparedPair]],
    steps: int,
    device: torch.device,
    job: Job = SILENT,
) -> dict[str, float]:
    """Measure pairs on the working grid: means over those that have the figure.

    Returns:
        finite figures of VALIDATION_FIGURES; one that no pair has is missing, so it is empty without pairs.

    Raises:
        MorphSeekError: the model's displacement is not a number.
    """
    rows: list[PairRow] = []
    for make in pairs:
        job.check()
        pair = make()
        fixed, moving = pair.fixed.to(device), pair.moving.to(device)
        with torch.inference_mode(), network_autocast(device):
            total = take_steps(model, partial(fields.warp, moving), fixed, steps).cpu()
        if not bool(torch.isfinite(total).all()):
            raise MorphSeekError(
                "The training has become unstable: the model's displacement is not a number; lower "
                "training.learning_rate and start again."
            )
        rows.append(score_displacement(total, pair.grid.spacing.tolist(), pair.labels, pair.points))
    means = {name: mean(row.number(name) for row in rows) for name in VALIDATION_FIGURES}
    return {name: value for name, value in means.items() if value is not None}


def set_learning_rate(
    optimizer: torch.optim.Optimizer, run: RunSettings, iteration: int, progress: float | None = None
) -> float:
    """Lower the rate from the settings' to a hundredth of it along half a cosine.

    Args:
        optimizer, run: whose rate, and the settings.
        iteration: how many are done.
        progress: the share of the run that is done, where the trainer knows it; None: ``iteration`` of all.
    """
    done = iteration / run.iterations if progress is None else progress
    rate = run.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def check_finite(values: list[float], iteration: int) -> None:
    """Stop a run whose loss or gradient is not finite.

    Raises:
        MorphSeekError: with what to change.
    """
    if not all(math.isfinite(value) for value in values):
        raise MorphSeekError(
            f"The loss is not a number at iteration {iteration + 1}; lower training.learning_rate or raise "
            "loss.regularization, and start again."
        )


def seed_for(seed: int, stream: Stream, iteration: int) -> int:
    """Return a number for a run's seed, a stream and an iteration that has nothing to do with those of others.

    NumPy's SeedSequence hashes the three (as its ``spawn`` does), so that runs of neighboring seeds share nothing. It
    has 32 bits: a generator of torch on the CPU takes no more.
    """
    key = (get_args(Stream).index(stream), iteration)
    return int(np.random.SeedSequence(seed % 2**63, spawn_key=key).generate_state(1, np.uint32)[0])


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
