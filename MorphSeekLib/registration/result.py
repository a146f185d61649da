"""What a registration gives: the volumes on the fixed image's own grid, and the report, made here alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

from ..measures.folds import Certificate, certify, folded_voxels, regions
from ..measures.metrics import dice_per_label, folding
from ..networks.devices import memory_advice, network_precision
from ..networks.loading import LoadedModel
from ..protocol.job import Job
from ..protocol.options import RegistrationOptions
from ..protocol.report import (
    SCHEMA,
    BesideSection,
    DiceSection,
    Figures,
    FoldingSection,
    InsideSection,
    InverseSection,
    ModelSection,
    Report,
)
from ..space.geometry import (
    DenseTransform,
    Grid,
    Transform,
    Volume,
    apply_affine,
    covering_grid,
    jacobian_volume,
    resample,
)
from ..space.preprocessing import sampled
from . import guards
from .pair import Clock, Outcome, Pair, State, displacement_mm
from .pictures import Pictures
from .trust_map import Estimation, Trust

Labels = tuple[Volume | None, Volume | None]
"""The label maps of the fixed and of the moving image."""


@dataclass(frozen=True)
class Request:
    """What a registration was asked to do.

    Attributes:
        model: None for no network.
        options: the choices.
        labels: of the two images.
    """

    model: LoadedModel | None
    options: RegistrationOptions
    labels: Labels


MOST_REGIONS = 200  # folded regions that a report lists
WARPED = (
    "the moving image's number type, integers rounded and clipped to its range; outside: the value where the fixed "
    "image's grid reaches beyond the moving image"
)


@dataclass
class Registration:
    """What :func:`MorphSeekLib.registration.pipeline.register` found. Volumes lie on the fixed image's own grid.

    Attributes:
        transform: fixed point -> moving point, alignment and initial transform included.
        warped: the moving image at full resolution.
        aligned: the moving image after the alignment alone.
        jacobian: determinant of the whole transform by central differences.
        folding: uint8, 1 where a voxel's box meets a folded cell of the transform (:mod:`MorphSeekLib.measures.folds`).
        warped_labels: the moving labels, or None.
        inverse: moving point -> fixed point, or None.
        state: to continue from.
        report: figures, as report.json.
        trust: the estimated error, where it was asked for.
        estimation: makes it later, where that was asked for.
    """

    transform: DenseTransform
    warped: Volume
    aligned: Volume
    jacobian: Volume
    folding: Volume
    warped_labels: Volume | None
    inverse: DenseTransform | None
    state: State
    report: Report
    trust: Trust | None = None
    estimation: Estimation | None = None


def deliver(
    pair: Pair,
    request: Request,
    outcome: Outcome,
    transform: DenseTransform,
    pictures: Pictures,
    clock: Clock,
    job: Job,
) -> Registration:
    """Make everything else from the transform that was found: the warped image, folding, the inverse, the report."""
    fixed, alignment, labels = pair.fixed, pair.alignment, request.labels
    with clock("resample"), memory_advice(pair.device):
        job.report("resample", 0.05, "Warping the moving image at full resolution")
        warped = pictures.answer(pair, outcome, transform)
        aligned = pictures.aligned(pair)
        warped_labels = None
        if labels[1] is not None:
            warped_labels = resample(labels[1], fixed.grid, transform, mode="nearest", device=pair.device, job=job)

    with clock("metrics"), memory_advice(pair.device):
        job.report("metrics", 0.4, "Measuring folding")
        jacobian = jacobian_volume(transform, fixed.grid, device=pair.device, job=job)
        certificate = certify(transform, fixed.grid, alignment.mirrored, job)
        least = Volume(folded_voxels(certificate.folded, transform.grid, fixed.grid), fixed.grid)
        dice = None
        if labels[0] is not None and labels[1] is not None and warped_labels is not None:
            job.report("metrics", 0.55, "Measuring the overlap of the labels")
            dice = _dice(labels[0], labels[1], warped_labels, alignment.transform, job)

    inverse, residual = None, None
    if request.options.inverse:
        with clock("inverse"):
            job.report("metrics", 0.7, "Inverting the transform")
            inverse = transform.inverse(covering_grid(pair.moving.grid, pair.grid.spacing), job=job)
            residual = _inverse_residual(transform, inverse, fixed.grid, pair.moving.grid)

    figures: Figures = {"folding": _folding(jacobian, certificate, least, pair), "dice": dice, "inverse": residual}
    with memory_advice(pair.device):
        report = make_report(pair, request, outcome, transform, figures, clock)
    job.check()
    state = State(alignment.transform, alignment.kind, outcome.total.detach().cpu(), outcome.figures)
    folded = Volume((least.data <= 0).to(torch.uint8), fixed.grid)
    return Registration(transform, warped, aligned, jacobian, folded, warped_labels, inverse, state, report)


def make_report(
    pair: Pair, request: Request, outcome: Outcome, transform: DenseTransform, figures: Figures, clock: Clock
) -> Report:
    """Return what report.json holds of a registration, but for the files and versions.

    Args:
        transform: the whole map as it is delivered.
        figures: "folding", "dice" and "inverse".
    """
    alignment = pair.alignment
    with torch.no_grad():
        as_given = pair.similarity_as_given()
        similarity = float(pair.judge(None, transform))
        notices = pair.notices + outcome.notices + guards.small_overlap(pair.overlap(outcome.total))
    aligned = outcome.figures[0]["similarity"]
    notices += guards.lowered_by_alignment(alignment.kind, "similarity", as_given, aligned)
    if (overlap := figures["dice"]) is not None and as_given is not None:
        dice = overlap["mean"]
        notices += guards.lowered_by_alignment(alignment.kind, "mean Dice", dice["input"], dice["aligned"])
    return {
        "schema": SCHEMA,
        "model": None if request.model is None else _model(request.model),
        "fixed": {**pair.fixed.grid.describe()},
        "moving": {**pair.moving.grid.describe()},
        "warped": {"type": pair.moving.dtype, "outside": pair.background, "definition": WARPED},
        "working_grid": pair.grid.describe(),
        "device": str(pair.device),
        "precision": str(network_precision(pair.device)).removeprefix("torch."),
        "align": alignment.kind,
        "mirrored": alignment.mirrored,
        "alignment_determinant": alignment.determinant,
        "masks": {
            "fixed": None if pair.masks.fixed is None else int(pair.masks.fixed.sum()),
            "moving": None if pair.masks.moving is None else int(pair.masks.moving.sum()),
        },
        "beside_body": _beside_body(pair),
        "steps": outcome.figures,
        "preset": request.options.preset,
        "fit": outcome.fitted,
        "similarity": {
            "name": pair.judge.definition,
            "input": as_given,
            "aligned": aligned,
            "warped": similarity,
        },
        "folding": figures["folding"],
        "displacement_mm": _displacement(outcome.total, pair.grid),
        "dice": figures["dice"],
        "inverse": figures["inverse"],
        "warnings": [{"code": notice.code, "message": notice.message} for notice in notices],
        "seconds": clock.seconds,
    }


def _model(model: LoadedModel) -> ModelSection:
    """Return what the report says of the model."""
    card = model.card
    return {
        "name": model.name,
        "sha256": model.sha256,
        "backbone": card.model.backbone,
        "title": card.title,
        "licence": card.license,
        "output": card.model.output,
    }


def _dice(fixed: Volume, moving: Volume, warped: Volume, start: Transform, job: Job) -> DiceSection:
    """Measure hard Dice per label on the fixed grid: as given, after the alignment, after the registration."""
    stages = {
        "input": resample(moving, fixed.grid, mode="nearest", job=job).data,
        "aligned": resample(moving, fixed.grid, start, mode="nearest", job=job).data,
        "warped": warped.data,
    }
    per_stage = {k: dice_per_label(fixed.data, v, moving_labels=moving.data) for k, v in stages.items()}
    labels = sorted(per_stage["warped"])
    return {
        "labels": {str(label): {k: per_stage[k][label] for k in per_stage} for label in labels},
        "mean": {k: sum(v.values()) / len(v) for k, v in per_stage.items()},
        "definition": "2|A and B| / (|A| + |B|) per label on the fixed grid, nearest-neighbor warped; labels absent "
        "from either image are left out",
    }


def _beside_body(pair: Pair) -> BesideSection:
    """Return how much of each image is left out since it lies beside the body."""
    sizes = [
        None if left is None else round(float(left.sum()) * float(np.prod(volume.grid.spacing)) / 1000, 1)
        for left, volume in zip(pair.beside, (pair.fixed, pair.moving), strict=True)
    ]
    return {"fixed": sizes[0], "moving": sizes[1]}


def _folding(jacobian: Volume, certificate: Certificate, least: Volume, pair: Pair) -> FoldingSection:
    """Return central differences, the proof, the folded regions in LPS mm, the largest ones in full, and what lies
    inside of what counts."""
    found = regions(least)
    listed = {"regions": [vars(region).copy() for region in found[:MOST_REGIONS]], "region_count": len(found)}
    listed["region_voxels"] = sum(region.voxels for region in found)
    cells = {"cells": vars(certificate.count).copy(), "inside": _inside(jacobian, least, pair)}
    return cast("FoldingSection", vars(folding(jacobian=jacobian.data)) | cells | listed)


def _inside(jacobian: Volume, least: Volume, pair: Pair) -> InsideSection:
    """Return the figures of folding inside the fixed image's mask; without one inside what it shows."""
    mask = pair.masks.fixed
    counts = pair.tissue.data.bool() if mask is None else mask
    if not bool(counts.any()):
        counts = torch.ones_like(counts)
    values = jacobian.data[counts]
    figures = folding(jacobian=values[:, None, None])
    return {
        "of": "tissue" if mask is None else "mask",
        "voxels": figures.voxels,
        "folded_voxels": int((least.data[counts] <= 0).sum()),
        "njd_percent": figures.njd_percent,
        "sdlogj": figures.sdlogj,
        "min_jacobian": figures.min_jacobian,
        "max_jacobian": figures.max_jacobian,
    }


def _inverse_residual(transform: DenseTransform, inverse: DenseTransform, fixed: Grid, moving: Grid) -> InverseSection:
    """Measure |inverse(T(p)) - p|, mm, at up to 20,000 points p of the fixed grid that land in the moving image."""
    generator = np.random.default_rng(0)
    index = generator.uniform(0, 1, (20_000, 3)) * (np.array(fixed.shape) - 1)
    points = apply_affine(fixed.affine, index)
    mapped = transform.map_points(points)
    inside = apply_affine(np.linalg.inv(moving.affine), mapped)
    lands = ((inside >= 0) & (inside <= np.array(moving.shape) - 1)).all(axis=1)
    if not lands.any():
        return {"residual_mm": None}
    error = np.linalg.norm(inverse.map_points(mapped[lands]) - points[lands], axis=1)
    return {
        "residual_mm": {
            "mean": float(error.mean()),
            "p95": float(np.percentile(error, 95)),
            "max": float(error.max()),
        },
        "definition": "distance between a fixed point and where transform and inverse lead it, over points that land "
        "in the moving image; folded places have no inverse",
    }


def _displacement(total: torch.Tensor, grid: Grid) -> dict[str, float]:
    """Return what the network did, without the alignment: length of its displacement over the working grid."""
    length = displacement_mm(total, grid).norm(dim=0).flatten()
    p95 = float(sampled(length, 1_000_000).quantile(0.95))
    return {"mean": float(length.mean()), "p95": p95, "max": float(length.max())}
