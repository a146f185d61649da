"""What the estimated error was calibrated on: weights, offsets, and by which images' look they are used.

``trust.json`` beside this file is written by ``Testing/benchmarks/trust.py calibrate``. It holds for one fit: where
:func:`fingerprint` differs from the one that it names, no kind of pair is known any more.

A kind is used only where all of this holds; otherwise the kind is unknown, and no millimeters are given:

- the answer is of the stage, and by the model, that was calibrated, with no other choice made than that of a preset
  for which the bounds were found to hold on cases that were not calibrated on;
- every figure of both images' :func:`look_of` lies in the range of the images that were calibrated on, and a quarter of
  that range around it;
- no other kind fits as well.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ..networks.loading import LoadedModel
from ..protocol.job import SILENT, Job
from ..protocol.options import RegistrationOptions
from ..protocol.settings import from_dict
from ..space.background import quiet_background
from ..space.geometry import Volume
from ..space.preprocessing import foreground_of, general, normalize, sampled
from . import judge, objective, plans, search, trust
from .alignment import object_size
from .pair import Outcome, Pair

FILE = Path(__file__).with_name("trust.json")
DECILES = tuple(n / 10 for n in range(1, 10))
"""Of which offsets are stored."""
_DEPTH = 8  # cells along the longest side of what is shown, over which depth is averaged


@dataclass(frozen=True)
class Kind:
    """A kind of pair that was calibrated.

    Attributes:
        title: in words.
        stage: that gives the answer.
        model: SHA-256 of the model's file; "" for none.
        fixed, moving: figure of :func:`look_of` -> smallest and largest value that is known.
        weights: of the logarithms of the three quantities.
        offsets: preset -> offset of each of :data:`DECILES`.
        pairs: preset -> how many simulated pairs these come from.
        told: the presets for which millimeters are told: what they promise was found to hold on unseen cases.
    """

    title: str = ""
    stage: str = "fit"
    model: str = ""
    fixed: dict[str, tuple[float, float]] = field(default_factory=dict)
    moving: dict[str, tuple[float, float]] = field(default_factory=dict)
    weights: tuple[float, float, float] = (0.0, 0.0, 0.0)
    offsets: dict[str, tuple[float, ...]] = field(default_factory=dict)
    pairs: dict[str, int] = field(default_factory=dict)
    told: tuple[str, ...] = ()

    def fits(self, fixed: dict[str, float], moving: dict[str, float]) -> bool:
        """Return whether two images look as those that were calibrated on."""
        return all(
            low <= image.get(figure, math.nan) <= high
            for ranges, image in ((self.fixed, fixed), (self.moving, moving))
            for figure, (low, high) in ranges.items()
        )


@dataclass(frozen=True)
class Calibration:
    """The file.

    Attributes:
        fit: :func:`fingerprint` of the fit that was calibrated.
        date: of the calibration.
        weights, pooled: weights and offsets of all fitted kinds together, for colors where the kind is unknown.
        kinds: by name.
        learned: the fingerprint of the fit by learned features; another makes the kinds unknown that are fitted so.
    """

    fit: str
    date: str
    weights: tuple[float, float, float]
    pooled: tuple[float, ...]
    kinds: dict[str, Kind] = field(default_factory=dict)
    learned: str = ""

    def of(self, kind: str | None, preset: str) -> tuple[tuple[float, float, float], tuple[float, ...]]:
        """Return weights and offsets of a kind, or of all where it is None."""
        if kind is None:
            return self.weights, self.pooled
        return self.kinds[kind].weights, self.kinds[kind].offsets[preset]

    def kind_of(
        self, pair: Pair, outcome: Outcome, model: LoadedModel | None, options: RegistrationOptions
    ) -> str | None:
        """Return the name of a pair's kind; None where it is unknown."""
        usual = RegistrationOptions(preset=options.preset)
        chosen = ("search", "fit", "similarity", "fit_iterations", "stop_early", "steps")
        calibrated = self.fit == fingerprint()
        if pair.learned is not None:
            calibrated = calibrated and self.learned == fingerprint(learned=True)
        if not calibrated or any(getattr(options, name) != getattr(usual, name) for name in chosen):
            return None
        stage = outcome.figures[outcome.answer]["stage"]
        sha = "" if model is None else str(model.sha256)
        possible = {
            name: kind
            for name, kind in self.kinds.items()
            if kind.stage == stage and kind.model == sha and options.preset in kind.told
        }
        if not possible:
            return None
        fixed, moving = (look_of(volume, pair.job) for volume in pair.known)
        fitting = [name for name, kind in possible.items() if kind.fits(fixed, moving)]
        return fitting[0] if len(fitting) == 1 else None


@functools.cache
def calibration() -> Calibration:
    """Return what comes with MorphSeek."""
    return from_dict(Calibration, json.loads(FILE.read_text(encoding="utf-8")), FILE.name)


def fingerprint(learned: bool = False) -> str:
    """Return what the answers of search and fit, and so the offsets, depend on: versions and all settings, hashed.

    Args:
        learned: of a fit by what a model has learned.
    """
    names: tuple[str, ...] = ("CORRELATION", "CORRELATION_FROM_NEAR", "CORRELATION_OPPOSITE", "FEATURES")
    if learned:
        names += ("LEARNED_VERSION", "LEARNED", "LEARNED_WEIGHT", "BESIDE_WEIGHT", "BESIDE_LEVELS")
    settings = {
        "version": plans.VERSION,
        "plans": {name: getattr(plans, name) for name in (*names, "FINER", "FEW_VOXELS")},
        "search": [search.PASSES, search.SMALL, search.MOST_COSTS],
        "objective": [objective.EPSILON, objective.SHOWN, objective.WANTED],
        "judge": judge.FAR,
        "trust": [trust.ADDED, trust.LEAST, trust.SIGMA, trust.STIFFER, trust.STIFFER_ELSE],
    }
    text = json.dumps(settings, sort_keys=True, default=dataclasses.asdict)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def look_of(image: Volume, job: Job = SILENT) -> dict[str, float]:
    """Return how an image looks.

    Returns:
        ``ct`` (1 for Hounsfield units, 0 else), ``voxel_mm`` (edge of a cube of a voxel's volume), ``uneven`` (longest
        edge over the shortest), ``size_mm`` (of the object), ``shown`` (share of the voxels that are not background),
        ``q10``, ``q50``, ``q90`` (quantiles of what is shown, of the range that the fit sees) and ``deep`` (correlation
        of brightness with how much is shown around).
    """
    prepared = general(image.data)
    data = quiet_background(normalize(image.data, prepared))
    inside = foreground_of(data)
    values = sampled(data[inside])
    low, middle, high = torch.quantile(values, torch.tensor([0.1, 0.5, 0.9])).tolist() if len(values) else (0.0,) * 3
    return {
        "ct": float(prepared.intensity == "window"),
        "voxel_mm": float(np.prod(image.grid.spacing) ** (1 / 3)),
        "uneven": float(image.grid.spacing.max() / image.grid.spacing.min()),
        "size_mm": object_size(image, job),
        "shown": float(inside.float().mean()),
        "q10": low,
        "q50": middle,
        "q90": high,
        "deep": _deep(data, inside),
    }


def _deep(data: torch.Tensor, inside: torch.Tensor) -> float:
    """Return the correlation of brightness with the share of what is shown around a voxel, over what is shown."""
    size = max(1, round(max(data.shape) / (4 * _DEPTH)))
    cells = [min(size, n) for n in data.shape]
    shown = F.avg_pool3d(inside.float()[None, None], cells)
    bright = F.avg_pool3d((data * inside)[None, None], cells) / shown.clamp(min=1e-6)
    around = F.avg_pool3d(shown, 2 * (_DEPTH // 2) + 1, stride=1, padding=_DEPTH // 2)
    counted = shown > 0.5
    if int(counted.sum()) < 10:
        return 0.0
    found = torch.corrcoef(torch.stack([bright[counted], around[counted]]))[0, 1]
    return float(torch.nan_to_num(found))
