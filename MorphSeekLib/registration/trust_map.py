"""The estimated error of a registration as volumes and figures, from what :mod:`.trust` compares."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..networks.devices import memory_advice
from ..networks.loading import LoadedModel
from ..protocol.job import SILENT, Job
from ..protocol.options import RegistrationOptions
from ..protocol.report import TrustRegionSection, TrustSection
from ..space.geometry import Volume, apply_affine, resample
from .calibrated import DECILES, Calibration, calibration
from .pair import Outcome, Pair
from .trust import Quantities, bound, look_again

NEAR_MM, NEAR_VOXELS = 2.0, 2.0
"""The 80 % bound up to which a place is called likely near: the larger of the two."""
FAR = 2.5
"""Times that, beyond which a place is not to be relied on."""
MOST_REGIONS = 5
_FEWEST_BLOCKS = 8  # of a region that is listed
DEFINITION = (
    "estimated from the images alone by the difference to the registration of the exchanged images, to a stiffer fit, "
    "and what is left of local correlation; tuned on simulated deformations of {title}: a bound holds in the named "
    "share of places on average; it cannot see every mistake, and is not a measurement"
)
NO_KIND = (
    "a rank alone: images, model or options are not of a kind on which the estimate was tuned, so that there are no "
    "millimeters; it cannot see every mistake, and is not a measurement"
)


@dataclass(frozen=True)
class Trust:
    """How far off a registration may be at each place of the fixed image.

    Attributes:
        bound: float32, mm on the fixed grid, below which the error lies in four of five places; 0 where nothing is
            said, outside of tissue or of what both images see; None for a pair of an unknown kind.
        colors: uint8: 1 likely near, 2 in between, 3 not to be relied on; 0 where nothing is said.
        section: figures, for the report.
        quantities: what they come from.
    """

    bound: Volume | None
    colors: Volume
    section: TrustSection
    quantities: Quantities


@dataclass(frozen=True)
class Estimation:
    """What an estimate takes that is made later: both images and the answer, arguments of :func:`estimate`."""

    pair: Pair
    outcome: Outcome
    model: LoadedModel | None
    options: RegistrationOptions

    def run(self, job: Job = SILENT) -> Trust:
        """Estimate the error at each place; it can be cancelled and run again."""
        self.pair.job = job  # that of the registration is over
        with memory_advice(self.pair.device):
            return estimate(self.pair, self.outcome, self.model, self.options, job)


def estimate(pair: Pair, outcome: Outcome, model: LoadedModel | None, options: RegistrationOptions, job: Job) -> Trust:
    """Estimate the error of an answer at each place; arguments as in :func:`.trust.look_again`."""
    job.report("fit", 0.0, "Estimating the error")
    found = look_again(pair, outcome, model, options, job.part(0.0, 0.95))
    known = calibration()
    return trust_of(pair, found, known, known.kind_of(pair, outcome, model, options), options.preset)


def trust_of(pair: Pair, found: Quantities, known: Calibration, kind: str | None, preset: str) -> Trust:
    """Return bounds, colors and figures of quantities.

    Args:
        pair: aligned and prepared.
        found: of the answer.
        known: the offsets.
        kind: of the pair; None for an unknown one.
        preset: of the fit.
    """
    weights, offsets = known.of(kind, preset)
    scores = found.score(weights)
    at = dict(zip(DECILES, offsets, strict=True))
    limit = bound(scores, at[0.8], found.voxel)
    near = max(NEAR_MM, NEAR_VOXELS * found.voxel)
    fixed = resample(Volume(limit.cpu(), found.grid), pair.fixed.grid, device=pair.device, job=pair.job).data
    seen = Volume(found.known.cpu().to(torch.uint8), found.grid)
    said = pair.tissue.data.bool() & (resample(seen, pair.fixed.grid, mode="nearest", job=pair.job).data > 0)
    fixed = torch.where(said, fixed, 0.0)
    colors = (1 + (fixed > near).to(torch.uint8) + (fixed > FAR * near).to(torch.uint8)) * said
    values = fixed[said]
    tissue = resample(pair.tissue, found.grid, mode="nearest", job=pair.job).data.bool() & found.known.cpu()
    section: TrustSection = {
        "kind": kind,
        "title": None if kind is None else known.kinds[kind].title,
        "near_mm": None if kind is None else near,
        "far_mm": None if kind is None else FAR * near,
        "near_percent": _percent(values <= near),
        "far_percent": _percent(values > FAR * near),
        "voxels": int(said.sum()),
        "error_mm": None if kind is None else _whole(scores[tissue.to(scores.device)], offsets, found.voxel),
        "regions": _worst(limit.cpu(), tissue, found, near, kind is not None),
        "definition": NO_KIND if kind is None else DEFINITION.format(title=known.kinds[kind].title),
    }
    volume = None if kind is None else Volume(fixed, pair.fixed.grid)
    return Trust(volume, Volume(colors.to(torch.uint8), pair.fixed.grid), section, found)


def _percent(where: Tensor) -> float:
    return 100 * float(where.float().mean()) if where.numel() else 0.0


def _whole(scores: Tensor, offsets: tuple[float, ...], voxel: float) -> dict[str, float]:
    """Return what the error is estimated to be below in half and in four fifths of all places, mm.

    A place's deciles stand for its error; those of all places together are the image's.
    """
    if not scores.numel():
        return {"median": 0.0, "p80": 0.0}
    values = torch.cat([bound(scores, offset, voxel) for offset in offsets]).cpu().numpy()
    return {"median": float(np.quantile(values, 0.5)), "p80": float(np.quantile(values, 0.8))}


def _worst(limit: Tensor, tissue: Tensor, found: Quantities, near: float, known: bool) -> list[TrustRegionSection]:
    """Return the largest regions of the worst color that there is, the worst first.

    Args:
        limit: (a, b, c) the 80 % bound, mm.
        tissue: (a, b, c) bool, of what something is said.
        found: its grid.
        near: mm; beyond it is not near.
        known: whether bounds are told in mm.
    """
    from scipy import ndimage  # what is not estimated goes without it

    values = torch.where(tissue, limit, 0.0).numpy()
    size = float(np.prod(found.grid.spacing))
    for beyond in (FAR * near, near):
        parts, count = ndimage.label(values > beyond)
        sizes = ndimage.sum_labels(values > 0, parts, np.arange(1, count + 1))
        largest = [int(n) + 1 for n in np.argsort(-sizes)[:MOST_REGIONS] if sizes[n] >= _FEWEST_BLOCKS]
        if not largest:
            continue
        regions: list[TrustRegionSection] = []
        for part in largest:
            place = np.unravel_index(int(np.where(parts == part, values, 0).argmax()), values.shape)
            position = apply_affine(found.grid.affine, np.array([place], dtype=float))[0]
            regions.append(
                {
                    "position": [round(float(x), 2) for x in position],
                    "bound_mm": float(values[place]) if known else None,
                    "mm3": float(sizes[part - 1] * size),
                    "color": 3 if beyond > near else 2,
                }
            )
        return sorted(regions, key=lambda region: -(region["bound_mm"] or region["mm3"]))
    return []
