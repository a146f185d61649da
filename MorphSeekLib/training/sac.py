"""Soft actor-critic for SPAC (Luo et al. 2021), the 64-d reinforcement learning that MorphSeek is compared with.

One iteration is one episode: a pair is registered in small steps whose plans are drawn, each step is rewarded with the
gain in Dice (or LNCC), and goes into a replay buffer. Every few steps a batch from the buffer teaches, in this order,
two critics (soft Q-learning against slowly following targets), now and then the planner and the temperature, and the
actor by the registration loss, with the planner on it.

Defects of the official code, as read in its repository; none is reproduced here unless a setting says so:

- the registration loss makes gradients for the planner, whose features the actor needs, and throws them away
  (``planner_registers = false``);
- mean and log-variance of a plan pass a LeakyReLU (backbone setting ``rectified_plan``);
- its smoothness loss takes 0.01 from each difference before squaring: it draws fields toward that slope;
- the reward silently turns from NCC to the Dice of the whole foreground where labels are there: here ``reward`` says
  which, and Dice is the mean over structures;
- composition takes zero displacement from beyond the image: here the edge value holds;
- 128x128x128 voxels alone and CUDA alone; every state is copied into the buffer in float32, about 27 GB for 800.

Differences that are choices of the official code are settings with its values as defaults: steps are limited to one
voxel in training and to three at inference, the target entropy is -16 for 64 numbers, planner and critics learn five
times slower than the actor. A killed run resumes from its state, but fills its replay buffer again first.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbones.memory import channels_last
from ..backbones.spac import SLOPE, SPAC, Plan, SPACSettings, conv
from ..data.datasets import Dataset, PreparedPair
from ..measures.regularizers import diffusion
from ..measures.similarity import lncc, multiresolution_lncc
from ..networks.devices import training_autocast
from ..networks.model_file import Card
from ..networks.policy import Latent, ModelSettings, PolicySettings, RegistrationModel, kl_to_standard_normal
from ..protocol.job import SILENT, Job
from ..protocol.settings import to_dict
from ..space import fields
from ..space.preprocessing import Preprocessing
from .rewards import State, common_labels
from .run_state import Memory
from .trainer import RunSettings, Task, Trainer, begin, check_finite, training_cases

REWARDS = ("dice", "lncc")


@dataclass(frozen=True)
class SACRun(RunSettings):
    """The run; see :class:`MorphSeekLib.training.trainer.RunSettings`, of which an iteration is an episode here.

    Attributes:
        learning_rate: of the actor and the temperature, constant.
        slower: planner and critics learn by this share of it.
        steps: of an episode, and of inference.
        labels: use only this many labeled training cases, the first ones; None for all.
        reward: "dice" (mean over structures, of labels) or "lncc"; a step is rewarded with 100 times its gain.
        goal, bonus: an episode that reaches this value ends with this reward on top.
        max_step: limit of a step in training, voxels of the network's grid.
        explore: episodes before learning begins.
        buffer: transitions that are kept.
        batch: transitions that an update learns from.
        update_every: steps between updates of critics and actor; planner_every: updates between those of the planner.
        discount: gamma.
        follow: tau, the share of the critics that their targets take over with each update.
        temperature: alpha at the beginning.
        target_entropy: what alpha steers the plan's entropy to.
        regularization: weight of the step's diffusion beside the multi-resolution LNCC (windows 9, 7, 5).
        kl: weight of the plan's KL to N(0, I) in the planner's and in the registration loss.
        planner_registers: whether the registration loss teaches the planner, too (see the module's docstring).
    """

    iterations: int = 2000
    learning_rate: float = 4e-5
    slower: float = 0.2
    steps: int = 20
    validate_every: int = 200
    labels: int | None = None
    reward: str = "dice"
    goal: float = 0.98
    bonus: float = 10.0
    max_step: float = 1.0
    explore: int = 100
    buffer: int = 800
    batch: int = 4
    update_every: int = 8
    planner_every: int = 2
    discount: float = 0.99
    follow: float = 0.005
    temperature: float = math.exp(-1)
    target_entropy: float = -16.0
    regularization: float = 1.0
    kl: float = 0.01
    planner_registers: bool = True

    def __post_init__(self) -> None:
        if self.reward not in REWARDS:
            raise ValueError(f"reward is '{self.reward}'; it must be one of {', '.join(REWARDS)}")
        if min(self.steps, self.batch, self.update_every, self.planner_every) < 1 or self.buffer < self.batch:
            raise ValueError("steps, batch, update_every and planner_every must be at least 1, buffer at least batch")
        if min(self.max_step, self.temperature, self.learning_rate, self.slower) <= 0:
            raise ValueError("max_step, temperature, learning_rate and slower must be above 0")


@dataclass(frozen=True)
class SACConfig:
    """A whole settings file.

    Attributes:
        title, license: for the card.
        network: widths, and the size that images are brought to.
    """

    title: str = ""
    license: str = ""
    network: SPACSettings = field(default_factory=SPACSettings)
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    training: SACRun = field(default_factory=SACRun)


class Critic(nn.Module):
    """Q: a pair (batch, 2, *size) and a plan (batch, plan, 1, 1, 1) -> the reward to come, (batch,)."""

    def __init__(self, settings: SPACSettings) -> None:
        super().__init__()
        widths = (2, *settings.encoder)
        self.down = nn.ModuleList(conv(a, b, 4, 2) for a, b in zip(widths, settings.encoder, strict=False))
        self.out = conv(widths[-1], settings.plan, settings.coarsest, padding=0)
        self.value = nn.Linear(2 * settings.plan, 1)
        channels_last(self)

    def forward(self, pair: Tensor, plan: Tensor) -> Tensor:
        x = pair
        for layer in self.down:
            x = F.leaky_relu_(layer(x), SLOPE)
        x = self.out(x)
        both = F.leaky_relu(torch.cat([x.to(plan.dtype), plan], dim=1).flatten(1), SLOPE)
        with torch.autocast(both.device.type, enabled=False):
            return self.value(both)[:, 0]


class Learner(nn.Module):
    """All that is trained: the network of the model file, two critics, their targets, the temperature."""

    def __init__(self, network: RegistrationModel, run: SACRun) -> None:
        super().__init__()
        self.network = network
        settings = self.backbone.settings
        self.critics = nn.ModuleList(Critic(settings) for _ in range(2))
        self.targets = nn.ModuleList(Critic(settings) for _ in range(2)).requires_grad_(False)
        self.targets.load_state_dict(self.critics.state_dict())
        self.log_temperature = nn.Parameter(torch.tensor(math.log(run.temperature)))

    @property
    def backbone(self) -> SPAC:
        """The network's backbone, as what it is."""
        return cast(SPAC, self.network.backbone)

    def optimizer(self, run: SACRun) -> torch.optim.Adam:
        """Return one Adam for all; a parameter without a gradient is not touched by a step."""

        def rate(name: str) -> float:
            slow = name.startswith(("network.backbone.planner", "critics"))
            return run.learning_rate * (run.slower if slow else 1)

        groups = [{"params": [p], "lr": rate(name)} for name, p in self.named_parameters()]
        return torch.optim.Adam(groups, betas=(0.5, 0.9))


class Transition(NamedTuple):
    """One step of an episode, on the network's grid.

    Attributes:
        before, after: pairs (1, 2, *size), the fixed image first, on the CPU in half precision.
        plan: (1, plan, 1, 1, 1), on the CPU.
        reward: of the step.
        done: 1 where the goal was reached: nothing follows; 0 where the episode went on, or merely ended.
    """

    before: Tensor
    plan: Tensor
    reward: float
    after: Tensor
    done: float


class Batch(NamedTuple):
    """Transitions, stacked on the device; rewards and ``done`` are (batch,)."""

    before: Tensor
    plan: Tensor
    reward: Tensor
    after: Tensor
    done: Tensor


def stack(transitions: Sequence[Transition], device: torch.device) -> Batch:
    """Return what an update learns from."""
    before, plan, reward, after, done = zip(*transitions, strict=True)
    tensors = (torch.cat(before), torch.cat(plan), torch.tensor(reward), torch.cat(after), torch.tensor(done))
    return Batch(*(t.to(device, non_blocking=True).float() for t in tensors))


def sample(plan: Plan, generator: torch.Generator | None = None) -> Tensor:
    """Return a plan drawn from the planner's Gaussian, with its gradient; noise from the CPU's generator."""
    noise = torch.randn(plan.mean.shape, generator=generator).to(plan.mean)
    return plan.mean + (0.5 * plan.log_variance).exp() * noise


def log_density(plan: Plan, drawn: Tensor) -> Tensor:
    """Return (batch,): the logarithm of the planner's density at a plan."""
    deviation = (0.5 * plan.log_variance).exp()
    return torch.distributions.Normal(plan.mean, deviation).log_prob(drawn).flatten(1).sum(dim=1)


def kl(plan: Plan) -> Tensor:
    """Return KL(N(mean, variance) || N(0, 1)), the mean over the plan's numbers."""
    return kl_to_standard_normal(Latent(plan.mean, 0.5 * plan.log_variance, []))


def critic_loss(learner: Learner, batch: Batch, run: SACRun, generator: torch.Generator | None = None) -> Tensor:
    """Return the critics' mean squared distance to r + gamma (1 - done) (min Q'(s', a') - alpha log pi(a'|s'))."""
    with torch.no_grad():
        plan = learner.backbone.planner(batch.after)
        drawn = sample(plan, generator)
        value = torch.minimum(*(target(batch.after, drawn) for target in learner.targets))
        value = value - learner.log_temperature.exp() * log_density(plan, drawn)
        goal = batch.reward + run.discount * (1 - batch.done) * value
    first, second = (F.mse_loss(critic(batch.before, batch.plan), goal) for critic in learner.critics)
    return first + second


def planner_loss(
    learner: Learner, batch: Batch, run: SACRun, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Return alpha log pi(a|s) - min Q(s, a) + weight KL, and the temperature's loss, which raises alpha while
    the entropy is below its target."""
    plan = learner.backbone.planner(batch.before)
    drawn = sample(plan, generator)
    density = log_density(plan, drawn)
    value = torch.minimum(*(critic(batch.before, drawn) for critic in learner.critics))
    temperature = -(learner.log_temperature * (density.detach() + run.target_entropy)).mean()
    return (learner.log_temperature.exp().detach() * density - value).mean() + run.kl * kl(plan), temperature


def registration_loss(learner: Learner, batch: Batch, run: SACRun, generator: torch.Generator | None = None) -> Tensor:
    """Return the similarity of the fixed image and the moving one after one more step, plus the step's smoothness."""
    backbone = learner.backbone
    plan = backbone.planner(batch.before)
    step = backbone.actor(sample(plan, generator), plan.features).float()
    fixed, moving = batch.before.split(1, dim=1)
    similarity = multiresolution_lncc(fixed, fields.warp(moving, step), window=9)
    return similarity + run.regularization * diffusion(step) + run.kl * kl(plan)


def descend(optimizer: torch.optim.Adam, loss: Tensor, parts: Sequence[nn.Module | nn.Parameter], clip: float) -> None:
    """Take one optimizer step of these parts alone; the others' gradients are not computed."""
    parameters = [p for part in parts for p in ([part] if isinstance(part, nn.Parameter) else part.parameters())]
    optimizer.zero_grad(set_to_none=True)
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient
    torch.nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def update(
    learner: Learner,
    optimizer: torch.optim.Adam,
    batch: Batch,
    run: SACRun,
    with_planner: bool,
    generator: torch.Generator | None = None,
) -> dict[str, float]:
    """Update critics, planner and temperature (when due), actor and targets; return the losses by name."""
    backbone, clip = learner.backbone, run.gradient_clip
    losses = {}
    precision = partial(training_autocast, batch.before.device, backbone.settings.coarsest[0])

    def learn(name: str, loss: Tensor, *parts: nn.Module | nn.Parameter) -> None:
        descend(optimizer, loss, parts, clip)
        losses[name] = loss.detach()

    with precision():
        loss = critic_loss(learner, batch, run, generator)
    learn("critic_loss", loss, learner.critics)
    if with_planner:
        with precision():
            loss, temperature = planner_loss(learner, batch, run, generator)
        learn("planner_loss", loss, backbone.planner)
        learn("temperature_loss", temperature, learner.log_temperature)
    with precision():
        loss = registration_loss(learner, batch, run, generator)
    learn("registration_loss", loss, backbone.actor, *([backbone.planner] if run.planner_registers else []))
    with torch.no_grad():
        for target, critic in zip(learner.targets.parameters(), learner.critics.parameters(), strict=True):
            target.lerp_(critic, run.follow)
    return dict(zip(losses, torch.stack([*losses.values()]).tolist(), strict=True))


@dataclass
class SACMemory(Memory):
    """Numbers of a training that must survive a kill.

    Attributes:
        steps: of all episodes so far.
    """

    steps: int = 0


def train_spac(
    dataset: Dataset,
    config: SACConfig,
    out: Path | str,
    *,
    device: torch.device | str = "cpu",
    job: Job = SILENT,
) -> Path:
    """Train a SPAC model, or resume a killed run of the same settings.

    Args:
        dataset: cases of the split "training", labeled for the reward "dice"; pairs of "registration_val" choose the
            weights to keep.
        config: the settings.
        out: the model file to write; what lies beside it meanwhile: see :class:`MorphSeekLib.training.trainer.Trainer`.
        device: where to train.
        job: told of every iteration, and checked before it.

    Raises:
        MorphSeekError: unusable data or settings, or a loss that is not a number.
        Cancelled: the user stopped it; the state is saved.
    """
    out = begin(out, dataset, job)
    return Trainer(SoftActorCritic(dataset, config, torch.device(device)), out, job).run()


class SoftActorCritic(Task[PreparedPair]):
    """One episode an iteration: registers a pair with drawn plans, keeps the transitions and learns from them."""

    config: SACConfig
    run: SACRun
    memory: SACMemory
    trained: Learner

    def __init__(self, dataset: Dataset, config: SACConfig, device: torch.device) -> None:
        run = config.training
        cases = training_cases(dataset, "this training", run.reward == "dice", run.labels)
        torch.manual_seed(run.seed)
        network = RegistrationModel(ModelSettings("spac", to_dict(config.network), PolicySettings(mean="linear")))
        super().__init__(dataset, config, network, dataclasses.replace(config.preprocessing, steps=run.steps), device)
        self.cases = cases
        self.memory = SACMemory()
        self.origin = {"cases": [str(case.image) for case in cases]}
        self.transitions: deque[Transition] = deque(maxlen=run.buffer)
        self.episodes = 0

    def learner(self) -> tuple[Learner, torch.optim.Adam]:
        """Return the network with its critics, and one Adam for all."""
        learner = Learner(self.network, self.run).to(self.device)
        return learner, learner.optimizer(self.run)

    def batch(self, iteration: int) -> PreparedPair:
        """Draw a pair."""
        return self.pair(self.generator("pairs", iteration))

    def update(self, iteration: int, batch: PreparedPair) -> dict[str, float]:
        """Take one episode, with the updates that are due in it."""
        run, backbone = self.run, self.trained.backbone
        generator = self.generator("policy", iteration)
        state = self._start(batch)
        score = first = self._standing(state, state.moving)
        before, losses, gained = backbone.pair(state.moving, state.fixed), [], 0.0
        for _ in range(run.steps):
            with torch.no_grad(), training_autocast(self.device):
                plan = backbone.planner(before)
                drawn = sample(plan, generator)
                step = backbone.actor(drawn, plan.features).float().clamp(-run.max_step, run.max_step)
            state = state.moved(fields.compose(state.total, fields.resize(step, state.fixed.shape[2:])))
            moved = fields.warp(state.moving, state.total)
            after, new = backbone.pair(moved, state.fixed), self._standing(state, moved)
            done = new >= run.goal
            reward = 100 * (new - score) + (run.bonus if done else 0.0)
            step_taken = Transition(before.half().cpu(), drawn.cpu(), reward, after.half().cpu(), float(done))
            self.transitions.append(step_taken)
            before, score, gained = after, new, gained + reward
            losses += self._learn(generator)
            if done:
                break
        self.episodes += 1
        means = {name: [row[name] for row in losses if name in row] for row in losses for name in row}
        figures = {name: sum(values) / len(values) for name, values in means.items()}
        check_finite([*figures.values(), gained], iteration)
        temperature = float(self.trained.log_temperature.detach().exp())
        return figures | {"reward": gained, "score": score, "score_before": first, "temperature": temperature}

    def card(self) -> Card:
        """Return what the model file says of the training."""
        return Card(
            title=self.config.title or f"SPAC on {self.dataset.about.get('name', self.dataset.path.name)}",
            preprocessing=self.preprocessing,
            provenance=self.provenance("soft actor-critic", len(self.cases)),
        )

    def _start(self, pair: PreparedPair) -> State:
        labels = [None if v is None else v.to(self.device) for v in (pair.fixed_labels, pair.moving_labels)]
        zero = torch.zeros(1, 3, *pair.fixed.shape[2:], device=self.device)
        state = State(pair.fixed.to(self.device), pair.moving.to(self.device), zero, labels[0], labels[1])
        if self.run.reward == "dice" and pair.fixed_labels is not None and pair.moving_labels is not None:
            state.labels = common_labels(pair.fixed_labels, pair.moving_labels).to(self.device)
        return state

    @torch.no_grad()
    def _standing(self, state: State, moved: Tensor) -> float:
        """Return where a pair stands: mean hard Dice, or LNCC."""
        if self.run.reward == "lncc":
            return -float(lncc(state.fixed, moved))
        return float(state.dice(state.warped_classes(state.total)).mean())

    def _learn(self, generator: torch.Generator) -> list[dict[str, float]]:
        """Do an update, if one is due; return its losses."""
        run = self.run
        self.memory.steps += 1
        taken = self.memory.steps
        if self.episodes < run.explore or taken % run.update_every or len(self.transitions) < run.batch:
            return []
        with_planner = taken // run.update_every % run.planner_every == 0
        chosen = torch.randperm(len(self.transitions), generator=generator)[: run.batch].tolist()
        batch = stack([self.transitions[n] for n in chosen], self.device)
        return [update(self.trained, self.optimizer, batch, run, with_planner, generator)]
