"""GRPO fine-tuning on labelled pairs (METHOD.md, section C): the run around :mod:`MorphSeekLib.training.grpo`.

Every refinement step of every pair adds lambda_policy L_policy + lambda_warm L_warm + lambda_Dice (1 - soft Dice) to
the loss of the iteration; with the policy's weight 0 it is the weakly supervised baseline, on the same code.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..data.datasets import Dataset, PairLoader, PreparedPair, augment, known_sizes, training_pair
from ..measures.metrics import label_figures
from ..networks.devices import place
from ..networks.model_file import Card, load, read_card, save, sha256, software
from ..networks.policy import RegistrationModel, draw
from ..protocol.errors import MorphSeekError
from ..protocol.job import SILENT, Job
from ..protocol.settings import to_dict
from ..protocol.startup import check_output_file
from ..space import fields
from .distributed import World
from .grpo import Group, advantages, next_kl_weight, policy_loss, sample_group
from .policies import PolicyGradientSettings, make_policy
from .rewards import RewardSettings, State, common_labels
from .trainer import (
    VALIDATION_DEFINITIONS,
    Batch,
    LossSettings,
    WarmupSettings,
    advance,
    check_finite,
    generator_for,
    set_learning_rate,
    state_file,
    train,
    validate,
    validation_pairs,
    warmup_loss,
)

SILENT_GROUPS = 50
UPDATES = ("step", "iteration")
FIELD_POLICY = PolicyGradientSettings(
    weight=20.0, place="field", sigma=0.5, credit="local", scale="none", s="1", antithetic=True, advance="mean"
)
"""The policy on control points with local credit, in the rewards' own units: the gradient of the expected reward."""
POSTERIOR_SAMPLES = 10
SPREAD_DEFINITION = "standard deviation of Dice over ten latent samples of one pair, one step"


@dataclass(frozen=True)
class FinetuneRun(WarmupSettings):
    """The run; see :class:`MorphSeekLib.training.trainer.WarmupSettings`.

    Attributes:
        pairs: pairs per iteration (over all processes).
        labels: use only the first so many labelled training cases; None for all.
        folding_limit: the kept weights have the best validation Dice among those with at most this share of folded
            cells (percent).
        augmentation: strength of the random deformations and contrasts of training images; see
            :func:`MorphSeekLib.data.datasets.augment`.
        kl_target: the KL to N(0, I) (mean over dimensions) that beta is steered to; None keeps ``loss.kl``.
        update: when the weights move: after each refinement "step", or once an "iteration", by all of them.
    """

    iterations: int = 800
    learning_rate: float = 3e-4
    steps: int = 3
    validate_every: int = 100
    validation_pairs: int = 20
    pairs: int = 1
    labels: int | None = None
    folding_limit: float = 1.0
    augmentation: float = 0.0
    kl_target: float | None = None
    update: str = "step"

    def __post_init__(self) -> None:
        if self.update not in UPDATES:
            raise ValueError(f"update is '{self.update}'; it must be one of {', '.join(UPDATES)}")


@dataclass(frozen=True)
class FinetuneConfig:
    """A whole settings file. The defaults are the form that did best in Testing/benchmarks/results (gain, main-table).

    Attributes:
        title, licence: for the card.
        loss: lambda_warm's terms and ``dice``, lambda_Dice.
        policy: lambda_policy and how a group is sampled; ``policy.weight = 0`` samples nothing. The paper's form is
            Resources/Training/finetune-paper.toml.
        reward: the terms of the reward and their weights.
    """

    title: str = ""
    licence: str = ""
    loss: LossSettings = field(default_factory=lambda: LossSettings(regularization=1.0, folding=10.0, dice=1.0))
    policy: PolicyGradientSettings = field(default_factory=lambda: FIELD_POLICY)
    reward: RewardSettings = field(default_factory=lambda: RewardSettings({"dice": 1.0, "folding": 20.0}))
    training: FinetuneRun = field(default_factory=FinetuneRun)


def finetune(
    dataset: Dataset,
    config: FinetuneConfig,
    init: Path | str,
    out: Path | str,
    *,
    device: torch.device | str = "cpu",
    world: World | None = None,
    job: Job = SILENT,
) -> Path:
    """Fine-tune a checkpoint, or go on where a killed run of the same settings stood.

    Args:
        dataset: labelled cases of the split "training"; pairs of "registration_val" choose the weights to keep.
        config: the settings.
        init: the checkpoint to start from; its model and preprocessing stay.
        out: the checkpoint to write; ``out.state``, ``out.log`` and ``out.jsonl`` lie beside it.
        device: where to train.
        world: the processes that share the work; alone by default.

    Raises:
        MorphSeekError: unusable data, settings or ``out``, or a run that collapsed (with what to change).
        Cancelled: the person stopped it; the state is saved.
    """
    out, run, world = Path(out), config.training, world or World()
    device = torch.device(device)
    check_output_file(out, ".safetensors", [dataset.path, init])
    if run.pairs % world.size:
        raise MorphSeekError(f"training.pairs is {run.pairs}; it must be a multiple of the {world.size} processes.")
    job.report("read", 0.0, "Reading the checkpoint and the training cases")
    model, card = load(init)
    model = place(model, device).train()
    preprocessing = dataclasses.replace(card.preprocessing, steps=run.steps)
    cases = dataset.split("training", "cases")
    needs_labels = (
        config.loss.dice > 0 or config.loss.features > 0 or (config.policy.weight > 0 and config.reward.needs_labels)
    )
    if needs_labels:
        cases = [case for case in cases if case.label is not None]
    cases = cases[: run.labels] if run.labels is not None else cases
    if len(cases) < 2:
        what = "labelled training cases" if needs_labels else "training cases"
        raise MorphSeekError(f"{dataset.path} offers {len(cases)} {what}; fine-tuning needs at least two.")
    if config.policy.weight > 0 and config.reward.weights.get("landmarks"):
        bare = next((case for case in cases if case.landmarks is None), None)
        if bare is not None:
            raise MorphSeekError(
                f"The reward 'landmarks' needs landmarks of every training case, but {bare.image.name} has none; name "
                f"them in {dataset.path.name}, or leave this reward out."
            )
    if config.loss.features > 0:
        _check_features(model, dataset)
    loader = PairLoader(preprocessing, model.multiple_of, run.centered)

    def pairs_of(iteration: int) -> list[PreparedPair]:
        """This process's pairs of an iteration."""
        found = []
        for index in range(world.rank, run.pairs, world.size):
            generator = generator_for(run.seed, "pairs", iteration * run.pairs + index)
            pair = loader(training_pair(cases, dataset.pairing, generator))
            found.append(augment(pair, run.augmentation, generator) if run.augmentation > 0 else pair)
        return found

    validation = validation_pairs(dataset, run, loader)[world.rank :: world.size]

    def validate_all(job: Job) -> dict[str, float]:
        with world.together():
            figures = validate(model, validation, run.steps, device, job)
            if "dice" in figures and world.rank == 0:
                spread = posterior_spread(model, validation[0](), config.policy.tau, device)
                figures |= {} if spread is None else {"posterior_dice_spread": spread}
        return world.mean_figures(figures, len(validation))

    optimizer = torch.optim.Adam(model.parameters(), lr=run.learning_rate)
    start = {"init": sha256(init), "cases": [str(c.image) for c in cases]}
    outcome = train(
        model,
        optimizer,
        run,
        lambda iteration, pairs, memory: _iterate(model, optimizer, pairs, config, iteration, memory, world, device),
        pairs_of,
        validate_all,
        out,
        json.dumps(to_dict(config) | start, sort_keys=True),
        score=lambda figures: score(figures, run.folding_limit),
        world=world,
        job=job,
    )
    with world.together():
        if world.rank == 0:
            sizes = known_sizes(cases) + (card.preprocessing.knows or ())
            preprocessing = dataclasses.replace(preprocessing, knows=(min(sizes), max(sizes)))
            card = Card(
                title=config.title or f"{card.title}, fine-tuned on {dataset.about.get('name', dataset.path.name)}",
                model=dataclasses.replace(card.model, policy=dataclasses.replace(card.model.policy, s=config.policy.s)),
                preprocessing=preprocessing,
                provenance={
                    "stage": "GRPO fine-tuning" if config.policy.weight > 0 else "weakly supervised",
                    "data": dataset.about | {"file": dataset.path.name},
                    "cases": len(cases),
                    "init": read_card(init).provenance | {"sha256": start["init"]},
                    "settings": to_dict(config),
                    "best_iteration": int(outcome.memory.get("best/iteration", run.iterations)),
                    "seconds": round(outcome.seconds),
                    "date": time.strftime("%Y-%m-%d"),
                    "software": software(),
                },
                results={
                    "validation": outcome.figures,
                    "definitions": VALIDATION_DEFINITIONS | {"posterior_dice_spread": SPREAD_DEFINITION},
                },
                licence=config.licence or card.licence,
            )
            save(out, model, card)
            state_file(out).unlink(missing_ok=True)
    job.report("write", 1.0, f"Wrote {out}")
    return out


def _check_features(model: RegistrationModel, dataset: Dataset) -> None:
    """Whether a backbone's learned features can stand for the labels of a data set."""
    count = model.backbone.learned_features
    if not count:
        raise MorphSeekError("loss.features needs a checkpoint whose backbone learns features; set it to 0.")
    name = dataset.path.name
    if not dataset.labels:
        raise MorphSeekError(f'loss.features needs the label values; name them under "labels" in {name}.')
    if max(dataset.labels) >= count:
        raise MorphSeekError(
            f"{name} has a label {max(dataset.labels)}, but feature c stands for label c and this checkpoint has "
            f"features 0 to {count - 1}; warm up one with more features, or set loss.features to 0."
        )


def score(figures: dict[str, float], folding_limit: float) -> float:
    """Dice where folding keeps to its limit; else below all of those, the less folding the better."""
    folded = figures["folded_percent"]
    return figures.get("dice", 0.0) if folded <= folding_limit else -1 - folded


def posterior_spread(model: RegistrationModel, pair: PreparedPair, tau: float, device: torch.device) -> float | None:
    """Standard deviation of hard Dice over ten latent samples of one step: near zero, the posterior has collapsed.
    None without labels in common."""
    if pair.fixed_labels is None or pair.moving_labels is None:
        return None
    values = []
    with torch.inference_mode():
        latent = model.encode(pair.moving.to(device), pair.fixed.to(device))
        for seed in range(POSTERIOR_SAMPLES):
            z = draw(latent.mu, latent.log_sigma, tau, 1, generator=torch.Generator().manual_seed(seed))
            step = model.displacement(model.field(latent, z)).cpu()
            warped = fields.warp(pair.moving_labels.float(), step, "nearest").int()[0, 0]
            values.append(label_figures(pair.fixed_labels[0, 0], warped, pair.moving_labels[0, 0]).mean_dice)
    return None if None in values else float(torch.tensor(values).std())


def _iterate(
    model: RegistrationModel,
    optimizer: torch.optim.Adam,
    pairs: list[PreparedPair],
    config: FinetuneConfig,
    iteration: int,
    memory: dict[str, float],
    world: World,
    device: torch.device,
) -> dict[str, float]:
    """All refinement steps of this iteration's pairs, on all processes, and the optimiser steps that they make."""
    run, policy = config.training, config.policy
    rate = set_learning_rate(optimizer, run, iteration)
    kl_weight = memory.setdefault("kl_weight", config.loss.kl)
    parameters = [p for p in model.parameters() if p.requires_grad]
    begun = []
    for index, pair in enumerate(pairs):
        number = iteration * run.pairs + world.rank + index * world.size  # whatever the processes, a pair's own
        begun.append((*prepare(pair, config, device), generator_for(run.seed, "policy", number)))
    figures: list[dict[str, Tensor]] = []
    norms: list[Tensor] = []
    optimizer.zero_grad(set_to_none=True)
    together = run.steps if run.update == "iteration" else 1
    for step in range(1, run.steps + 1):
        for index, (state, batch, generator) in enumerate(begun):
            found = _step(model, state, batch, config, kl_weight, together * run.pairs, generator)
            begun[index] = (state.moved(found.pop("total")), batch, generator)
            figures.append(found)
        if step % together == 0:
            world.sum_gradients(parameters)
            norms.append(torch.nn.utils.clip_grad_norm_(parameters, run.gradient_clip))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    names = sorted(figures[0])
    means = torch.stack([torch.stack([f[name].float() for f in figures]).mean() for name in names])
    norm = torch.stack(norms).mean().view(1).float()
    values = torch.cat([world.mean(means), norm]).cpu().tolist()  # one transfer for all figures
    metrics = dict(zip([*names, "gradient_norm"], values, strict=True))
    check_finite([metrics["loss"], metrics["gradient_norm"]], iteration)
    if run.kl_target is not None:
        memory["kl_weight"] = next_kl_weight(kl_weight, metrics["kl"], run.kl_target)
    if policy.weight > 0:
        _stop_if_collapsed(metrics, model, memory)
    return metrics | {"learning_rate": rate, "kl_weight": kl_weight}


def prepare(pair: PreparedPair, config: FinetuneConfig, device: torch.device) -> tuple[State, Batch]:
    """A pair on the device before its first step: hard labels for the reward, shares of the common for soft Dice."""
    zero = torch.zeros(1, 3, *pair.fixed.shape[2:], device=device)
    to = lambda tensor: None if tensor is None else tensor.to(device, non_blocking=True)  # noqa: E731
    state = State(
        to(pair.fixed),
        to(pair.moving),
        zero,
        to(pair.fixed_labels),
        to(pair.moving_labels),
        to(pair.fixed_points),
        to(pair.moving_points),
        spacing=tuple(float(s) for s in pair.grid.spacing),
    )
    batch = Batch(state.fixed, state.moving)
    if pair.fixed_labels is not None and pair.moving_labels is not None:
        state.labels = to(common_labels(pair.fixed_labels, pair.moving_labels))  # found on the CPU: no waiting
    if config.loss.dice > 0 or config.loss.features > 0:
        batch.structures = state.labels
        classes = torch.arange(1, len(state.labels) + 1, device=device).view(1, -1, 1, 1, 1)
        batch.fixed_labels = (state.fixed_classes == classes).float()
        batch.moving_labels = (state.moving_classes == classes).float()
    return state, batch


def _step(
    model: RegistrationModel,
    state: State,
    batch: Batch,
    config: FinetuneConfig,
    kl_weight: float,
    parts: int,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """One refinement step: its gradient, its figures (on the device), and under "total" the state it leads to."""
    policy = config.policy
    step = advance(model, batch, state.total)
    loss, terms = warmup_loss(step, batch, config.loss, kl_weight)
    total = step.total.detach()
    if policy.weight > 0:
        pi = make_policy(model, step.latent, step.field, policy)
        group = sample_group(pi, state, step.total, config.reward, generator)
        advantage = advantages(group, policy)
        gain = policy_loss(advantage, pi.log_likelihood(group.samples))
        loss, ratio = pi.backward(loss, gain, parts)
        terms |= _group_figures(group, advantage, step.latent.log_sigma) | {"policy_loss": gain.detach()}
        terms |= {} if ratio is None else {"policy_share": ratio}
        if policy.advance == "greedy":
            total = group.best
    else:
        (loss / parts).backward()
    return terms | {"loss": loss.detach(), "total": total}


def _group_figures(group: Group, advantage: list[Tensor], log_sigma: Tensor) -> dict[str, Tensor]:
    """For the curves: the group's rewards, its advantages (over trajectories and cells), the policy's sigma."""
    spread = group.rewards.std()
    flat = torch.cat([a.flatten() for a in advantage])
    return {
        "advantage_rms": flat.square().mean().sqrt(),
        "advantage_largest": flat.abs().max(),
        "reward": group.rewards.mean(),
        "reward_best": group.rewards.max(),
        "reward_spread": spread,
        "groups_without_spread": (spread < 1e-7).float(),
        "reward_of_mean": group.mean_reward,
        "sigma": log_sigma.detach().exp().mean(),
    }


def _stop_if_collapsed(metrics: dict[str, float], model: RegistrationModel, memory: dict[str, float]) -> None:
    """End a run that can learn nothing more.

    Raises:
        MorphSeekError: sigma at its floor, or no spread among the rewards for a long time.
    """
    floor = math.exp(model.settings.policy.log_sigma_min)
    if metrics["sigma"] < 1.05 * floor:
        raise MorphSeekError(
            f"The policy has collapsed: sigma is at its floor ({metrics['sigma']:.2g}); raise loss.kl, set "
            "training.kl_target, or lower policy.weight, and start again from the warm-up checkpoint."
        )
    silent = memory.get("silent_groups", 0) + 1 if metrics["groups_without_spread"] == 1 else 0
    memory["silent_groups"] = silent
    if silent >= SILENT_GROUPS:
        raise MorphSeekError(
            f"The rewards of a group have not differed for {SILENT_GROUPS} iterations, so there is nothing to learn "
            "from them; raise policy.tau (or policy.sigma), or choose other rewards."
        )
