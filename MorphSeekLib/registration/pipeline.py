"""The main job: two images in, a transform, a warped image and a report out.

fixed, moving -> alignment (mm) -> working grid and intensities as the checkpoint's card says -> the network, T times,
composed -> one dense transform (mm) -> everything else from that transform: the warped image at full resolution by one
interpolation, Jacobian and folding on the fixed image's own grid, the inverse, the figures.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..io.images import air_value, check_overlap
from ..io.labels import check_label_values
from ..io.transforms import rounded
from ..measures.folds import certify, folded_voxels, regions, unfold
from ..measures.metrics import dice_per_label, folding
from ..measures.similarity import Judge, mind_ssc
from ..networks import model_file as checkpoints
from ..networks.devices import memory_advice, network_autocast, network_precision, pick_device, place
from ..networks.model_file import Card
from ..networks.policy import RegistrationModel, refine
from ..protocol.errors import MorphSeekError
from ..protocol.events import Event, Notice, OnEvent, checkpoint_for, ignore, never
from ..protocol.settings import to_dict
from ..protocol.startup import MAX_STEPS, check_alignment, check_steps, find
from ..space import fields
from ..space.background import quiet_background
from ..space.fields import jacobian_determinant, least_determinant, sample
from ..space.geometry import (
    DenseTransform,
    Grid,
    Transform,
    Volume,
    apply_affine,
    covering_grid,
    dense_from_voxels,
    is_mirrored,
    jacobian_volume,
    map_voxels,
    resample,
    smooth_for_spacing,
    voxel_displacement,
)
from ..space.preprocessing import Preprocessing, fine_grid, foreground_of, normalize, normalized, sampled, working_grid
from . import guards
from .alignment import align as align_images
from .alignment import object_size
from .fit import Objective, Refined, RefinementSettings, fit, objective, optimize

# a step that raises LNCC by less than this does not help any more
LEAST_GAIN = 0.002
WARPED = (
    "the moving image's number type, integers rounded and clipped to its range; outside: the value where the fixed "
    "image's grid reaches beyond the moving image"
)
MOST_REGIONS = 200  # folded regions that a report lists
# working grids beyond this would need more memory than any machine of the field has
MAX_WORKING_VOXELS = 512**3


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint, ready on its device.

    Attributes:
        network: in eval mode.
        card: what the checkpoint says of itself.
        name: how it was asked for.
        sha256: of its file.
        device: where it lies.
    """

    network: RegistrationModel
    card: Card
    name: str
    sha256: str
    device: torch.device


def load_model(model: str | Path, device: str = "auto") -> LoadedModel:
    """A bundled model by name, or a .safetensors file.

    Raises:
        MorphSeekError: unknown model or device, unusable file, or not enough memory.
    """
    where = pick_device(device)
    path = find(model)
    with memory_advice(where):
        network, card = checkpoints.load(path)
        return LoadedModel(place(network, where), card, str(model), checkpoints.sha256(path), where)


@dataclass(frozen=True)
class State:
    """Where a registration stands: enough to take further steps on the same images with the same model.

    Attributes:
        start: fixed point -> moving point, the alignment before the network.
        align: its name.
        total: (1, 3, i, j, k) voxels of the working grid, the answer so far.
        figures: after each step, index 0 before the first; "answer" tells which of them ``total`` is, or began with
            when it was fitted.
    """

    start: Transform
    align: str
    total: Tensor
    figures: list[dict[str, float]]


@dataclass
class Registration:
    """What :func:`register` found. Volumes lie on the fixed image's own grid.

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
    """

    transform: DenseTransform
    warped: Volume
    aligned: Volume
    jacobian: Volume
    folding: Volume
    warped_labels: Volume | None
    inverse: DenseTransform | None
    state: State
    report: dict[str, Any] = field(default_factory=dict)


def register(
    fixed: Volume,
    moving: Volume,
    model: LoadedModel,
    *,
    steps: int | None = None,
    align: str | None = None,
    initial: Transform | None = None,
    fixed_labels: Volume | None = None,
    moving_labels: Volume | None = None,
    inverse: bool = True,
    refinement: RefinementSettings | None = None,
    stop_early: bool = False,
    state: State | None = None,
    on_event: OnEvent = ignore,
    on_step: Callable[[int, Volume], None] | None = None,
    cancelled: Callable[[], bool] = never,
) -> Registration:
    """Register a moving image to a fixed one.

    Args:
        fixed, moving: finite, not constant; any grids.
        model: from :func:`load_model`.
        steps: refinement steps T; None for what the card says.
        align: "none", "center", "rigid" or "affine" before the network; None for what the card says, or "none" when an
            initial transform is given.
        initial: fixed point -> moving point (LPS mm); the alignment starts from it.
        fixed_labels, moving_labels: integer volumes on their image's grid; both for Dice; the moving ones are warped.
        inverse: also compute the inverse transform.
        refinement: optimise this pair from the network's answer on, without labels; None: take the answer as it is.
        stop_early: save time: take no further step after one that raises the similarity by less than LEAST_GAIN.
        state: of an earlier call with the same images and model; ``steps`` more are taken from its answer, and
            ``align`` and ``initial`` are not looked at.
        on_event: told of every phase.
        on_step: given each step's number and the moving image at full resolution after it, from 0 (aligned) on; the
            one that is the answer again after a refinement.
        cancelled: asked often; True ends the job.

    The answer is the one of all steps, none included, after which the images are most alike
    (:class:`MorphSeekLib.measures.similarity.Judge`); a refinement begins there.

    Raises:
        MorphSeekError: unusable settings, images that do not overlap, not enough memory.
        Cancelled: ``cancelled`` said so.
    """
    card, device = model.card, model.device
    steps = card.preprocessing.steps if steps is None else steps
    align = ("none" if initial is not None else card.preprocessing.align) if align is None else align
    check_steps(steps)
    check_alignment(align)
    if state is not None and len(state.figures) - 1 + steps > MAX_STEPS:
        raise MorphSeekError(f"{len(state.figures) - 1} steps were taken already, and {MAX_STEPS} are the most.")
    if fixed_labels is not None and moving_labels is not None:
        _check_label_pair(fixed_labels, moving_labels)
    refinement = refinement or RefinementSettings()
    for labels, name in ((fixed_labels, "The fixed label map"), (moving_labels, "The moving label map")):
        if labels is not None:
            check_label_values(labels.data, name)
    checkpoint = checkpoint_for(cancelled)
    clock = _Clock()
    read = (fixed, moving, fixed_labels, moving_labels)
    notices: list[Notice] = [notice for volume in read if volume is not None for notice in volume.notices]
    background = air_value(moving.data)

    with clock("align"):
        preprocessing = card.preprocessing
        if preprocessing.knows is not None:
            sizes = [object_size(volume, checkpoint) for volume in (fixed, moving)]
            found, factor = guards.unknown_sizes(sizes, preprocessing)
            notices += found
            preprocessing = preprocessing.scaled(factor)
        grid = working_grid(fixed.grid, preprocessing, model.network.multiple_of)
        _check_size(grid, fixed)
        if state is not None:
            start, align = state.start, state.align
        else:
            words = "Aligning the images" if align != "none" else "Checking that the images overlap"
            on_event(Event("align", 0.02, words))
            start = align_images(
                fixed,
                moving,
                align,
                initial=initial,
                checkpoint=checkpoint,
                on_progress=lambda f: on_event(Event("align", 0.02 + 0.28 * f, f"Aligning the images ({align})")),
            )
        guards.check_finite(start, "The alignment")
        check_overlap(fixed, moving, start)
        mirrored = is_mirrored(start)
        notices += guards.mirrored_alignment(mirrored)

    def warp(transform: Transform) -> Volume:
        out = resample(moving, fixed.grid, transform, background=background, device=device, checkpoint=checkpoint)
        return replace(out, dtype=moving.dtype)

    aligned, shown = None, None
    if on_step is not None and state is None:
        with clock("resample"), memory_advice(device):
            aligned = warp(start)
        on_step(0, aligned)

    with memory_advice(device), _interruptible(model.network, checkpoint):
        if state is not None and tuple(state.total.shape[2:]) != grid.shape:
            raise MorphSeekError("The steps so far were taken on another grid; register from the start again.")

        def show(step: int, total: Tensor) -> None:
            nonlocal shown
            if on_step is not None:
                shown = step, warp(pair.delivered(total, grid))
                on_step(*shown)

        before = start if align == "none" or state is not None else np.eye(4) if initial is None else initial
        pair = _Pair(fixed, moving, before, start, grid, preprocessing, device, checkpoint)
        outcome = _refine(pair, model, steps, refinement, stop_early, state, clock, on_event, show)
        total, step_figures, refined = outcome.total, outcome.figures, outcome.refined
        transform = outcome.transform
        notices += outcome.notices

    with clock("resample"), memory_advice(device):
        on_event(Event("resample", 0.72, "Warping the moving image at full resolution"))
        warped = shown[1] if shown is not None and shown[0] == outcome.answer and not refined else warp(transform)
        if refined and on_step is not None:
            on_step(outcome.answer, warped)
        aligned = warp(start) if aligned is None else aligned
        warped_labels = None
        if moving_labels is not None:
            to_fixed = {"mode": "nearest", "device": device, "checkpoint": checkpoint}
            warped_labels = resample(moving_labels, fixed.grid, transform, **to_fixed)

    with clock("metrics"), memory_advice(device):
        on_event(Event("metrics", 0.82, "Measuring folding"))
        jacobian = jacobian_volume(transform, fixed.grid, device=device, checkpoint=checkpoint)
        certificate = certify(transform, fixed.grid, mirrored, checkpoint)
        least = Volume(folded_voxels(certificate.folded, transform.grid, fixed.grid), fixed.grid)
        dice = None
        if fixed_labels is not None and moving_labels is not None:
            on_event(Event("metrics", 0.86, "Measuring the overlap of the labels"))
            dice = _dice(fixed_labels, moving_labels, warped_labels, start, checkpoint)

    back, residual = None, None
    if inverse:
        with clock("inverse"):
            on_event(Event("metrics", 0.9, "Inverting the transform"))
            back = transform.inverse(covering_grid(moving.grid, grid.spacing), checkpoint=checkpoint)
            residual = _inverse_residual(transform, back, fixed.grid, moving.grid)

    aligned_similarity = step_figures[0]["similarity"]
    notices += guards.lowered_by_alignment(align, "similarity", outcome.as_given, aligned_similarity)
    if dice is not None and outcome.as_given is not None:
        notices += guards.lowered_by_alignment(align, "mean Dice", dice["mean"]["input"], dice["mean"]["aligned"])
    report = {
        "model": {
            "name": model.name,
            "sha256": model.sha256,
            "backbone": card.model.backbone,
            "title": card.title,
            "licence": card.licence,
            "output": card.model.output,
        },
        "fixed": _describe(fixed.grid),
        "moving": _describe(moving.grid),
        "warped": {"type": moving.dtype, "outside": background, "definition": WARPED},
        "working_grid": _describe(grid),
        "device": str(device),
        "precision": str(network_precision(device)).removeprefix("torch."),
        "align": align,
        "mirrored": mirrored,
        "steps": step_figures,
        "refinement": refined,
        "similarity": {
            "name": "LNCC, window 9, fixed image's foreground on the working grid, where both images lie (1 is best)",
            "input": outcome.as_given,
            "aligned": aligned_similarity,
            "warped": outcome.similarity,
        },
        "folding": vars(folding(jacobian=jacobian.data)) | {"cells": vars(certificate.count).copy()} | _regions(least),
        "displacement_mm": _displacement(total, grid),
        "dice": dice,
        "inverse": residual,
        "warnings": [vars(notice).copy() for notice in notices],
        "seconds": clock.seconds,
    }
    checkpoint()
    state = State(start, align, total.detach().cpu(), step_figures)
    folded = Volume((least.data <= 0).to(torch.uint8), fixed.grid)
    return Registration(transform, warped, aligned, jacobian, folded, warped_labels, back, state, report)


class _Pair:
    """Two images on the working grid, and what a displacement of it makes of them.

    Attributes:
        fixed: (1, 1, i, j, k), on the working grid.
        moving: (1, 1, i, j, k), on its own.
        seen: (1, 1, i, j, k), bool, where the fixed image lies.
        judge: of warped images, where both lie after the alignment.
        notices: about the two images.
    """

    def __init__(
        self,
        fixed: Volume,
        moving: Volume,
        before: Transform,
        start: Transform,
        grid: Grid,
        preprocessing: Preprocessing,
        device: torch.device,
        checkpoint: Callable[[], None],
    ) -> None:
        """``before`` and ``start``: fixed point -> moving point, before and after the alignment."""
        self.volumes, self.before, self.start, self.grid = (fixed, moving), before, start, grid
        self.preprocessing, self.device, self.checkpoint = preprocessing, device, checkpoint

    def prepare(self) -> None:
        """Make the images."""
        self.fixed, self.moving = self.on(self.grid)
        fixed, moving = self.volumes
        foreground = Volume(foreground_of(quiet_background(fixed.data)).to(torch.uint8), fixed.grid)
        foreground = resample(foreground, self.grid, mode="nearest", checkpoint=self.checkpoint).data.bool()
        # what one image does not see must not count as black there: a stretch of thin slices would be taken for a gain
        self.seen = self._inside(fixed.grid, np.eye(4))
        by_both = self.seen & self._inside(moving.grid, self.start)
        self.judge = Judge(self.fixed, foreground[None, None].to(self.device), by_both)
        self.notices = [
            notice
            for volume, role in ((fixed, "The fixed image"), (moving, "The moving image"))
            for notice in guards.few_values(normalize(volume.data, self.preprocessing), volume.called(role))
        ]

    def on(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """The two images as the network takes them, fixed on a grid; moving on its own, as smooth as that."""
        return _prepared(*self.volumes, grid, self.preprocessing, self.device, self.checkpoint)

    def nothing(self) -> Tensor:
        """(1, 3, i, j, k): the displacement that moves nothing."""
        return torch.zeros(1, 3, *self.grid.shape, device=self.device)

    def moving_at(self, total: Tensor) -> Tensor:
        """The moving image warped by a displacement, (1, 1, i, j, k), as far as the fixed one sees it."""
        self.checkpoint()
        return self.seen * sample(self.moving, map_voxels(total, self.grid, self.start, self.volumes[1].grid))

    def _inside(self, grid: Grid, transform: Transform, total: Tensor | None = None) -> Tensor:
        """Which voxels of the working grid a displacement and a transform lead into an image's box, (1, 1, i, j, k)."""
        points = map_voxels(self.nothing() if total is None else total, self.grid, transform, grid)
        limit = torch.tensor(grid.shape, device=points.device).view(1, 3, 1, 1, 1) - 0.5
        return ((points >= -0.5) & (points <= limit)).all(dim=1, keepdim=True)

    def moving_by(self, transform: Transform) -> Tensor:
        """The moving image warped by a whole map, (1, 1, i, j, k)."""
        return sample(self.moving, map_voxels(self.nothing(), self.grid, transform, self.volumes[1].grid))

    def delivered(self, displacement: Tensor, grid: Grid) -> DenseTransform:
        """A displacement (1, 3, i, j, k) in voxels of a grid as the whole map that is written.

        Raises:
            MorphSeekError: the displacement is not made of finite numbers.
        """
        transform = rounded(dense_from_voxels(displacement, grid, self.start))
        guards.check_finite(transform, "The registration")
        return transform

    def similarity(self, total: Tensor) -> float:
        """What the judge says of a displacement."""
        return float(self.judge(self.moving_at(total)))

    def similarity_as_given(self) -> float:
        """What the judge says of the images before their alignment."""
        return float(self.judge(self.moving_by(self.before)))

    def overlap(self, total: Tensor) -> float:
        """Share of what the fixed image shows that lands in the moving image; 1 where it shows nothing."""
        inside = self._inside(self.volumes[1].grid, self.start, total)[self.judge.shown]
        return float(inside.float().mean()) if inside.numel() else 1.0

    def look(self, step: int, total: Tensor, warped: Tensor) -> dict[str, float]:
        """The figures after a step.

        Raises:
            MorphSeekError: the displacement is not made of finite numbers.
        """
        length = _turned(total, self.grid).norm(dim=0)
        shares = [100 * (j <= 0).float().mean() for j in (least_determinant(total), jacobian_determinant(total))]
        values = torch.stack([self.judge(warped), length.mean(), *shares]).tolist()
        guards.check_finite(values, f"Step {step}")
        names = ("similarity", "mean_displacement_mm", "folded_percent", "njd_percent")
        return {"step": step, **dict(zip(names, values, strict=True))}


@dataclass
class _Outcome:
    """What steps and refinement found.

    Attributes:
        total: (1, 3, i, j, k) voxels of the working grid.
        transform: the whole map as it is delivered, alignment included, rounded as its file is.
        figures: after each step, index 0: before; "answer" is true in one of them.
        answer: its index.
        similarity: of ``total``, as the judge has it.
        refined: what the refinement did, or None.
        notices: what the person should know.
        as_given: the similarity before the alignment; None when this call did none.
    """

    total: Tensor
    transform: DenseTransform
    figures: list[dict[str, float]]
    answer: int
    similarity: float
    refined: dict[str, Any] | None = None
    notices: list[Notice] = field(default_factory=list)
    as_given: float | None = None


class _Steps:
    """Takes steps, and keeps the best of all places they led to.

    Attributes:
        figures: after each step, those of earlier calls included.
        answer: index of the best.
        total, similarity: there.
        before: the displacement from which the step to the best one was taken; None when no step of this call was.
    """

    def __init__(self, pair: _Pair, state: State | None) -> None:
        self.pair = pair
        self.base = None if state is None else state.total.to(pair.device)
        self.total = pair.nothing() if self.base is None else self.base
        self.similarity = pair.similarity(self.total)
        guards.check_finite(self.similarity, "The alignment")
        self.figures = [{"step": 0, "similarity": self.similarity}] if state is None else list(state.figures)
        self.taken = len(self.figures) - 1
        self.answer = next((n for n, row in enumerate(self.figures) if row.get("answer")), self.taken)
        self.before: Tensor | None = None
        self._last, self._last_similarity = self.total, self.similarity

    def whole(self, total: Tensor) -> Tensor:
        """The steps of earlier calls and of this one, composed."""
        return total if self.base is None else fields.compose(self.base, total)

    def take(self, step: int, total: Tensor, warped: Tensor) -> tuple[Tensor, float]:
        """Note a step of this call; the displacement after it, and by how much it raised the similarity."""
        total = self.whole(total)
        figures = self.pair.look(self.taken + step, total, warped)
        self.figures.append(figures)
        similarity = figures["similarity"]
        gain = similarity - self._last_similarity
        if similarity > self.similarity:
            self.answer, self.total, self.similarity, self.before = self.taken + step, total, similarity, self._last
        self._last, self._last_similarity = total, similarity
        return total, gain

    def outcome(self) -> _Outcome:
        """The best."""
        figures = [row | {"answer": n == self.answer} for n, row in enumerate(self.figures)]
        notices = guards.no_step_helped(figures, self.answer, self.taken)
        transform = self.pair.delivered(self.total, self.pair.grid)
        return _Outcome(self.total, transform, figures, self.answer, self.similarity, None, notices)


def _refine(
    pair: _Pair,
    model: LoadedModel,
    steps: int,
    refinement: RefinementSettings,
    stop_early: bool,
    state: State | None,
    clock: _Clock,
    on_event: OnEvent,
    show: Callable[[int, Tensor], None],
) -> _Outcome:
    """T steps on the working grid, after those of the state, and the iterations of refinement."""
    fits = refinement.iterations + refinement.fine_iterations
    done = 0.35 if fits else 0.7  # the progress bar's share at the end of the steps

    def on_step(step: int, total: Tensor, warped: Tensor) -> bool:
        total, gain = walk.take(step, total, warped)
        number, last = walk.taken + step, walk.taken + steps
        message = f"Refinement step {number} of {last}"
        stop = stop_early and gain < LEAST_GAIN
        if stop:
            message = f"Step {number} no longer helps: stopping here"
        show(number, total)
        on_event(Event("step", 0.3 + (done - 0.3) * step / steps, message, number, last, walk.figures[-1]))
        pair.checkpoint()
        return stop

    with clock("network"), torch.no_grad():
        taken = 0 if state is None else len(state.figures) - 1
        on_event(Event("step", 0.3, "Preparing the images", taken, taken + steps))
        pair.prepare()
        walk = _Steps(pair, state)
        notices = guards.small_foreground(pair.judge.voxels) + pair.notices
        as_given = None if pair.before is pair.start else pair.similarity_as_given()
        with network_autocast(pair.device):
            refine(model.network, lambda total: pair.moving_at(walk.whole(total)), pair.fixed, steps, on_step)
    outcome = walk.outcome()
    if fits:
        with clock("refinement"):
            outcome = _fitted(pair, outcome, walk.before, model, refinement, done, on_event)
    with torch.no_grad():
        notices += outcome.notices + guards.small_overlap(pair.overlap(outcome.total))
    outcome.notices, outcome.as_given = notices, as_given
    return outcome


def _fitted(
    pair: _Pair,
    begin: _Outcome,
    before: Tensor | None,
    model: LoadedModel,
    refinement: RefinementSettings,
    done: float,
    on_event: OnEvent,
) -> _Outcome:
    """The iterations of refinement, from the best step on.

    Args:
        begin: the best step.
        before: the displacement from which it was taken; None: it is none of this call's, so that there is no latent to
            begin with, and all iterations go to the field.
        done: the progress bar's share that is spent.
    """
    grid, device, start, moving_grid = pair.grid, pair.device, pair.start, pair.volumes[1].grid
    fits = refinement.iterations + refinement.fine_iterations
    finest = fine_grid(pair.volumes[0].grid, grid) if refinement.fine_iterations else grid
    cost = math.prod(finest.shape) / math.prod(grid.shape)  # of a fine iteration, in iterations on the working grid
    whole_cost = refinement.iterations + cost * refinement.fine_iterations
    iteration = 0

    def on_iteration() -> None:
        nonlocal iteration
        iteration += 1
        message = f"Fitting this pair, iteration {iteration} of {fits}"
        spent = min(iteration, refinement.iterations) + cost * max(0, iteration - refinement.iterations)
        on_event(Event("refine", done + (0.7 - done) * spent / whole_cost, message, iteration, fits))
        pair.checkpoint()

    value = _objective(pair.fixed, pair.moving, moving_grid, grid, start, refinement, pair.checkpoint, pair.seen)
    coarse = Refined(begin.total, torch.empty(0, device=device))
    rate = refinement.field_rate
    if before is None:
        coarse = fit(coarse, refinement.iterations, value, rate, refinement.stride, on_iteration)
    else:
        with torch.no_grad(), network_autocast(device):
            latent = model.network.encode(pair.moving_at(before), pair.fixed)
        with network_autocast(device):
            coarse = optimize(model.network, latent, before, begin.total, value, refinement, on_iteration)
    found, fine_objectives = coarse.total, None
    if refinement.fine_iterations:
        value = _objective(*pair.on(finest), moving_grid, finest, start, refinement, pair.checkpoint)
        on_fine = voxel_displacement(dense_from_voxels(found, grid), finest, device)
        on_fine = Refined(on_fine, torch.empty(0, device=device))
        found, fine_objectives = fit(
            on_fine, refinement.fine_iterations, value, rate, refinement.fine_stride, on_iteration
        )
    transform = pair.delivered(found, finest)
    transform = rounded(unfold(transform, is_mirrored(start), refinement.unfold, pair.checkpoint))
    total = found
    if refinement.fine_iterations:
        total = voxel_displacement(dense_from_voxels(found, finest), grid, device)
    with torch.no_grad():
        after = pair.look(begin.answer, total, pair.moving_by(transform))
    refined = {
        "settings": to_dict(refinement),
        "objective": _course(coarse.objectives),
        "fine": None if fine_objectives is None else _describe(finest) | {"objective": _course(fine_objectives)},
        "network": begin.figures[begin.answer],
        "refined": after,
        "definition": "objective: similarity + regularization * diffusion + folding * mean(relu(0.05 - det J)), in "
        "voxels of its grid; lower is better. network, refined: on the working grid",
    }
    aligned, similarity = begin.figures[0]["similarity"], after["similarity"]
    notices = begin.notices + guards.fit_fell(refinement.similarity, aligned, begin.similarity, similarity)
    return _Outcome(total, transform, begin.figures, begin.answer, similarity, refined, notices)


def _objective(
    fixed: Tensor,
    moving: Tensor,
    moving_grid: Grid,
    grid: Grid,
    start: Transform,
    refinement: RefinementSettings,
    checkpoint: Callable[[], None],
    seen: Tensor | bool = True,
) -> Objective:
    """What refinement lowers on a grid, of what :func:`_prepared` made for it.

    Args:
        seen: where the fixed image lies; True: everywhere.
    """
    padding = "zeros"
    if refinement.similarity == "mind":  # its patches are counted in voxels: both images need voxels of one size
        lattice = covering_grid(moving_grid, _world_spacing(grid))
        moving = resample(Volume(moving[0, 0].cpu(), moving_grid), lattice, checkpoint=checkpoint).data
        fixed, moving = mind_ssc(fixed), mind_ssc(moving[None, None].to(fixed))
        moving_grid, padding = lattice, "border"

    def moving_at(total: Tensor) -> Tensor:
        checkpoint()
        return seen * sample(moving, map_voxels(total, grid, start, moving_grid), padding=padding)

    return objective(fixed, moving_at, refinement)


def _course(objectives: Tensor) -> dict[str, Any]:
    """An objective before and after, and what was met on the way."""
    curve = objectives.tolist()
    return {"start": curve[0], "refined": min(curve), "curve": curve} if curve else {}


def _prepared(
    fixed: Volume,
    moving: Volume,
    grid: Grid,
    preprocessing: Preprocessing,
    device: torch.device,
    checkpoint: Callable[[], None],
) -> tuple[Tensor, Tensor]:
    """Intensities as the network takes them, (1, 1, i, j, k): fixed on a grid; moving on its own, as smooth as that."""
    spacing = _world_spacing(grid)
    roles = ((fixed, "The fixed image"), (moving, "The moving image"))
    images = [smooth_for_spacing(normalized(v, preprocessing, v.called(role)), spacing) for v, role in roles]
    on_grid = resample(images[0], grid, checkpoint=checkpoint).data
    return on_grid[None, None].to(device), images[1].data[None, None].to(device)


def _world_spacing(grid: Grid) -> np.ndarray:
    """(3,) mm: a grid's spacing along the world's axes."""
    return np.linalg.norm(grid.direction * grid.spacing, axis=1)


def _check_size(grid: Grid, fixed: Volume) -> None:
    """Refuse a working grid beyond any machine's memory."""
    if math.prod(grid.shape) > MAX_WORKING_VOXELS:
        raise MorphSeekError(
            f"{fixed.called('The fixed image')} would need a working grid of {' x '.join(map(str, grid.shape))} "
            "voxels; check its spacing and its unit, crop it to the region of interest, or choose a model with a "
            "coarser working grid."
        )


@contextmanager
def _interruptible(network: RegistrationModel, checkpoint: Callable[[], None]):
    """Ask for cancellation before every layer: one forward pass of a large volume takes seconds on a CPU."""
    leaves = [m for m in network.modules() if not list(m.children())]
    handles = [m.register_forward_pre_hook(lambda *_: checkpoint()) for m in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_label_pair(fixed: Volume, moving: Volume) -> None:
    """Refuse two label images of which no label can be compared."""
    if not dice_per_label(fixed.data, fixed.data, moving_labels=moving.data):  # scores the labels that both have
        raise MorphSeekError("The two label images have no label in common; check that they use the same numbers.")


def _dice(
    fixed: Volume, moving: Volume, warped: Volume, start: Transform, checkpoint: Callable[[], None]
) -> dict[str, Any]:
    """Hard Dice per label on the fixed grid: as the images came, after the alignment, after the registration."""
    stages = {
        "input": resample(moving, fixed.grid, mode="nearest", checkpoint=checkpoint).data,
        "aligned": resample(moving, fixed.grid, start, mode="nearest", checkpoint=checkpoint).data,
        "warped": warped.data,
    }
    per_stage = {k: dice_per_label(fixed.data, v, moving_labels=moving.data) for k, v in stages.items()}
    labels = sorted(per_stage["warped"])
    return {
        "labels": {str(label): {k: per_stage[k][label] for k in per_stage} for label in labels},
        "mean": {k: sum(v.values()) / len(v) for k, v in per_stage.items()},
        "definition": "2|A and B| / (|A| + |B|) per label on the fixed grid, nearest-neighbour warped; labels absent "
        "from either image are left out",
    }


def _regions(least: Volume) -> dict[str, Any]:
    """The folded regions for the report, LPS mm, the largest ones in full."""
    found = regions(least)
    return {"regions": [vars(region).copy() for region in found[:MOST_REGIONS]], "region_count": len(found)}


def _inverse_residual(transform: DenseTransform, inverse: DenseTransform, fixed: Grid, moving: Grid) -> dict[str, Any]:
    """|inverse(T(p)) - p| in mm over up to 20,000 points p of the fixed grid that land in the moving image."""
    generator = np.random.default_rng(0)
    index = generator.uniform(0, 1, (20_000, 3)) * (np.array(fixed.shape) - 1)
    points = apply_affine(fixed.affine, index)
    mapped = transform.map_points(points)
    inside = apply_affine(np.linalg.inv(moving.affine), mapped)
    inside = ((inside >= 0) & (inside <= np.array(moving.shape) - 1)).all(axis=1)
    if not inside.any():
        return {"residual_mm": None}
    error = np.linalg.norm(inverse.map_points(mapped[inside]) - points[inside], axis=1)
    return {
        "residual_mm": {
            "mean": float(error.mean()),
            "p95": float(np.percentile(error, 95)),
            "max": float(error.max()),
        },
        "definition": "distance between a fixed point and where transform and inverse lead it, over points that land "
        "in the moving image; folded places have no inverse",
    }


def _displacement(total: Tensor, grid: Grid) -> dict[str, float]:
    """What the network did, without the alignment: length of its displacement over the working grid."""
    length = _turned(total, grid).norm(dim=0).flatten()
    p95 = float(sampled(length, 1_000_000).quantile(0.95))
    return {"mean": float(length.mean()), "p95": p95, "max": float(length.max())}


def _turned(total: Tensor, grid: Grid) -> Tensor:
    """(3, i, j, k) mm of (1, 3, i, j, k) voxels (lengths do not depend on the axes' directions)."""
    return total[0] * torch.from_numpy(grid.spacing).to(total).view(3, 1, 1, 1)


def _describe(grid: Grid) -> dict[str, Any]:
    return {"shape": list(grid.shape), "spacing": [round(float(s), 6) for s in grid.spacing]}


class _Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str):
        begin = time.perf_counter()
        yield
        self.seconds[phase] = round(self.seconds.get(phase, 0.0) + time.perf_counter() - begin, 3)
