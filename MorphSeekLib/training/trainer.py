"""Training: the loop that all runs share, and warm-up (METHOD.md, section B) on images or on synthetic pairs.

Every iteration is a pure function of (settings, seed, iteration, weights, optimiser, memory): a run that was killed at
any moment and is resumed ends with the same weights as one that was not. Fine-tuning is
:mod:`MorphSeekLib.training.finetuning`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ..data.datasets import Dataset, PairLoader, known_sizes, training_pair
from ..data.synthesis import LabelMapSource, SynthesisSettings
from ..io.files import write_atomically
from ..measures.metrics import LABEL_DEFINITIONS, folding, label_figures, mean
from ..measures.regularizers import diffusion, folding_penalty
from ..measures.similarity import SIMILARITIES
from ..networks.devices import network_autocast, place, training_autocast
from ..networks.model_file import Card, load, not_finite, read_card, save, sha256, software
from ..networks.policy import Latent, ModelSettings, RegistrationModel, kl_to_standard_normal, refine
from ..protocol.errors import Cancelled, MorphSeekError
from ..protocol.job import SILENT, Job
from ..protocol.settings import to_dict
from ..protocol.startup import check_output_file
from ..space import fields
from ..space.preprocessing import Preprocessing
from .distributed import World
from .rewards import landmark_errors

Stream = Literal["pairs", "policy", "layers"]
"""What random numbers are for: pairs and how they are changed, samples of a policy, layers that drop at random."""


@dataclass(frozen=True)
class LossSettings:
    """Weights of the warm-up loss, all per refinement step.

    Attributes:
        similarity: "lncc", "mse" or "mind".
        similarity_weight: 0 for synthetic pairs whose contrasts differ.
        regularization: lambda_reg of the diffusion regulariser, on the accumulated displacement in voxels.
        folding: weight of the differentiable folding penalty mean(relu(0.05 - det J)).
        kl: beta, of the mean KL to N(0, I).
        dice: weight of 1 - soft Dice; needs labels (synthetic pairs have them).
        features: weight of :func:`feature_loss`, which makes a backbone's learned features those of the labels;
            fine-tuning only.
    """

    similarity: str = "lncc"
    similarity_weight: float = 1.0
    regularization: float = 1.0
    folding: float = 0.0
    kl: float = 1e-3
    dice: float = 0.0
    features: float = 0.0

    def __post_init__(self) -> None:
        if self.similarity not in SIMILARITIES:
            raise ValueError(f"similarity is '{self.similarity}'; it must be one of {', '.join(SIMILARITIES)}")


@dataclass(frozen=True)
class WarmupSettings:
    """The run.

    Attributes:
        iterations: optimiser steps, one pair each.
        learning_rate: of Adam, falling to a hundredth along a half cosine.
        steps: refinement steps T in training; each is detached from the one before.
        seed: of everything random.
        validate_every, save_every: iterations between validations, and between states to resume from.
        validation_pairs: the most pairs of one validation.
        centered: put the middles of two images together before training; else their world coordinates count.
        gradient_clip: largest norm of a gradient.
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


@dataclass(frozen=True)
class TrainingConfig:
    """A whole settings file.

    Attributes:
        title, licence: for the card.
        synthesis: present when pairs are made from label maps.
    """

    title: str = ""
    licence: str = ""
    model: ModelSettings = field(default_factory=ModelSettings)
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    loss: LossSettings = field(default_factory=LossSettings)
    training: WarmupSettings = field(default_factory=WarmupSettings)
    synthesis: SynthesisSettings | None = None


@dataclass
class Batch:
    """What an iteration trains on.

    Attributes:
        fixed, moving: (1, 1, i, j, k), what the network sees.
        fixed_target, moving_target: (1, 1, i, j, k), what their similarity is measured on; None: the images themselves.
        fixed_labels, moving_labels: shares (1, structures, i/b, j/b, k/b) of structures in blocks of b voxels, or None.
        structures: (structures,) their label values; None for synthetic pairs.
    """

    fixed: Tensor
    moving: Tensor
    fixed_target: Tensor | None = None
    moving_target: Tensor | None = None
    fixed_labels: Tensor | None = None
    moving_labels: Tensor | None = None
    structures: Tensor | None = None


def soft_dice(fixed: Tensor, warped: Tensor, epsilon: float = 1e-5) -> Tensor:
    """Mean over structures of 2 sum(ab) / (sum(a^2) + sum(b^2)); (batch, structures, i, j, k) shares -> scalar."""
    together = (fixed * warped).sum(dim=(2, 3, 4))
    apart = fixed.square().sum(dim=(2, 3, 4)) + warped.square().sum(dim=(2, 3, 4))
    return ((2 * together + epsilon) / (apart + epsilon)).mean()


def feature_loss(learned: Tensor, shares: Tensor, structures: Tensor, epsilon: float = 1e-5) -> Tensor:
    """Cross-entropy + (1 - soft Dice) of class-like features against the shares of structures.

    Args:
        learned: (batch, features, i, j, k), sum 1; feature c stands for label c, all that no structure claims for the
            background.
        shares: (batch, structures, i, j, k) of the structures in each voxel.
        structures: (structures,) label values.
    """
    found = learned.float().index_select(1, structures)
    rest, nothing = (1 - t.sum(dim=1, keepdim=True) for t in (found, shares))
    entropy = -(nothing * (rest + epsilon).log() + (shares * (found + epsilon).log()).sum(dim=1, keepdim=True)).mean()
    return entropy + 1 - soft_dice(shares, found)


class Step(NamedTuple):
    """One refinement step on the graph.

    Attributes:
        latent: the encoder's Gaussian.
        field: what its mean decodes to.
        total: the new accumulated displacement; ``outer`` the one before (detached).
        learned: features of the moved and the fixed image, where the backbone learns some.
    """

    latent: Latent
    field: Tensor
    total: Tensor
    outer: Tensor
    learned: tuple[Tensor, Tensor] | None = None


def advance(model: RegistrationModel, batch: Batch, outer: Tensor) -> Step:
    """Encode the pair as it stands after ``outer`` (1, 3, i, j, k; detached), decode the mean, compose."""
    moved = fields.warp(batch.moving, outer)
    with training_autocast(outer.device, outer.shape[2] // model.multiple_of):
        latent = model.encode(moved, batch.fixed)
        field = model.field(latent, latent.mu).float()
    total = fields.compose(outer, model.displacement(field))
    return Step(latent, field, total, outer, model.backbone.learned(latent.skips))


def warmup_loss(
    step: Step, batch: Batch, weights: LossSettings, kl_weight: float | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """L_warm of one refinement step (METHOD.md, section B), with soft Dice where labels and a weight are there.

    Args:
        kl_weight: beta, where a controller rules it; else ``weights.kl``.

    Returns:
        the loss, and the terms by name (detached, still on the device).
    """
    total = step.total
    terms = {"kl": kl_to_standard_normal(step.latent), "diffusion": diffusion(total)}
    loss = (weights.kl if kl_weight is None else kl_weight) * terms["kl"] + weights.regularization * terms["diffusion"]
    if weights.similarity_weight > 0:
        target, source = batch.fixed_target, batch.moving_target
        target, source = (batch.fixed, batch.moving) if target is None else (target, source)
        terms["similarity"] = SIMILARITIES[weights.similarity](target, fields.warp(source, total))
        loss = loss + weights.similarity_weight * terms["similarity"]
    if weights.folding > 0:
        terms["folding_penalty"] = folding_penalty(total)
        loss = loss + weights.folding * terms["folding_penalty"]
    if weights.dice > 0 and batch.fixed_labels is not None:
        # labels may come in blocks of voxels: the block's mean displacement, in blocks
        block = total.shape[2] // batch.fixed_labels.shape[2]
        coarse = F.avg_pool3d(total, block) / block if block > 1 else total
        terms["soft_dice"] = soft_dice(batch.fixed_labels, fields.warp(batch.moving_labels, coarse))
        loss = loss + weights.dice * (1 - terms["soft_dice"])
    if weights.features > 0 and step.learned is not None and batch.structures is not None:
        shares = fields.warp(batch.moving_labels, step.outer), batch.fixed_labels
        terms["features"] = sum(
            feature_loss(found, F.avg_pool3d(share, share.shape[2] // found.shape[2]), batch.structures)
            for found, share in zip(step.learned, shares, strict=True)
        )
        loss = loss + weights.features * terms["features"]
    return loss, {name: value.detach() for name, value in terms.items()}


def warmup(
    dataset: Dataset,
    config: TrainingConfig,
    out: Path | str,
    *,
    device: torch.device | str = "cpu",
    init: Path | str | None = None,
    job: Job = SILENT,
) -> Path:
    """Train from scratch or from a checkpoint, or go on where a killed run of the same settings stood.

    While training, ``out.state`` (weights and optimiser, to resume from) and ``out.log`` (TensorBoard) lie beside
    ``out``; the state goes when the run is done. A cancelled run keeps it.

    Args:
        dataset: cases of the split "training"; pairs of the split "registration_val" are validated on.
        config: the settings.
        out: the checkpoint to write.
        device: where to train.
        init: a checkpoint of the same model whose weights to start from.
        job: told of every iteration, and asked before it.

    Raises:
        MorphSeekError: unusable data, settings or ``out``, a state of other settings, or a loss that is not a number.
        Cancelled: the person stopped it; the state is saved.
    """
    out = Path(out)
    check_output_file(out, ".safetensors", [dataset.path, init])
    run, device = config.training, torch.device(device)
    job.report("read", 0.0, "Reading the training cases")
    torch.manual_seed(run.seed)
    model = place(RegistrationModel(config.model), device)
    if init is not None:
        _start_from(init, model)
    optimizer = torch.optim.Adam(model.parameters(), lr=run.learning_rate)
    loader = PairLoader(config.preprocessing, model.multiple_of, run.centered)
    batch_of = _batches(dataset, config, loader)
    validation = validation_pairs(dataset, run, loader)
    start = {"init": sha256(init) if init is not None else None}
    outcome = train(
        model,
        optimizer,
        run,
        lambda iteration, batch, memory: _iterate(model, optimizer, to_device(batch, device), config, iteration),
        batch_of,
        lambda job: validate(model, validation, run.steps, device, job),
        out,
        json.dumps(to_dict(config) | start, sort_keys=True),
        job=job,
    )
    card = Card(
        title=config.title or f"{config.model.backbone} warm-up on {dataset.about.get('name', dataset.path.name)}",
        model=config.model,
        preprocessing=dataclasses.replace(
            config.preprocessing,
            steps=run.steps,
            knows=known_sizes(
                dataset.split("training", "cases"), None if config.synthesis is None else config.synthesis.anatomy
            ),
        ),
        provenance={
            "stage": "warm-up",
            "data": dataset.about | {"file": dataset.path.name},
            "cases": len(dataset.cases.get("training", [])),
            "synthetic": config.synthesis is not None,
            "init": read_card(init).provenance | start if init is not None else None,
            "settings": to_dict(config),
            "seconds": round(outcome.seconds),
            "date": time.strftime("%Y-%m-%d"),
            "software": software(),
        },
        results={"validation": outcome.figures, "definitions": VALIDATION_DEFINITIONS},
        licence=config.licence,
    )
    save(out, model, card)
    state_file(out).unlink(missing_ok=True)
    job.report("write", 1.0, f"Wrote {out}")
    return out


@dataclass
class Outcome:
    """What :func:`train` ends with: the figures of the kept weights, seconds spent, the run's memory."""

    figures: dict[str, float]
    seconds: float
    memory: dict[str, float]


@dataclass
class Standing:
    """Where a run stands: all that its coming iterations and its end depend on, beside weights and optimizer.

    Attributes:
        done: optimizer steps.
        seconds: spent until the last state.
        memory: numbers that must survive a kill.
        best: the weights to keep, where a score chooses them.
        figures: of the validation of the weights to keep.
        owed: figures of the last iteration while its validation is not finished; None once it is.
    """

    done: int = 0
    seconds: float = 0.0
    memory: dict[str, float] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    owed: dict[str, float] | None = None


def train(
    model: RegistrationModel,
    optimizer: torch.optim.Adam,
    run: WarmupSettings,
    iterate: Callable[[int, Any, dict[str, float]], dict[str, float]],
    batch_of: Callable[[int], Any],
    validate: Callable[[Callable[[], None]], dict[str, float]],
    out: Path,
    fingerprint: str,
    *,
    score: Callable[[dict[str, float]], float] | None = None,
    world: World | None = None,
    job: Job = SILENT,
) -> Outcome:
    """The loop that every training shares: progress, curves, validation, states to resume from, the best weights.

    Beside ``out`` it keeps ``out.state`` (weights, optimiser, memory), ``out.log`` (TensorBoard) and ``out.jsonl`` (the
    same figures, a line per iteration). The caller removes the state once it has written the checkpoint.

    Args:
        iterate: (iteration, batch, memory) -> figures; does the optimiser step. ``memory`` holds numbers that must
            survive a kill, such as a controller's weight.
        batch_of: iteration -> batch, a pure function; the next one is made while this one trains.
        validate: figures of the model as it stands; it is given a function to call often.
        fingerprint: of all settings; a state of others is refused.
        score: figures -> how good; the model ends with the best weights. None: with the last.
        world: the processes that share the work, of which the first writes files; alone by default.

    Raises:
        MorphSeekError: a state of other settings, or weights that are no numbers any more.
        Cancelled: the person stopped it; the state is saved.
    """
    world = world or World()
    training = _Training(model, optimizer, run, validate, out, fingerprint, score, world, job)
    at = training.at
    try:
        if at.owed is not None:
            training.conclude(at.owed)
        with ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(batch_of, min(at.done, run.iterations - 1))
            while at.done < run.iterations:
                with world.together():
                    job.check()
                    batch = coming.result()
                coming = ahead.submit(batch_of, min(at.done + 1, run.iterations - 1))
                torch.manual_seed(seed_for(run.seed, "layers", at.done))  # layers that drop at random draw from there
                at.owed = iterate(at.done, batch, at.memory)
                at.done += 1
                training.conclude(at.owed)
    except Cancelled:
        training.keep_state()
        raise
    finally:
        training.close()
    if at.best:
        model.load_state_dict(at.best)
    return Outcome(at.figures, training.seconds(), at.memory)


class _Training:
    """What :func:`train` does around its iterations: validate, keep the best, write curves and states, tell."""

    def __init__(
        self,
        model: RegistrationModel,
        optimizer: torch.optim.Adam,
        run: WarmupSettings,
        validate: Callable[[Callable[[], None]], dict[str, float]],
        out: Path,
        fingerprint: str,
        score: Callable[[dict[str, float]], float] | None,
        world: World,
        job: Job,
    ) -> None:
        self._model, self._optimizer, self._run, self._validate = model, optimizer, run, validate
        self._state, self._fingerprint, self._score = state_file(out), fingerprint, score
        self._world, self._job = world, job
        self.at = _resume(self._state, fingerprint, model, optimizer)
        self._log = _Log(out, self.at.done - (self.at.owed is not None)) if world.rank == 0 else None
        self._started = time.monotonic() - self.at.seconds

    def seconds(self) -> float:
        """Spent on the run, by all processes that it was resumed in."""
        return time.monotonic() - self._started

    def conclude(self, metrics: dict[str, float]) -> None:
        """End an iteration: validate where that is due, log, tell, save. Cancelled in its validation, it can be done
        again by a resumed run."""
        at, run = self.at, self._run
        last = at.done == run.iterations
        if at.done % run.validate_every == 0 or last:
            metrics = metrics | {f"validation/{k}": v for k, v in self._look().items()}
        at.owed = None
        if self._log is not None:
            self._log.write(at.done, metrics)
        left = _clock(self.seconds() / at.done * (run.iterations - at.done))
        message = f"Iteration {at.done} of {run.iterations}, {left} left"
        self._job.report("train", at.done / run.iterations, message, at.done, run.iterations, **metrics)
        if at.done % run.save_every == 0 and not last:
            with self._world.together():
                self.keep_state()

    def _look(self) -> dict[str, float]:
        """Validate the model; its figures. The best weights are kept."""
        at = self.at
        _check_weights(self._model, at.done)
        self._model.eval()
        try:
            found = self._validate(self._job)
        finally:
            self._model.train()
        if self._score is None or not found:
            at.figures = found
        elif "score" not in at.memory or self._score(found) > at.memory["score"]:
            at.figures = found
            at.memory |= {"score": self._score(found), "best/iteration": at.done}
            at.best = {k: v.detach().cpu().clone() for k, v in self._model.state_dict().items()}
        return found

    def keep_state(self) -> None:
        """Write what a killed run needs to go on; one process does it for all."""
        if self._world.rank == 0:
            _check_weights(self._model, self.at.done)
            self.at.seconds = self.seconds()
            _save_state(self._state, self._fingerprint, self._model, self._optimizer, self.at)

    def close(self) -> None:
        """Close the curves."""
        if self._log is not None:
            self._log.close()


def _check_weights(model: RegistrationModel, done: int) -> None:
    """Refuse to validate or keep weights that are no numbers any more.

    Raises:
        MorphSeekError: with what to change.
    """
    if (name := not_finite(model.state_dict())) is not None:
        raise MorphSeekError(
            f"The training has become unstable: the weights '{name}' hold NaN or infinite values after iteration "
            f"{done}; lower training.learning_rate and start again."
        )


def state_file(out: Path) -> Path:
    """Where an unfinished run of a checkpoint keeps what it needs to go on."""
    return out.with_name(out.name + ".state")


class _Log:
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


VALIDATION_DEFINITIONS = {
    "dice": f"over the pairs: {LABEL_DEFINITIONS['dice']}; nearest-neighbor warped labels on the working grid",
    "dice_before": "the same before registration, on the working grid",
    "lost_labels": f"number a pair of {LABEL_DEFINITIONS['lost_labels']}, here the working grid",
    "folded_percent": "share of working-grid cells with a corner determinant <= 0 (one-sided differences)",
    "njd_percent": "share of working-grid voxels with a Jacobian determinant <= 0 (central differences)",
    "sdlogj": "standard deviation of log J over voxels, as metrics.folding defines it",
    "tre_mm": "mean distance of mapped fixed landmarks to their partners, mm",
}


def validate(
    model: RegistrationModel,
    pairs: list[Callable[[], Any]],
    steps: int,
    device: torch.device,
    job: Job = SILENT,
) -> dict[str, float]:
    """Measure pairs on the working grid: means over those that have the figure; see VALIDATION_DEFINITIONS.

    Returns:
        finite figures; one that no pair has is missing, so it is empty without pairs.

    Raises:
        MorphSeekError: the model's displacement is not a number.
    """
    rows: list[dict[str, float | None]] = []
    for make in pairs:
        job.check()
        pair = make()
        fixed, moving = pair.fixed.to(device), pair.moving.to(device)
        with torch.inference_mode(), network_autocast(device):
            total = refine(model, lambda u, moving=moving: fields.warp(moving, u), fixed, steps).cpu()
        if not bool(torch.isfinite(total).all()):
            raise MorphSeekError(
                "The training has become unstable: the model's displacement is not a number; lower "
                "training.learning_rate and start again."
            )
        figures = folding(total)
        row = {
            "folded_percent": 100 * float((fields.least_determinant(total) <= 0).float().mean()),
            "njd_percent": figures.njd_percent,
            "sdlogj": figures.sdlogj,
        }
        if pair.fixed_labels is not None and pair.moving_labels is not None:
            warped = fields.warp(pair.moving_labels.float(), total, "nearest").int()[0, 0]
            known, before = pair.fixed_labels[0, 0], pair.moving_labels[0, 0]
            after = label_figures(known, warped, before)
            row |= {"dice": after.mean_dice, "dice_before": label_figures(known, before, before).mean_dice}
            row |= {"lost_labels": float(len(after.lost))}
        if pair.fixed_points is not None and pair.moving_points is not None:
            spacing = pair.grid.spacing.tolist()
            row["tre_mm"] = float(landmark_errors(total, pair.fixed_points, pair.moving_points, spacing).mean())
        rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    means = {name: mean(row.get(name) for row in rows) for name in names}
    return {name: value for name, value in means.items() if value is not None}


def _iterate(
    model: RegistrationModel, optimizer: torch.optim.Optimizer, batch: Batch, config: TrainingConfig, iteration: int
) -> dict[str, float]:
    """One optimiser step over all refinement steps of one pair."""
    run = config.training
    rate = set_learning_rate(optimizer, run, iteration)
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros(1, 3, *batch.fixed.shape[2:], device=batch.fixed.device)
    loss_sum = torch.zeros((), device=batch.fixed.device)
    for _ in range(run.steps):
        step = advance(model, batch, total.detach())
        loss, terms = warmup_loss(step, batch, config.loss)
        total = step.total
        (loss / run.steps).backward()
        loss_sum += loss.detach() / run.steps
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), run.gradient_clip)
    # one transfer for all figures, after the work has been queued
    names = ["loss", "gradient_norm", *terms]
    values = torch.stack([loss_sum, norm, *terms.values()]).float().cpu().tolist()
    check_finite(values[:2], iteration)
    optimizer.step()
    return dict(zip(names, values, strict=True)) | {"learning_rate": rate}


def set_learning_rate(optimizer: torch.optim.Optimizer, run: WarmupSettings, iteration: int) -> float:
    """From the settings' rate to a hundredth of it along half a cosine."""
    rate = run.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * iteration / run.iterations)))
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def check_finite(values: list[float], iteration: int) -> None:
    """Stop a run whose loss or gradient is no number any more.

    Raises:
        MorphSeekError: with what to change.
    """
    if not all(math.isfinite(value) for value in values):
        raise MorphSeekError(
            f"The loss is not a number at iteration {iteration + 1}; lower training.learning_rate or raise "
            "loss.regularization, and start again."
        )


def _batches(dataset: Dataset, config: TrainingConfig, loader: PairLoader) -> Callable[[int], Batch]:
    """Iteration -> its batch, a pure function of the seed and the iteration."""
    seed = config.training.seed
    cases = dataset.split("training", "cases")
    if config.synthesis is not None:
        source = LabelMapSource([_needed(case.label, case) for case in cases], config.preprocessing, config.synthesis)

        def synthetic(iteration: int) -> Batch:
            pair = source.pair(generator_for(seed, "pairs", iteration))
            return Batch(**vars(pair))

        return synthetic
    if len(cases) < 2:
        raise MorphSeekError(f"{dataset.path} has {len(cases)} training case; warm-up needs at least two.")
    if config.loss.dice > 0 or config.loss.features > 0:
        raise MorphSeekError(
            "Warm-up from images is unsupervised; set loss.dice and loss.features to 0, or fine-tune with labels."
        )

    def real(iteration: int) -> Batch:
        pair = loader(training_pair(cases, dataset.pairing, generator_for(seed, "pairs", iteration)))
        return Batch(pair.fixed, pair.moving)

    return real


def validation_pairs(dataset: Dataset, run: WarmupSettings, loader: PairLoader) -> list[Callable[[], Any]]:
    """Functions that prepare the pairs of the split registration_val; synthetic runs without one use none.

    The training's own loader prepares them, so that a run keeps one set of cases in memory.
    """
    pairs = dataset.pairs.get("registration_val", [])[: run.validation_pairs]
    return [lambda pair=pair: loader(pair) for pair in pairs]


def _start_from(init: Path | str, model: RegistrationModel) -> None:
    """Take over a checkpoint's weights."""
    source, card = load(init)
    if card.model != model.settings:
        raise MorphSeekError(f"{Path(init).name} holds another model than the settings ask for; use its own settings.")
    model.load_state_dict(source.state_dict())


def _needed(path: Path | None, case: Any) -> Path:
    if path is None:
        raise MorphSeekError(f"{case.image} has no label map; synthesis needs one for every training case.")
    return path


def generator_for(seed: int, stream: Stream, iteration: int) -> torch.Generator:
    """The randomness of one iteration."""
    return torch.Generator().manual_seed(seed_for(seed, stream, iteration))


def seed_for(seed: int, stream: Stream, iteration: int) -> int:
    """Return a number for a run's seed, a stream and an iteration that has nothing to do with those of others.

    NumPy's SeedSequence hashes the three (as its ``spawn`` does), so that runs of neighboring seeds share nothing. It
    has 32 bits: a generator of torch on the CPU takes no more.
    """
    key = (get_args(Stream).index(stream), iteration)
    return int(np.random.SeedSequence(seed % 2**63, spawn_key=key).generate_state(1, np.uint32)[0])


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device, without waiting for the copies."""
    values = (getattr(batch, f.name) for f in dataclasses.fields(Batch))
    return Batch(*(None if v is None else v.to(device, non_blocking=True) for v in values))


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


_STATE_FORMAT = "2"  # streams of random numbers and what is owed, as they are since then


def _save_state(
    path: Path, fingerprint: str, model: RegistrationModel, optimizer: torch.optim.Adam, at: Standing
) -> None:
    """Everything that the iterations after ``at.done`` depend on."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()} | {f"best.{k}": v for k, v in at.best.items()}
    for name, parameter in model.named_parameters():
        tensors |= {f"adam.{k}.{name}": v for k, v in optimizer.state[parameter].items()}
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    standing = {f.name: getattr(at, f.name) for f in dataclasses.fields(Standing) if f.name != "best"}
    metadata = {"format": _STATE_FORMAT, "settings": fingerprint, "standing": json.dumps(standing)}
    write_atomically(path, serialize(tensors, metadata))


def _resume(path: Path, fingerprint: str, model: RegistrationModel, optimizer: torch.optim.Adam) -> Standing:
    """Load a state if there is one, into model and optimizer too.

    Raises:
        MorphSeekError: a damaged state, or one of other settings or another version.
    """
    if not path.is_file():
        return Standing()
    advice = f"remove {path} to start again, or choose another --out"
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("settings") != fingerprint:
                raise MorphSeekError(f"{path.name} belongs to a run with other settings; {advice}.")
            if metadata.get("format") != _STATE_FORMAT:
                raise MorphSeekError(f"{path.name} was written by another version of MorphSeek; {advice}.")
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise MorphSeekError(f"{path.name} cannot be read ({error}); {advice}.") from error
    model.load_state_dict({k: stored[f"model.{k}"] for k in model.state_dict()})
    moments = {}
    for index, (name, parameter) in enumerate(model.named_parameters()):
        keys = [k for k in ("step", "exp_avg", "exp_avg_sq") if f"adam.{k}.{name}" in stored]
        if keys:  # a parameter that no loss has reached yet has no moments
            moments[index] = {k: stored[f"adam.{k}.{name}"].to(parameter.device) for k in keys}
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    best = {k.removeprefix("best."): v for k, v in stored.items() if k.startswith("best.")}
    return Standing(**json.loads(metadata["standing"]), best=best)
