"""Warm-up (Docs/method.md, section B): training on images without labels, or on synthetic pairs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..data.datasets import Dataset, known_sizes, label_maps
from ..data.synthesis import LabelMapSource, SynthesisSettings
from ..networks.devices import place
from ..networks.model_file import Card, load, read_card, sha256
from ..networks.policy import ModelSettings, RegistrationModel
from ..protocol.card import Provenance
from ..protocol.errors import MorphSeekError
from ..protocol.job import SILENT, Job
from ..space.preprocessing import Preprocessing
from .losses import Batch, LossSettings, advance, to_device, warmup_loss
from .trainer import RunSettings, Task, Trainer, begin, check_finite, set_learning_rate, training_cases


@dataclass(frozen=True)
class TrainingConfig:
    """A whole settings file.

    Attributes:
        title, license: for the card.
        synthesis: present when pairs are made from label maps.
    """

    title: str = ""
    license: str = ""
    model: ModelSettings = field(default_factory=ModelSettings)
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    loss: LossSettings = field(default_factory=LossSettings)
    training: RunSettings = field(default_factory=RunSettings)
    synthesis: SynthesisSettings | None = None


def warmup(
    dataset: Dataset,
    config: TrainingConfig,
    out: Path | str,
    *,
    device: torch.device | str = "cpu",
    init: Path | str | None = None,
    job: Job = SILENT,
) -> Path:
    """Train from scratch or from a model, or resume a killed run of the same settings.

    Args:
        dataset: cases of the split "training"; pairs of the split "registration_val" are validated on.
        config: the settings.
        out: the model file to write; what lies beside it meanwhile: see :class:`MorphSeekLib.training.trainer.Trainer`.
        device: where to train.
        init: a model of the same settings whose weights to start from.
        job: told of every iteration, and checked before it.

    Raises:
        MorphSeekError: unusable data, settings or ``out``, a state of other settings, or a loss that is not a number.
        Cancelled: the user stopped it; the state is saved.
    """
    out = begin(out, dataset, job, init)
    return Trainer(Warmup(dataset, config, init, torch.device(device)), out, job).run()


class Warmup(Task[Batch]):
    """One pair an iteration, and the warm-up loss of each of its steps."""

    keeps_best = False
    config: TrainingConfig

    def __init__(self, dataset: Dataset, config: TrainingConfig, init: Path | str | None, device: torch.device) -> None:
        torch.manual_seed(config.training.seed)
        network = place(RegistrationModel(config.model), device)
        if init is not None:
            _start_from(init, network)
        super().__init__(dataset, config, network, config.preprocessing, device)
        self._source = None
        if config.synthesis is not None:
            self.cases = dataset.split("training", "cases")
            self._source = LabelMapSource(label_maps(self.cases), config.preprocessing, config.synthesis)
        else:
            self.cases = training_cases(dataset, "warm-up")
            if config.loss.dice > 0 or config.loss.features > 0:
                raise MorphSeekError(
                    "Warm-up from images is unsupervised; set loss.dice and loss.features to 0, or fine-tune with "
                    "labels."
                )
        self._init = init
        self.origin = {"init": None if init is None else sha256(init)}

    def batch(self, iteration: int) -> Batch:
        """Draw a pair, or make one."""
        generator = self.generator("pairs", iteration)
        if self._source is not None:
            return Batch(**vars(self._source.pair(generator)))
        pair = self.pair(generator)
        return Batch(pair.fixed, pair.moving)

    def update(self, iteration: int, batch: Batch) -> dict[str, float]:
        """Take all steps of a pair, and one of the optimizer."""
        run, batch = self.run, to_device(batch, self.device)
        rate = set_learning_rate(self.optimizer, run, iteration, self.progress)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros(1, 3, *batch.fixed.shape[2:], device=batch.fixed.device)
        loss_sum = torch.zeros((), device=batch.fixed.device)
        for _ in range(run.steps):
            step = advance(self.network, batch, total.detach())
            loss, terms = warmup_loss(step, batch, self.config.loss)
            total = step.total
            (loss / run.steps).backward()
            loss_sum += loss.detach() / run.steps
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), run.gradient_clip)
        # one transfer for all figures, after the work has been queued
        names = ["loss", "gradient_norm", *terms]
        values = torch.stack([loss_sum, norm, *terms.values()]).float().cpu().tolist()
        check_finite(values[:2], iteration)
        self.optimizer.step()
        return dict(zip(names, values, strict=True)) | {"learning_rate": rate}

    def card(self) -> Card:
        """Return what the model file says of the warm-up."""
        config, dataset, synthesis = self.config, self.dataset, self.config.synthesis
        known = known_sizes(self.cases, None if synthesis is None else synthesis.anatomy)
        more: Provenance = {"synthetic": synthesis is not None, "init": None}
        if self._init is not None:
            more["init"] = {**read_card(self._init).provenance, "sha256": str(self.origin["init"])}
        return Card(
            title=config.title or f"{config.model.backbone} warm-up on {dataset.about.get('name', dataset.path.name)}",
            preprocessing=dataclasses.replace(config.preprocessing, steps=self.run.steps, knows=known),
            provenance=self.provenance("warm-up", len(self.cases), more),
        )


def _start_from(init: Path | str, network: RegistrationModel) -> None:
    """Take over a model's weights."""
    source, card = load(init)
    if card.model != network.settings:
        raise MorphSeekError(f"{Path(init).name} holds another model than the settings ask for; use its own settings.")
    network.load_state_dict(source.state_dict())
