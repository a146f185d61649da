"""Training: the loop that all runs share, and warm-up (METHOD.md, section B) on images or on synthetic pairs.

Every iteration is a pure function of (settings, seed, iteration, weights, optimiser, memory): a run that was killed at
any moment and is resumed ends with the same weights as one that was not. Fine-tuning is :mod:`MorphSeekLib.finetuning`.
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
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save as serialize
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from . import fields
from .checkpoint import Card, load, read_card, save, sha256, software, write_atomically
from .datasets import Dataset, PairLoader, known_sizes, training_pair
from .devices import network_autocast, place, training_autocast
from .errors import Cancelled, MorphSeekError
from .events import Event, OnEvent, checkpoint_for, ignore, never
from .metrics import dice_per_label, folding
from .policy import Latent, ModelSettings, RegistrationModel, kl_to_standard_normal, refine
from .preprocessing import Preprocessing
from .regularizers import diffusion, folding_penalty
from .rewards import landmark_errors
from .settings import to_dict
from .similarity import SIMILARITIES
from .synthesis import LabelMapSource, SynthesisSettings


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
    learned = model.backbone.learned(latent.skips) if hasattr(model.backbone, "learned") else None
    return Step(latent, field, total, outer, learned)


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
    on_event: OnEvent = ignore,
    cancelled: Callable[[], bool] = never,
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
        on_event: told of every iteration.
        cancelled: asked every iteration; True ends the run.

    Raises:
        MorphSeekError: unusable data or settings, or a state of other settings, or a loss that is not a number.
        Cancelled: the person stopped it; the state is saved.
    """
    out = Path(out)
    if out.suffix != ".safetensors":
        raise MorphSeekError(f"The checkpoint {out.name} must be named with the ending .safetensors.")
    run, device = config.training, torch.device(device)
    on_event(Event("read", 0.0, "Reading the training cases"))
    torch.manual_seed(run.seed)
    model = place(RegistrationModel(config.model), device)
    if init is not None:
        _start_from(init, model)
    optimizer = torch.optim.Adam(model.parameters(), lr=run.learning_rate)
    batch_of = _batches(dataset, config, model.multiple_of)
    validation = validation_pairs(dataset, config.preprocessing, run, model.multiple_of)
    start = {"init": sha256(init) if init is not None else None}
    outcome = train(
        model,
        optimizer,
        run,
        lambda iteration, batch, memory: _iterate(model, optimizer, to_device(batch, device), config, iteration),
        batch_of,
        lambda check: validate(model, validation, run.steps, device, check),
        out,
        json.dumps(to_dict(config) | start, sort_keys=True),
        on_event=on_event,
        cancelled=cancelled,
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
    on_event(Event("write", 1.0, f"Wrote {out}"))
    return out


@dataclass
class Outcome:
    """What :func:`train` ends with: the figures of the kept weights, seconds spent, the run's memory."""

    figures: dict[str, float]
    seconds: float
    memory: dict[str, float]


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
    main: bool = True,
    on_event: OnEvent = ignore,
    cancelled: Callable[[], bool] = never,
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
        main: whether this process writes files (one of several does).

    Raises:
        MorphSeekError: a state of other settings.
        Cancelled: the person stopped it; the state is saved.
    """
    checkpoint = checkpoint_for(cancelled)
    state = state_file(out)
    memory: dict[str, float] = {}
    best: dict[str, Tensor] = {}
    begin, seconds = _resume(state, fingerprint, model, optimizer, memory, best)
    log = _Log(out, begin) if main else None
    started = time.monotonic() - seconds
    done = begin
    figures: dict[str, float] = {k.removeprefix("best/"): v for k, v in memory.items() if k.startswith("best/")}

    def keep_state() -> None:
        if main:
            _save_state(state, fingerprint, model, optimizer, done, time.monotonic() - started, memory, best)

    try:
        with ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(batch_of, begin)
            for iteration in range(begin, run.iterations):
                checkpoint()
                batch = coming.result()
                coming = ahead.submit(batch_of, min(iteration + 1, run.iterations - 1))
                torch.manual_seed(seed_for(run.seed + 2, iteration))  # layers that drop at random draw from there
                metrics = iterate(iteration, batch, memory)
                done = iteration + 1
                last = done == run.iterations
                if done % run.validate_every == 0 or last:
                    model.eval()
                    found = validate(checkpoint)
                    model.train()
                    metrics = metrics | {f"validation/{k}": v for k, v in found.items()}
                    if score is None or not found:
                        figures = found
                    elif "score" not in memory or score(found) > memory["score"]:
                        figures = found
                        memory["score"] = score(found)
                        memory |= {f"best/{k}": v for k, v in found.items()} | {"best/iteration": done}
                        best = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
                elapsed = time.monotonic() - started
                if log is not None:
                    log.write(done, metrics)
                message = (
                    f"Iteration {done} of {run.iterations}, {_clock(elapsed / done * (run.iterations - done))} left"
                )
                on_event(Event("train", done / run.iterations, message, done, run.iterations, metrics))
                if done % run.save_every == 0 and not last:
                    keep_state()
    except Cancelled:
        keep_state()
        raise
    finally:
        if log is not None:
            log.close()
    if best:
        model.load_state_dict(best)
    return Outcome(figures, time.monotonic() - started, memory)


def state_file(out: Path) -> Path:
    """Where an unfinished run of a checkpoint keeps what it needs to go on."""
    return out.with_name(out.name + ".state")


class _Log:
    """Curves for TensorBoard, and the same figures as JSON lines; what a killed run logged beyond its state is cut."""

    def __init__(self, out: Path, begin: int) -> None:
        self._writer = SummaryWriter(str(out.with_name(out.name + ".log")), purge_step=begin)
        path = out.with_name(out.name + ".jsonl")
        lines = path.read_text(encoding="utf-8").splitlines() if begin and path.is_file() else []
        self._file = path.open("w", encoding="utf-8")
        self._file.writelines(f"{line}\n" for line in lines[:begin])

    def write(self, iteration: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name if "/" in name else f"training/{name}", value, iteration)
        self._file.write(json.dumps({"iteration": iteration} | metrics) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._writer.close()
        self._file.close()


VALIDATION_DEFINITIONS = {
    "dice": "mean hard Dice over labels and pairs, nearest-neighbour warped labels on the working grid",
    "dice_before": "the same before registration, on the working grid",
    "njd_percent": "share of working-grid voxels with a Jacobian determinant <= 0 (central differences)",
    "sdlogj": "standard deviation of log J over voxels, as metrics.folding defines it",
    "tre_mm": "mean distance of mapped fixed landmarks to their partners, mm",
}


def validate(
    model: RegistrationModel,
    pairs: list[Callable[[], Any]],
    steps: int,
    device: torch.device,
    checkpoint: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Mean figures over labelled pairs on the working grid; see VALIDATION_DEFINITIONS. Empty without pairs."""
    rows = []
    for make in pairs:
        checkpoint()
        pair = make()
        fixed, moving = pair.fixed.to(device), pair.moving.to(device)
        with torch.inference_mode(), network_autocast(device):
            total = refine(model, lambda u, moving=moving: fields.warp(moving, u), fixed, steps)
        figures = folding(total.cpu())
        row = {"njd_percent": figures.njd_percent, "sdlogj": figures.sdlogj}
        if pair.fixed_labels is not None and pair.moving_labels is not None:
            warped = fields.warp(pair.moving_labels.float(), total.cpu(), "nearest").int()[0, 0]
            known, before = pair.fixed_labels[0, 0], pair.moving_labels[0, 0]
            row["dice"] = _mean(dice_per_label(known, warped, moving_labels=before))
            row["dice_before"] = _mean(dice_per_label(known, before, moving_labels=before))
        if pair.fixed_points is not None and pair.moving_points is not None:
            spacing = pair.grid.spacing.tolist()
            row["tre_mm"] = float(landmark_errors(total.cpu(), pair.fixed_points, pair.moving_points, spacing).mean())
        rows.append(row)
    names = rows[0] if rows else {}
    return {name: sum(row[name] for row in rows) / len(rows) for name in names}


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


def _batches(dataset: Dataset, config: TrainingConfig, multiple_of: int) -> Callable[[int], Batch]:
    """Iteration -> its batch, a pure function of the seed and the iteration."""
    seed = config.training.seed
    cases = dataset.split("training", "cases")
    if config.synthesis is not None:
        source = LabelMapSource([_needed(case.label, case) for case in cases], config.preprocessing, config.synthesis)

        def synthetic(iteration: int) -> Batch:
            pair = source.pair(generator_for(seed, iteration))
            return Batch(**vars(pair))

        return synthetic
    if len(cases) < 2:
        raise MorphSeekError(f"{dataset.path} has {len(cases)} training case; warm-up needs at least two.")
    if config.loss.dice > 0 or config.loss.features > 0:
        raise MorphSeekError(
            "Warm-up from images is unsupervised; set loss.dice and loss.features to 0, or fine-tune with labels."
        )
    loader = PairLoader(config.preprocessing, multiple_of, config.training.centered)

    def real(iteration: int) -> Batch:
        pair = loader(training_pair(cases, dataset.pairing, generator_for(seed, iteration)))
        return Batch(pair.fixed, pair.moving)

    return real


def validation_pairs(
    dataset: Dataset, preprocessing: Preprocessing, run: WarmupSettings, multiple_of: int
) -> list[Callable[[], Any]]:
    """Functions that prepare the pairs of the split registration_val; synthetic runs without one use none."""
    pairs = dataset.pairs.get("registration_val", [])[: run.validation_pairs]
    loader = PairLoader(preprocessing, multiple_of, run.centered)
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


def generator_for(seed: int, iteration: int) -> torch.Generator:
    """The randomness of one iteration."""
    return torch.Generator().manual_seed(seed_for(seed, iteration))


def seed_for(seed: int, iteration: int) -> int:
    """A number for a run's seed and an iteration, unlike those of other iterations and seeds."""
    return (seed * 1_000_003 + iteration) % 2**63


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device, without waiting for the copies."""
    values = (getattr(batch, f.name) for f in dataclasses.fields(Batch))
    return Batch(*(None if v is None else v.to(device, non_blocking=True) for v in values))


def _mean(values: dict[int, float]) -> float:
    return sum(values.values()) / len(values) if values else float("nan")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def _save_state(
    path: Path,
    fingerprint: str,
    model: RegistrationModel,
    optimizer: torch.optim.Adam,
    done: int,
    seconds: float,
    memory: dict[str, float],
    best: dict[str, Tensor],
) -> None:
    """Everything that the iterations after ``done`` depend on."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()} | {f"best.{k}": v for k, v in best.items()}
    for name, parameter in model.named_parameters():
        tensors |= {f"adam.{k}.{name}": v for k, v in optimizer.state[parameter].items()}
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    metadata = {"done": str(done), "seconds": str(seconds), "settings": fingerprint, "memory": json.dumps(memory)}
    write_atomically(path, serialize(tensors, metadata))


def _resume(
    path: Path,
    fingerprint: str,
    model: RegistrationModel,
    optimizer: torch.optim.Adam,
    memory: dict[str, float],
    best: dict[str, Tensor],
) -> tuple[int, float]:
    """Load a state if there is one, into all that is given; (iterations done, seconds spent)."""
    if not path.is_file():
        return 0, 0.0
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        if metadata.get("settings") != fingerprint:
            raise MorphSeekError(
                f"{path.name} belongs to a run with other settings; remove it to start anew, or choose another --out."
            )
        stored = set(file.keys())
        model.load_state_dict({k: file.get_tensor(f"model.{k}") for k in model.state_dict()})
        best |= {k.removeprefix("best."): file.get_tensor(k) for k in stored if k.startswith("best.")}
        moments = {}
        for index, (name, parameter) in enumerate(model.named_parameters()):
            keys = [k for k in ("step", "exp_avg", "exp_avg_sq") if f"adam.{k}.{name}" in stored]
            if keys:  # a parameter that no loss has reached yet has no moments
                moments[index] = {k: file.get_tensor(f"adam.{k}.{name}").to(parameter.device) for k in keys}
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
        memory |= json.loads(metadata.get("memory", "{}"))
    return int(metadata["done"]), float(metadata["seconds"])
