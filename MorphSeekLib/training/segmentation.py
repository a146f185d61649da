"""Features that know the labels: a network learns which label each voxel of one image belongs to.

A fit that compares these probabilities brings labeled structures together, smoothly and within a second, from a few
labeled cases and minutes of training. Every iteration bends some cases at random, paints them brighter and darker, and
lowers cross-entropy + 1 - soft Dice (Isensee et al., nnU-Net, Nature Methods 2021). Where there are cases without
labels, half of what an iteration sees are such: what the network finds in the bent case is what it has to find in the
same after it was painted (FixMatch, Sohn et al., NeurIPS 2020). Validated is what a user gets: the Dice of pairs that
are fitted by the features.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backbones.segmenter import Segmenter
from ..data.datasets import (
    Case,
    Dataset,
    PreparedPair,
    by_labels,
    known_sizes,
    known_volumes,
    label_maps,
    label_values,
)
from ..data.label_channels import channels_for, to_channels
from ..data.synthesis import LabelMapSource, SynthesisSettings
from ..io.images import read_image
from ..measures.metrics import mean
from ..measures.scores import score_displacement
from ..networks.devices import network_autocast, place, training_autocast
from ..networks.model_file import Card, load, read_card, sha256
from ..networks.policy import ModelSettings, RegistrationModel
from ..protocol.card import Provenance
from ..protocol.errors import MorphSeekError
from ..protocol.job import SILENT, Job
from ..registration.descent import descend, halved
from ..registration.learned import decided
from ..registration.objective import Level, upsample
from ..registration.plans import LEARNED, LEARNED_WEIGHT
from ..space.preprocessing import Preprocessing, general, working_grid
from .examples import MOST_VOXELS, bent, painted, patch_size, segmentation_loss, window
from .trainer import (
    VALIDATION_FIGURES,
    RunSettings,
    Task,
    Trainer,
    begin,
    check_finite,
    set_learning_rate,
    training_cases,
)


@dataclass(frozen=True)
class SegmentationRun(RunSettings):
    """The run; see :class:`MorphSeekLib.training.trainer.RunSettings`, whose ``steps`` mean nothing here.

    Attributes:
        cases: of an iteration; half of them unlabeled ones where there are any.
        bending: strength of the random deformations; see :func:`bent`.
    """

    iterations: int = 1500
    learning_rate: float = 3e-3
    gradient_clip: float = 5.0
    average: float = 0.995
    cases: int = 2
    bending: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cases < 1:
            raise ValueError(f"cases is {self.cases}; it must be at least 1")


@dataclass(frozen=True)
class SegmentationConfig:
    """A whole settings file.

    Attributes:
        title, license: for the card.
        width, depth, block: see :class:`MorphSeekLib.backbones.segmenter.SegmenterSettings`.
        compare: of the card: what is fitted by these features, "features" alone or "both" them and intensities.
        synthesis: present when images are made from label maps, one an iteration; they are bent already.
        structures: label values that share a channel; labels of none are background. Empty: each label has its own.
    """

    title: str = ""
    license: str = ""
    width: int = 12
    depth: int = 3
    block: int = 1
    compare: Literal["features", "both"] = "features"
    synthesis: SynthesisSettings | None = None
    structures: tuple[tuple[int, ...], ...] = ()
    preprocessing: Preprocessing = field(default_factory=lambda: Preprocessing(low=0.0))
    training: SegmentationRun = field(default_factory=SegmentationRun)


_SHAPE = ("width", "depth", "block")
_WIDE, _BLOCK = 16, 2  # of a network for images that are seen in parts
_BELIEVED = 300  # iterations, before what the network finds in unlabeled cases counts
_LOOKED_AT = 5  # cases


@dataclass(frozen=True)
class Examples:
    """What an iteration sees.

    Attributes:
        images: (n, 1, i, j, k), 0 to about 1.
        labels: (l, 1, i, j, k) int64, the channels that stand for the labels, 0 for the background, of the first l.
        plain: (n - l, 1, i, j, k), the others before they were painted.
    """

    images: Tensor
    labels: Tensor
    plain: Tensor


def suited(config: SegmentationConfig, dataset: Dataset, init: Path | str | None = None) -> SegmentationConfig:
    """Return settings that suit the cases: network and preprocessing of the model that is gone on from, or CT seen
    through a window, and a network that computes in blocks where an iteration sees a part of an image only.

    Fourteen abdomens (112x96x80 voxels, 13 labels) come in blocks to a Dice in 13 minutes that voxel by voxel they do
    not reach in 40; images that are seen whole do not need it.
    """
    if init is not None:
        card = read_card(init)
        known = {name: value for name, value in card.model.backbone_settings.items() if name in _SHAPE}
        return dataclasses.replace(config, preprocessing=card.preprocessing, **{"block": 1, **known})
    cases = dataset.split("training", "cases")  # those of two modalities often come one kind after the other
    places = torch.linspace(0, len(cases) - 1, min(len(cases), _LOOKED_AT)).round().long().tolist()
    images = [read_image(cases[place].image) for place in places if cases[place].image is not None]
    if images and (seen := general(*(image.data for image in images))).intensity == "window":
        windowed = dataclasses.replace(config.preprocessing, intensity="window", low=seen.low, high=seen.high)
        config = dataclasses.replace(config, preprocessing=windowed)
    sizes = [math.prod(working_grid(image.grid, config.preprocessing, 1).shape) for image in images]
    if sizes and max(sizes) > MOST_VOXELS:
        return dataclasses.replace(config, width=_WIDE, block=_BLOCK)
    return config


def train_features(
    dataset: Dataset,
    config: SegmentationConfig,
    out: Path | str,
    *,
    device: torch.device | str = "cpu",
    init: Path | str | None = None,
    job: Job = SILENT,
) -> Path:
    """Train features for a fit to compare, or resume a killed run of the same settings.

    Args:
        dataset: at least two labeled cases of the split "training", and any without labels; pairs of "registration_val"
            choose the weights to keep.
        config: the settings.
        out: the model file to write; what lies beside it meanwhile: see :class:`MorphSeekLib.training.trainer.Trainer`.
        device: where to train.
        init: a model with features to go on from.
        job: told of every iteration, and checked before it.

    Raises:
        MorphSeekError: unusable data, settings or ``out``, or a loss that is not a number.
        Cancelled: the user stopped it; the state is saved.
    """
    out = begin(out, dataset, job, init)
    return Trainer(Segmentation(dataset, config, torch.device(device), init), out, job).run()


class Segmentation(Task[Examples]):
    """Some cases an iteration, each bent at random.

    Attributes:
        unlabeled: cases to learn from by what the network itself finds in them.
        channels: label value -> channel.
    """

    config: SegmentationConfig
    run: SegmentationRun

    def __init__(
        self, dataset: Dataset, config: SegmentationConfig, device: torch.device, init: Path | str | None = None
    ) -> None:
        if config.synthesis is None:
            self.cases, self._source = training_cases(dataset, "learning features", labeled=True), None
        else:
            self.cases = dataset.split("training", "cases")
            self._source = LabelMapSource(label_maps(self.cases), config.preprocessing, config.synthesis)
        self.unlabeled = by_labels(dataset.split("training", "cases"))[1] if self._source is None else []
        self.channels = {value: n for n, values in enumerate(config.structures, start=1) for value in values}
        if not self.channels:
            self.channels = channels_for(label_values(self.cases), {} if init is None else read_card(init).labels)
        if not self.channels:
            raise MorphSeekError(f"The label maps of {dataset.path} hold no label but 0, so there is nothing to learn.")
        shape = {name: getattr(config, name) for name in _SHAPE}
        settings = {"features": 1 + max(self.channels.values()), **shape}
        torch.manual_seed(config.training.seed)
        network = RegistrationModel(ModelSettings("segmenter", settings))
        if init is not None:
            _start_from(init, network)
        network = place(network, device)
        super().__init__(dataset, config, network, config.preprocessing, device)
        self.loader.channels = self.channels
        self._init = init
        begun = None if init is None else sha256(init)
        self.origin = {"init": begun, "cases": [str(case.image) for case in self.cases + self.unlabeled]}

    def batch(self, iteration: int) -> Examples:
        """Draw cases, and bend them, or make one."""
        generator = self.generator("pairs", iteration)
        if self._source is not None:
            shape = self.config.preprocessing.shape
            assert shape is not None  # the source refuses to be made without one
            box = window(shape, self.network.multiple_of, generator)
            image, made = self._source.labeled(generator, box)
            return Examples(image, to_channels(made, self.channels).long(), image[:0])
        believed = iteration >= _BELIEVED and bool(self.unlabeled)
        bare = self.run.cases // 2 if believed else 0
        drawn = [_draw(self.cases, generator) for _ in range(self.run.cases - bare)]
        drawn += [_draw(self.unlabeled, generator) for _ in range(bare)]
        found = [self.loader.alone(case) for case in drawn]
        size = patch_size([tuple(image.shape[2:]) for image, _ in found], self.network.multiple_of)
        seen, images, known = [], [], []
        for whole, values in found:
            labels = torch.zeros_like(whole) if values is None else values
            image, bent_labels = bent(whole, labels, size, self.run.bending, generator)
            seen.append(image)
            images.append(painted(image, generator))
            known.append(bent_labels)
        count = self.run.cases - bare
        return Examples(torch.cat(images), torch.cat(known[:count]), torch.cat([seen[0][:0], *seen[count:]]))

    def update(self, iteration: int, batch: Examples) -> dict[str, float]:
        """Take a step of the optimizer."""
        rate = set_learning_rate(self.optimizer, self.run, iteration, self.progress)
        images, labels = batch.images.to(self.device), batch.labels.to(self.device)
        backbone = self.network.backbone
        assert isinstance(backbone, Segmenter)
        self.optimizer.zero_grad(set_to_none=True)
        with training_autocast(self.device, images.shape[2] // self.network.multiple_of):
            if len(batch.plain):
                labels = torch.cat([labels, _believed(backbone, batch.plain.to(self.device))])
            scores = backbone.scores(images)
        loss = segmentation_loss(scores.float(), labels)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.run.gradient_clip)
        values = torch.stack([loss.detach(), norm]).cpu().tolist()
        check_finite(values, iteration)
        self.optimizer.step()
        return {"loss": values[0], "gradient_norm": values[1], "learning_rate": rate}

    def validate(self, job: Job) -> dict[str, float]:
        """Return the figures of pairs that are fitted by the features."""
        rows = []
        for number, prepared in enumerate(self.validation):
            job.check()
            pair = prepared()
            total = fitted_by(self.network, pair, self.device)
            rows.append(score_displacement(total.cpu(), pair.grid.spacing.tolist(), pair.labels, pair.points))
            job.report("validate", number / len(self.validation), "Validating", number + 1, len(self.validation))
        means = {name: mean(row.number(name) for row in rows) for name in VALIDATION_FIGURES}
        return {name: value for name, value in means.items() if value is not None}

    def card(self) -> Card:
        """Return what the model file says of the training."""
        config, dataset = self.config, self.dataset
        init: Provenance | None = None
        if self._init is not None:
            init = {**read_card(self._init).provenance, "sha256": str(self.origin["init"])}
        volumes, fewest = known_volumes(self.cases, self.channels)
        name, synthesis = dataset.about.get("name", dataset.path.name), config.synthesis
        known = known_sizes(self.cases, None if synthesis is None else synthesis.anatomy)
        preprocessing = dataclasses.replace(config.preprocessing, steps=1, knows=known)
        more: Provenance = {"init": init, "synthetic": synthesis is not None}
        if self.unlabeled:
            more["unlabeled"] = len(self.unlabeled)
        if synthesis is not None:  # what is made lies in the middle of a box; a scan is seen whole
            preprocessing = dataclasses.replace(preprocessing, shape=None)
        return Card(
            title=config.title or f"Features for a fit, learned from {name}",
            preprocessing=preprocessing,
            provenance=self.provenance("features", len(self.cases), more),
            labels=self.channels,
            compare=config.compare,
            volumes=volumes,
            fewest=fewest,
        )


def _start_from(init: Path | str, network: RegistrationModel) -> None:
    """Take over the weights of another model with features; new labels begin as they are.

    Raises:
        MorphSeekError: it is another kind of network.
    """
    source, _ = load(init)
    own, found = network.state_dict(), source.state_dict()
    if source.settings.backbone != "segmenter" or set(own) != set(found):
        raise MorphSeekError(
            f"{Path(init).name} is no model of features of this width and depth, so they cannot be learned from it; "
            "train them from scratch, or choose the stage finetune."
        )
    for name, value in own.items():
        shared = min(len(value), len(found[name]))
        if value.shape[1:] != found[name].shape[1:]:
            raise MorphSeekError(f"{Path(init).name} holds features of another width; train them from scratch.")
        value[:shared] = found[name][:shared]
    network.load_state_dict(own)


def _draw(cases: list[Case], generator: torch.Generator) -> Case:
    return cases[int(torch.randint(len(cases), (1,), generator=generator))]


@torch.no_grad()
def _believed(network: Segmenter, images: Tensor) -> Tensor:
    """Return the channels, (n, 1, i, j, k) int64, that a network finds in images."""
    return network.scores(images).argmax(dim=1, keepdim=True)


@torch.no_grad()
def fitted_by(network: RegistrationModel, pair: PreparedPair, device: torch.device) -> Tensor:
    """Return the displacement, (1, 3, i, j, k) voxels, of a fit that compares what the network finds in two images."""
    maps = []
    with network_autocast(device):
        for image in (pair.fixed, pair.moving):
            found = network.found(image.to(device))
            assert found is not None
            maps.append(found)
    plan, shape = LEARNED["best"], pair.fixed.shape[2:]
    beyond = [-n % (2 << max(plan.levels)) for n in shape]  # whole blocks on every level
    maps = [F.pad(found, [side for n in reversed(beyond) for side in (0, n)]) for found in (decided(maps[0]), maps[1])]
    levels = []
    for level in plan.levels:
        fixed, moving = maps
        for _ in range(level):
            fixed, moving = halved(fixed), halved(moving)
        counted = torch.ones([n // 2 for n in fixed.shape[2:]], dtype=torch.bool, device=device)
        levels.append(Level(fixed, moving, counted, LEARNED_WEIGHT, plan.regularization, plan.folding))
    ends = descend(levels, plan.iterations, None, plan.rate, torch.get_num_threads())
    i, j, k = shape
    return upsample(ends[-1].control)[..., :i, :j, :k]
