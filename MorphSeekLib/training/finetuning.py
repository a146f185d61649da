"""GRPO fine-tuning on labeled pairs (Docs/method.md, section C): the run around :mod:`MorphSeekLib.training.grpo`.

Every step of every pair adds lambda_policy L_policy + lambda_warm L_warm + lambda_Dice (1 - soft Dice) to
the loss of the iteration; with the policy's weight 0 it is the weakly supervised baseline, on the same code.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..data.datasets import Case, Dataset, PreparedPair, augment, by_labels, known_sizes, label_values
from ..data.label_channels import channels_for
from ..measures.metrics import label_figures
from ..networks.devices import place
from ..networks.model_file import Card, load, read_card, sha256
from ..networks.policy import RegistrationModel, draw
from ..protocol.card import Provenance
from ..protocol.errors import MorphSeekError
from ..protocol.job import SILENT, Job
from ..registration.learned import likeliest
from ..space import fields
from .distributed import World
from .grpo import Objective, Walk, learn_step, next_kl_weight
from .losses import Batch, LossSettings
from .policies import PolicyGradientSettings
from .rewards import RewardSettings, State, common_labels
from .run_state import Memory
from .trainer import RunSettings, Task, Trainer, begin, check_finite, set_learning_rate, training_cases

SILENT_GROUPS = 50
UPDATES = ("step", "iteration")
FIELD_POLICY = PolicyGradientSettings(
    weight=20.0, place="field", sigma=0.5, credit="local", scale="none", s="1", antithetic=True, advance="mean"
)
"""The policy on control points with local credit, in the rewards' own units: the gradient of the expected reward."""
POSTERIOR_SAMPLES = 10
SPREAD_DEFINITION = "standard deviation of Dice over ten latent samples of one pair, one step"


@dataclass(frozen=True)
class FinetuneRun(RunSettings):
    """The run; see :class:`MorphSeekLib.training.trainer.RunSettings`.

    Attributes:
        pairs: pairs per iteration (over all processes).
        labels: use only this many labeled training cases, the first ones; None for all.
        folding_limit: the kept weights have the best validation Dice among those with at most this share of folded
            cells (percent).
        augmentation: strength of the random deformations and contrasts of training images; see
            :func:`MorphSeekLib.data.datasets.augment`.
        kl_target: the KL to N(0, I) (mean over dimensions) that beta is steered to; None keeps ``loss.kl``.
        update: when the weights move: after each "step", or once an "iteration", by all of them.
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
        super().__post_init__()
        if self.update not in UPDATES:
            raise ValueError(f"update is '{self.update}'; it must be one of {', '.join(UPDATES)}")


@dataclass(frozen=True)
class FinetuneConfig:
    """A whole settings file. The defaults are the form that did best in Testing/benchmarks/results (gain, main-table).

    Attributes:
        title, license: for the card.
        loss: lambda_warm's terms and ``dice``, lambda_Dice.
        policy: lambda_policy and how a group is sampled; ``policy.weight = 0`` samples nothing. The paper's form is
            the recipe finetune-paper.
        reward: the terms of the reward and their weights.
    """

    title: str = ""
    license: str = ""
    loss: LossSettings = field(default_factory=lambda: LossSettings(regularization=1.0, folding=10.0, dice=1.0))
    policy: PolicyGradientSettings = field(default_factory=lambda: FIELD_POLICY)
    reward: RewardSettings = field(default_factory=lambda: RewardSettings({"dice": 1.0, "folding": 20.0}))
    training: FinetuneRun = field(default_factory=FinetuneRun)


@dataclass
class FinetuneMemory(Memory):
    """Numbers of a fine-tuning that must survive a kill.

    Attributes:
        kl_weight: beta of the next iteration, which the controller steers.
        silent_groups: iterations in a row in which the rewards of no group differed.
    """

    kl_weight: float = 0.0
    silent_groups: int = 0


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
    """Fine-tune a model, or resume a killed run of the same settings.

    Args:
        dataset: labeled cases of the split "training", and any without labels, for which stands what the finder of the
            model finds, if it has one that knows all labels of the others; pairs of "registration_val" choose the
            weights to keep.
        config: the settings.
        init: the model to start from; its settings and preprocessing stay.
        out: the model file to write; what lies beside it meanwhile: see :class:`MorphSeekLib.training.trainer.Trainer`.
        device: where to train.
        world: the processes that share the work; alone by default.
        job: told of every iteration, and checked before it.

    Raises:
        MorphSeekError: unusable data, settings or ``out``, or a run that collapsed (with what to change).
        Cancelled: the user stopped it; the state is saved.
    """
    out = begin(out, dataset, job, init)
    return Trainer(Finetuning(dataset, config, init, torch.device(device), world), out, job).run()


class Finetuning(Task[list[PreparedPair]]):
    """Some pairs an iteration, shared by all processes, and a GRPO step for each of their steps."""

    config: FinetuneConfig
    run: FinetuneRun
    memory: FinetuneMemory

    def __init__(
        self,
        dataset: Dataset,
        config: FinetuneConfig,
        init: Path | str,
        device: torch.device,
        world: World | None = None,
    ) -> None:
        network, self._base = load(init)
        usable = _usable_cases(dataset, config)
        bare = [] if network.finder is None else _cases_to_label(dataset, config)
        values = label_values(usable) if bare or config.loss.features > 0 else ()
        if not set(values) <= set(self._base.labels):  # the finder would take what it does not know for background
            bare = []
        self.cases, self._channels = usable + bare, self._base.labels
        if config.loss.features > 0:
            torch.manual_seed(config.training.seed)  # of the weights that new features begin with
            network, self._channels = with_features(network, self._base, values)
        preprocessing = dataclasses.replace(self._base.preprocessing, steps=config.training.steps)
        super().__init__(dataset, config, place(network, device).train(), preprocessing, device, world)
        if self.run.pairs % self.world.size:
            raise MorphSeekError(
                f"training.pairs is {self.run.pairs}; it must be a multiple of the {self.world.size} processes."
            )
        if config.loss.features > 0:
            self.loader.channels = self._channels
        if bare:
            self.loader.labeler = partial(labels_found, self.network, self._base.labels, self.device)
            self.loader.unlabeled = frozenset(bare)
        self.memory = FinetuneMemory(kl_weight=config.loss.kl)
        self._init = init
        self.origin = {"init": sha256(init), "cases": [str(case.image) for case in self.cases]}

    def batch(self, iteration: int) -> list[PreparedPair]:
        """Draw this process's pairs of an iteration."""
        found = []
        for number in self._numbers(iteration):
            generator = self.generator("pairs", number)
            pair = self.pair(generator)
            found.append(augment(pair, self.run.augmentation, generator) if self.run.augmentation > 0 else pair)
        return found

    def update(self, iteration: int, batch: list[PreparedPair]) -> dict[str, float]:
        """Take all steps of this iteration's pairs, and the optimizer steps that they make."""
        config, run = self.config, self.run
        rate, kl_weight = set_learning_rate(self.optimizer, run, iteration, self.progress), self.memory.kl_weight
        together = run.steps if run.update == "iteration" else 1
        objective = Objective(config.loss, config.policy, config.reward, kl_weight, together * run.pairs)
        walks = [
            Walk(*prepare(pair, config, self.device), self.generator("policy", number))
            for number, pair in zip(self._numbers(iteration), batch, strict=True)
        ]
        figures: list[dict[str, Tensor]] = []
        norms: list[Tensor] = []
        self.optimizer.zero_grad(set_to_none=True)
        for step in range(1, run.steps + 1):
            for walk in walks:
                learned = learn_step(self.network, walk, objective)
                walk.state = walk.state.moved(learned.total)
                figures.append(learned.figures)
            if step % together == 0:
                norms.append(self._descend())
        metrics = self._means(figures, norms)
        check_finite([metrics["loss"], metrics["gradient_norm"]], iteration)
        if run.kl_target is not None:
            self.memory.kl_weight = next_kl_weight(kl_weight, metrics["kl"], run.kl_target)
        if config.policy.weight > 0:
            self._stop_if_collapsed(metrics)
        return metrics | {"learning_rate": rate, "kl_weight": kl_weight}

    def validate(self, job: Job) -> dict[str, float]:
        """Return the figures of this process's pairs, and on the first process the spread of a pair's samples."""
        figures = super().validate(job)
        if "dice" in figures and self.world.rank == 0:
            spread = posterior_spread(self.network, self.validation[0](), self.config.policy.tau, self.device)
            figures |= {} if spread is None else {"posterior_dice_spread": spread}
        return figures

    def score(self, figures: dict[str, float]) -> float:
        """Return :func:`score`."""
        return score(figures, self.run.folding_limit)

    def card(self) -> Card:
        """Return what the model file says of the fine-tuning."""
        config, base = self.config, self._base
        sizes = known_sizes(self.cases) + (base.preprocessing.knows or ())
        stage = "GRPO fine-tuning" if config.policy.weight > 0 else "weakly supervised"
        init: Provenance = {**read_card(self._init).provenance, "sha256": str(self.origin["init"])}
        more: Provenance = {"init": init}
        if bare := len(self.loader.unlabeled):
            more["unlabeled"] = bare
        name = self.dataset.about.get("name", self.dataset.path.name)
        return Card(
            title=config.title or f"{base.title}, fine-tuned on {name}",
            preprocessing=dataclasses.replace(self.preprocessing, knows=(min(sizes), max(sizes))),
            provenance=self.provenance(stage, len(self.cases) - bare, more),
            results={"definitions": {"posterior_dice_spread": SPREAD_DEFINITION}},
            license=base.license,
            labels=self._channels,
            compare=base.compare,
            share=base.share,
            volumes=base.volumes,
            fewest=base.fewest,
        )

    def _numbers(self, iteration: int) -> range:
        """Return the numbers of this process's pairs; whatever the processes, a pair has its own."""
        first = iteration * self.run.pairs
        return range(first + self.world.rank, first + self.run.pairs, self.world.size)

    def _descend(self) -> Tensor:
        """Move the weights along the gradients of all processes; return the gradients' norm."""
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        self.world.sum_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.run.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _means(self, figures: list[dict[str, Tensor]], norms: list[Tensor]) -> dict[str, float]:
        """Return the means of figures over steps, pairs and processes, and of gradient norms."""
        names = sorted(figures[0])
        means = torch.stack([torch.stack([f[name].float() for f in figures]).mean() for name in names])
        norm = torch.stack(norms).mean().view(1).float()
        values = torch.cat([self.world.mean(means), norm]).cpu().tolist()  # one transfer for all figures
        return dict(zip([*names, "gradient_norm"], values, strict=True))

    def _stop_if_collapsed(self, metrics: dict[str, float]) -> None:
        """Stop a run that cannot learn any more.

        Raises:
            MorphSeekError: sigma at its floor, or no spread among the rewards for a long time.
        """
        floor = math.exp(self.network.settings.policy.log_sigma_min)
        if metrics["sigma"] < 1.05 * floor:
            raise MorphSeekError(
                f"The policy has collapsed: sigma is at its floor ({metrics['sigma']:.2g}); raise loss.kl, set "
                "training.kl_target, or lower policy.weight, and start again from the model of the warm-up."
            )
        silent = self.memory.silent_groups + 1 if metrics["groups_without_spread"] == 1 else 0
        self.memory.silent_groups = silent
        if silent >= SILENT_GROUPS:
            raise MorphSeekError(
                f"The rewards of a group have not differed for {SILENT_GROUPS} iterations, so there is nothing to "
                "learn from them; raise policy.tau (or policy.sigma), or choose other rewards."
            )


def _usable_cases(dataset: Dataset, config: FinetuneConfig) -> list[Case]:
    """Return the training cases that have what losses and rewards need.

    Raises:
        MorphSeekError: fewer than two, or one without landmarks that a reward needs.
    """
    cases = training_cases(dataset, "fine-tuning", _needs_labels(config), config.training.labels)
    if _needs_landmarks(config):
        bare = next((case for case in cases if case.landmarks is None), None)
        if bare is not None:
            raise MorphSeekError(
                f"The reward 'landmarks' needs landmarks of every training case, but {bare.file.name} has none; name "
                f"them in {dataset.path.name}, or leave this reward out."
            )
    return cases


def _cases_to_label(dataset: Dataset, config: FinetuneConfig) -> list[Case]:
    """Return the training cases without labels whose labels losses or rewards need, and that have what else these
    need."""
    if not _needs_labels(config):
        return []
    bare = by_labels(dataset.split("training", "cases"))[1]
    return [case for case in bare if case.landmarks is not None or not _needs_landmarks(config)]


def _needs_labels(config: FinetuneConfig) -> bool:
    labeled = config.loss.dice > 0 or config.loss.features > 0
    return labeled or (config.policy.weight > 0 and config.reward.needs_labels)


def _needs_landmarks(config: FinetuneConfig) -> bool:
    return config.policy.weight > 0 and bool(config.reward.weights.get("landmarks"))


@torch.no_grad()
def labels_found(
    network: RegistrationModel, channels: Mapping[int, int], device: torch.device, image: Tensor
) -> Tensor:
    """Return the label value of each voxel, int32 (i, j, k), by what a model's finder says.

    Args:
        network: with a finder.
        channels: label value -> channel of the finder; of values that share one, the first counts.
        device: the network's.
        image: (1, 1, i, j, k), as the model's card prepares it.
    """
    found = network.found(image.to(device))
    assert found is not None  # it has a finder
    best = likeliest(found)[0, 0].cpu()
    values = torch.zeros(found.shape[1] + 1, dtype=torch.int32)
    for value, channel in reversed(list(channels.items())):
        values[channel] = value
    return values[best]


def with_features(
    model: RegistrationModel, card: Card, values: Sequence[int]
) -> tuple[RegistrationModel, dict[int, int]]:
    """Return a model whose features can stand for label values, and the channel of each value.

    Args:
        model: keeps the features that it has; a model without any gets some, and moves images as before.
        card: the model's, whose labels keep their channels.
        values: the labels of the cases.

    Raises:
        MorphSeekError: the network can learn no features, or there are too many labels.
    """
    # a model of before had no labels on its card: its feature c stands for label c
    known = card.labels or {value: value for value in values if value < model.backbone.learned_features}
    channels = channels_for(values, known)
    grown = model.with_features(1 + max(channels.values(), default=0))
    if grown is None:
        raise MorphSeekError(
            f"The network '{model.settings.backbone}' of the model to start from cannot learn features; set "
            "loss.features to 0."
        )
    return grown, channels


def score(figures: dict[str, float], folding_limit: float) -> float:
    """Return Dice where folding keeps to its limit; else a lower score, the less folding the better."""
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


def prepare(pair: PreparedPair, config: FinetuneConfig, device: torch.device) -> tuple[State, Batch]:
    """Return a pair on the device before its first step: hard labels for the reward, classes of the common
    ones for soft Dice."""
    zero = torch.zeros(1, 3, *pair.fixed.shape[2:], device=device)
    i, j, k = pair.grid.spacing.tolist()
    fixed, moving = (image.to(device, non_blocking=True) for image in (pair.fixed, pair.moving))
    state = State(fixed, moving, zero, spacing=(i, j, k))
    for name in ("fixed_labels", "moving_labels", "fixed_points", "moving_points"):
        if (tensor := getattr(pair, name)) is not None:
            setattr(state, name, tensor.to(device, non_blocking=True))
    batch = Batch(state.fixed, state.moving)
    if pair.fixed_labels is not None and pair.moving_labels is not None:
        common = common_labels(pair.fixed_labels, pair.moving_labels)  # found on the CPU: no waiting
        state.labels = common.to(device, non_blocking=True)
    if config.loss.dice > 0 or config.loss.features > 0:
        batch.structures = state.labels
        batch.fixed_classes, batch.moving_classes = state.class_maps
    return state, batch
