"""How long a registration will take on a device, from a second of the real work on small images.

It is a first guess, for the time before any run: a registration of next to nothing, so much for each voxel, for each
displacement that the search compares and for each voxel and iteration of the fit, and for each step of a network.
"""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from ..networks.devices import network_autocast
from ..networks.loading import LoadedModel
from ..networks.model_file import Card
from ..networks.policy import take_steps
from ..protocol.job import SILENT, Job
from ..protocol.options import RegistrationOptions
from ..space import fields
from ..space.geometry import Grid, Volume
from ..space.preprocessing import working_grid
from .pipeline import register
from .plans import CORRELATION, CORRELATION_FROM_NEAR, FEATURES, FEW_VOXELS, FINER, LEARNED, Plan
from .pyramid import lattice_of
from .search import costs_of, level_for
from .steps import interruptible

_TINY, _SMALL, _LARGE = 16, 32, 64  # voxels along each axis of the images that are registered for it
_RIM = 16  # voxels by which the box around what an image shows grows along each axis, on average
_FILLED = 0.85  # share of an image above which it is a crop of a body, whose parts lie apart enough to be searched
_FEATURES, _MIND = 5.0, 12  # times as long as by correlation takes an iteration by so many features
_NETWORK = 96  # voxels along each axis, about, by which a network is timed; fewer fit into caches


@dataclass(frozen=True)
class Pace:
    """What a device takes, seconds.

    Attributes:
        start: for a registration of next to nothing.
        voxel: for each voxel of the fixed image, and of the box around what it shows, search and fit apart.
        compared: for each displacement of a cell that the search compares.
        iterated: for each voxel and iteration of the fit.
    """

    start: float
    voxel: float
    compared: float
    iterated: float


@dataclass(frozen=True)
class Sizes:
    """What the time depends on, of a pair.

    Attributes:
        fixed: the fixed image's grid.
        shown: along each axis, the share of it that the box around what the image shows takes.
    """

    fixed: Grid
    shown: tuple[float, float, float]

    @property
    def box(self) -> tuple[float, ...]:
        """Voxels along each axis of the box that is fitted."""
        lattice = lattice_of(self.fixed)
        return tuple(n * share + _RIM for n, share in zip(lattice.shape, self.shown, strict=True))


def measure(device: torch.device, job: Job = SILENT) -> Pace:
    """Return a device's pace, from three small registrations of two synthetic images."""
    options = RegistrationOptions(preset="fast", search="on")
    _seconds(_TINY, options, device, job)  # what is prepared once is not of the pace
    small = _seconds(_SMALL, options, device, job)
    large = _seconds(_LARGE, dataclasses.replace(options, search="off", align="none"), device, job)
    counts = [_volume((size,) * 3, (size + _RIM,) * 3) for size in (_SMALL, _LARGE)]
    rests = [sum(v for k, v in found.items() if k not in ("align", "search", "fit")) for found in (small, large)]
    voxel = max(0.0, rests[1] - rests[0]) / (counts[1] - counts[0])
    boxes = [(size + _RIM,) * 3 for size in (_SMALL, _LARGE)]
    return Pace(
        start=small["align"] + max(0.0, rests[0] - voxel * counts[0]),
        voxel=voxel,
        compared=small["search"] / _compared(boxes[0]),
        iterated=large["fit"] / _iterated(CORRELATION["fast"], math.prod(boxes[1])),
    )


def network_pace(model: LoadedModel, job: Job = SILENT) -> float:
    """Return the seconds that a step of a network takes for each voxel of its grid."""
    step, seconds, voxels = model.network.multiple_of, 0.0, 1
    for wanted in (2 * step, _NETWORK):  # what is prepared once is not of the pace
        side = math.ceil(wanted / step) * step
        fixed, moving = torch.rand(2, 1, 1, side, side, side, device=model.device)
        job.check()
        begin = time.perf_counter()
        with torch.no_grad(), network_autocast(model.device), interruptible(model.network, job):
            total = take_steps(model.network, partial(fields.warp, moving), fixed, 1)
        float(total[0, 0, 0, 0, 0])  # waits for a GPU
        seconds, voxels = time.perf_counter() - begin, side**3
    return seconds / voxels


def expected_seconds(
    pace: Pace, sizes: Sizes, options: RegistrationOptions, model: LoadedModel | None = None, step: float = 0.0
) -> float:
    """Return how long a registration will take.

    Args:
        pace: from :func:`measure`.
        sizes: of the pair.
        options: the choices.
        model: whose steps are taken.
        step: from :func:`network_pace`.
    """
    card = None if model is None else model.card
    voxels = math.prod(sizes.box)
    searches = options.search == "on" or (
        options.search == "auto" and (card is None or card.search) and math.prod(sizes.shown) > _FILLED
    )
    seconds = pace.start + pace.voxel * _volume(sizes.fixed.shape, sizes.box)
    looks = (2, 3) if options.trust == "on" else (1, 1)  # how often it is searched and fitted
    if searches:
        seconds += looks[0] * pace.compared * _compared(sizes.box)
    if options.fit == "on" or (options.fit == "auto" and (card is None or card.fit)):
        seconds += looks[1] * pace.iterated * _fit_of(options, voxels, searches and model is None, card)
    if model is not None:
        grid = working_grid(sizes.fixed, model.card.preprocessing, model.network.multiple_of)
        steps = options.steps or model.card.preprocessing.steps
        seconds += (pace.voxel + steps * step) * math.prod(grid.shape)
    return seconds


def _fit_of(options: RegistrationOptions, voxels: float, searched: bool, card: Card | None) -> float:
    """Return the voxels and iterations of a fit, those by features as so many more."""
    if card is not None and card.compare == "features" and options.similarity == "auto":
        labels = len(set(card.labels.values()))
        return _FEATURES * labels / _MIND * _iterated(LEARNED[options.preset], voxels)
    if options.similarity in ("mind", "mse"):
        return _FEATURES * _iterated(FEATURES[options.preset], voxels)
    plan = (CORRELATION_FROM_NEAR if searched else CORRELATION)[options.preset]
    if not searched and options.preset == "best" and voxels < FEW_VOXELS:
        plan = dataclasses.replace(plan, levels=(*plan.levels, -1), iterations=(*plan.iterations, FINER))
    if options.fit_iterations is not None:
        levels = tuple(reversed(range(len(options.fit_iterations))))
        plan = dataclasses.replace(plan, levels=levels, iterations=options.fit_iterations)
    return _iterated(plan, voxels)


def _iterated(plan: Plan, voxels: float) -> float:
    """Return the voxels times the iterations of a plan."""
    return sum(count * voxels / 8**level for level, count in zip(plan.levels, plan.iterations, strict=True))


def _compared(box: tuple[float, ...]) -> float:
    """Return how many displacements of cells a search compares."""
    level, passes = level_for([round(n) for n in box])
    return sum(costs_of(one, [n / 2**level for n in box]) for one in passes)


def _volume(fixed: tuple[float, ...], box: tuple[float, ...]) -> float:
    return math.prod(fixed) + math.prod(box)


def _seconds(size: int, options: RegistrationOptions, device: torch.device, job: Job) -> dict[str, float]:
    """Return the seconds of each phase of the registration of two cubes."""
    tissue = torch.randn(1, 1, *(size // 8 + 2,) * 3, generator=torch.Generator().manual_seed(0))
    image = F.interpolate(tissue, size=(size,) * 3, mode="trilinear").sigmoid()[0, 0] + 0.1
    fixed, moving = (Volume(data, Grid((size,) * 3, np.eye(4))) for data in (image, image.roll(2, 0)))
    return register(fixed, moving, None, options, job.heard_by(None), device=device).report["seconds"]
