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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import checkpoint as checkpoints
from . import fields
from .alignment import align as align_images
from .background import quiet_background
from .checkpoint import Card
from .devices import memory_advice, network_autocast, network_precision, pick_device, place
from .errors import MorphSeekError
from .events import Event, Notice, OnEvent, checkpoint_for, ignore, never
from .fields import jacobian_determinant, sample
from .geometry import (
    DenseTransform,
    Grid,
    Transform,
    Volume,
    apply_affine,
    covering_grid,
    dense_from_voxels,
    jacobian_volume,
    map_voxels,
    resample,
    smooth_for_spacing,
    voxel_displacement,
)
from .images import check_overlap
from .metrics import dice_per_label, folding
from .policy import RegistrationModel, refine
from .preprocessing import ALIGNMENTS, Preprocessing, fine_grid, normalize, working_grid
from .refinement import Objective, Refined, RefinementSettings, fit, objective, optimize, unfold
from .settings import to_dict
from .similarity import lncc, mind_ssc

MAX_STEPS = 20
# a step that raises LNCC by less than this does not help any more
LEAST_GAIN = 0.002
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
    path = checkpoints.find(model)
    with memory_advice(where):
        network, card = checkpoints.load(path)
        return LoadedModel(place(network, where), card, str(model), checkpoints.sha256(path), where)


@dataclass(frozen=True)
class State:
    """Where a registration stands: enough to take further steps on the same images with the same model.

    Attributes:
        start: fixed point -> moving point, the alignment before the network.
        align: its name.
        total: (1, 3, i, j, k) voxels of the working grid, the steps so far, composed.
        figures: after each step, index 0 before the first.
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
        jacobian: determinant of the whole transform; <= 0 is folded.
        warped_labels: the moving labels, or None.
        inverse: moving point -> fixed point, or None.
        state: to continue from.
        report: figures, as report.json.
    """

    transform: DenseTransform
    warped: Volume
    aligned: Volume
    jacobian: Volume
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
        stop_early: stop at a step that raises the similarity by less than LEAST_GAIN; one that lowers it is taken back.
        state: of an earlier call with the same images and model; ``steps`` more are taken from there, and ``align`` and
            ``initial`` are not looked at.
        on_event: told of every phase.
        on_step: given each step's number and the moving image at full resolution after it, from 0 (aligned) on; the
            last one again after a refinement.
        cancelled: asked often; True ends the job.

    Raises:
        MorphSeekError: unusable settings, images that do not overlap, not enough memory.
        Cancelled: ``cancelled`` said so.
    """
    card, device = model.card, model.device
    steps = card.preprocessing.steps if steps is None else steps
    align = ("none" if initial is not None else card.preprocessing.align) if align is None else align
    if not 1 <= steps <= MAX_STEPS:
        raise MorphSeekError(f"{steps} refinement steps were asked for; choose 1 to {MAX_STEPS}.")
    if align not in ALIGNMENTS:
        raise MorphSeekError(f"There is no alignment '{align}'; choose one of {', '.join(ALIGNMENTS)}.")
    if state is not None and len(state.figures) - 1 + steps > MAX_STEPS:
        raise MorphSeekError(f"{len(state.figures) - 1} steps were taken already, and {MAX_STEPS} are the most.")
    refinement = refinement or RefinementSettings()
    checkpoint = checkpoint_for(cancelled)
    clock = _Clock()
    notices: list[Notice] = [*fixed.notices, *moving.notices]
    background = min(0.0, float(moving.data.min()))

    with clock("align"):
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
        check_overlap(fixed, moving, start)

    def warp(transform: Transform) -> Volume:
        return resample(moving, fixed.grid, transform, background=background, device=device, checkpoint=checkpoint)

    aligned = warped = None
    if on_step is not None and state is None:
        with clock("resample"), memory_advice(device):
            aligned = warp(start)
        on_step(0, aligned)

    with memory_advice(device), _interruptible(model.network, checkpoint):
        grid = working_grid(fixed.grid, card.preprocessing, model.network.multiple_of)
        _check_size(grid)
        if state is not None and tuple(state.total.shape[2:]) != grid.shape:
            raise MorphSeekError("The steps so far were taken on another grid; register anew.")

        def show(step: int, total: Tensor) -> None:
            nonlocal warped
            if on_step is not None:
                warped = warp(dense_from_voxels(total, grid, start))
                on_step(step, warped)

        total, fine, step_figures, refined = _refine(
            fixed, moving, start, grid, model, steps, refinement, stop_early, state, clock, on_event, show, checkpoint
        )
        transform = dense_from_voxels(*fine, start)

    with clock("resample"), memory_advice(device):
        on_event(Event("resample", 0.72, "Warping the moving image at full resolution"))
        if warped is None or refined:
            warped = warp(transform)
        if refined and on_step is not None:
            on_step(len(step_figures) - 1, warped)
        aligned = warp(start) if aligned is None else aligned
        warped_labels = None
        if moving_labels is not None:
            to_fixed = {"mode": "nearest", "device": device, "checkpoint": checkpoint}
            warped_labels = resample(moving_labels, fixed.grid, transform, **to_fixed)

    with clock("metrics"), memory_advice(device):
        on_event(Event("metrics", 0.82, "Measuring folding"))
        jacobian = jacobian_volume(transform, fixed.grid, device=device, checkpoint=checkpoint)
        figures = folding(jacobian=jacobian.data)
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
        "working_grid": _describe(grid),
        "device": str(device),
        "precision": str(network_precision(device)).removeprefix("torch."),
        "align": align,
        "steps": step_figures,
        "refinement": refined,
        "similarity": {
            "name": "LNCC, window 9, working grid (1 is best)",
            "aligned": step_figures[0]["similarity"],
            "warped": (refined["refined"] if refined else step_figures[-1])["similarity"],
        },
        "folding": vars(figures).copy(),
        "displacement_mm": _displacement(total, grid),
        "dice": dice,
        "inverse": residual,
        "warnings": [vars(notice).copy() for notice in notices],
        "seconds": clock.seconds,
    }
    checkpoint()
    state = State(start, align, total.detach().cpu(), step_figures)
    return Registration(transform, warped, aligned, jacobian, warped_labels, back, state, report)


def _refine(
    fixed: Volume,
    moving: Volume,
    start: Transform,
    grid: Grid,
    model: LoadedModel,
    steps: int,
    refinement: RefinementSettings,
    stop_early: bool,
    state: State | None,
    clock: _Clock,
    on_event: OnEvent,
    show: Callable[[int, Tensor], None],
    checkpoint: Callable[[], None],
) -> tuple[Tensor, tuple[Tensor, Grid], list[dict[str, float]], dict[str, Any] | None]:
    """T steps on the working grid, after those of the state, and the iterations of refinement.

    Returns:
        (1, 3, i, j, k) voxels of the working grid; the same on the grid it was found on, and that grid; the figures
        after each step (index 0: before); what the refinement did, or None.
    """
    preprocessing, device = model.card.preprocessing, model.device
    fits = refinement.iterations + refinement.fine_iterations
    done = 0.35 if fits else 0.7  # the progress bar's share at the end of the steps
    figures: list[dict[str, float]] = [] if state is None else list(state.figures)
    taken = max(0, len(figures) - 1)
    base = None if state is None else state.total.to(device)

    def whole(total: Tensor) -> Tensor:
        return total if base is None else fields.compose(base, total)

    def moving_at(total: Tensor) -> Tensor:
        checkpoint()
        return sample(moving_data, map_voxels(total, grid, start, moving.grid))

    def look(step: int, total: Tensor, warped: Tensor) -> dict[str, float]:
        length = _turned(total, grid).norm(dim=0)
        jacobian = jacobian_determinant(total)
        values = torch.stack(
            [-lncc(fixed_working, warped), length.mean(), 100 * (jacobian <= 0).float().mean()]
        ).tolist()
        names = ("similarity", "mean_displacement_mm", "njd_percent")
        return {"step": step, **dict(zip(names, values, strict=True))}

    def on_step(step: int, total: Tensor, warped: Tensor) -> bool:
        nonlocal last, before_last
        after = look(taken + step, whole(total), warped)
        gain = after["similarity"] - figures[-1]["similarity"]
        message = f"Refinement step {taken + step} of {taken + steps}"
        if stop_early and gain < LEAST_GAIN:
            message = f"Step {taken + step} no longer helps: stopping here"
        if not (stop_early and gain < 0):
            before_last, last = last, whole(total)
            figures.append(after)
            show(taken + step, last)
        on_event(Event("step", 0.3 + (done - 0.3) * step / steps, message, taken + step, taken + steps, after))
        checkpoint()
        return stop_early and gain < LEAST_GAIN

    with clock("network"), torch.no_grad():
        on_event(Event("step", 0.3, "Preparing the images", taken, taken + steps))
        fixed_working, moving_data = _prepared(fixed, moving, grid, preprocessing, device, checkpoint)
        last = before_last = torch.zeros(1, 3, *grid.shape, device=device) if base is None else base
        if not figures:
            figures.append({"step": 0, "similarity": float(-lncc(fixed_working, moving_at(last)))})
        with network_autocast(device):
            refine(model.network, lambda total: moving_at(whole(total)), fixed_working, steps, on_step)
    if not fits:
        return last, (last, grid), figures, None

    finest = fine_grid(fixed.grid, grid) if refinement.fine_iterations else grid
    _check_size(finest)
    cost = math.prod(finest.shape) / math.prod(grid.shape)  # of a fine iteration, in iterations on the working grid
    whole_cost = refinement.iterations + cost * refinement.fine_iterations
    iteration = 0

    def on_iteration() -> None:
        nonlocal iteration
        iteration += 1
        message = f"Fitting this pair, iteration {iteration} of {fits}"
        spent = min(iteration, refinement.iterations) + cost * max(0, iteration - refinement.iterations)
        on_event(Event("refine", done + (0.7 - done) * spent / whole_cost, message, iteration, fits))
        checkpoint()

    with clock("refinement"):
        value = _objective(fixed_working, moving_data, moving.grid, grid, start, refinement, checkpoint)
        with torch.no_grad(), network_autocast(device):
            latent = model.network.encode(moving_at(before_last), fixed_working)
        with network_autocast(device):
            coarse = optimize(model.network, latent, before_last, last, value, refinement, on_iteration)
        found, fine_objectives = coarse.total, None
        if refinement.fine_iterations:
            images = _prepared(fixed, moving, finest, preprocessing, device, checkpoint)
            value = _objective(*images, moving.grid, finest, start, refinement, checkpoint)
            begin = voxel_displacement(dense_from_voxels(found, grid), finest, device)
            on_fine = Refined(begin, torch.empty(0, device=device))
            found, fine_objectives = fit(
                on_fine,
                refinement.fine_iterations,
                value,
                refinement.field_rate,
                refinement.fine_stride,
                on_iteration,
            )
        found = unfold(found, refinement.unfold, on_iteration=checkpoint)
        total = found
        if refinement.fine_iterations:
            total = voxel_displacement(dense_from_voxels(found, finest), grid, device)
        with torch.no_grad():
            after = look(len(figures) - 1, total, moving_at(total))
    refined = {
        "settings": to_dict(refinement),
        "objective": _course(coarse.objectives),
        "fine": None if fine_objectives is None else _describe(finest) | {"objective": _course(fine_objectives)},
        "network": figures[-1],
        "refined": after,
        "definition": "objective: similarity + regularization * diffusion + folding * mean(relu(0.05 - det J)), in "
        "voxels of its grid; lower is better. network, refined: on the working grid",
    }
    return total, (found, finest), figures, refined


def _objective(
    fixed: Tensor,
    moving: Tensor,
    moving_grid: Grid,
    grid: Grid,
    start: Transform,
    refinement: RefinementSettings,
    checkpoint: Callable[[], None],
) -> Objective:
    """What refinement lowers on a grid, of what :func:`_prepared` made for it."""
    padding = "zeros"
    if refinement.similarity == "mind":  # its patches are counted in voxels: both images need voxels of one size
        lattice = covering_grid(moving_grid, _world_spacing(grid))
        moving = resample(Volume(moving[0, 0].cpu(), moving_grid), lattice, checkpoint=checkpoint).data
        fixed, moving = mind_ssc(fixed), mind_ssc(moving[None, None].to(fixed))
        moving_grid, padding = lattice, "border"

    def moving_at(total: Tensor) -> Tensor:
        checkpoint()
        return sample(moving, map_voxels(total, grid, start, moving_grid), padding=padding)

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
    quiet = [Volume(quiet_background(normalize(v.data, preprocessing)), v.grid) for v in (fixed, moving)]
    images = [smooth_for_spacing(volume, spacing) for volume in quiet]
    on_grid = resample(images[0], grid, checkpoint=checkpoint).data
    return on_grid[None, None].to(device), images[1].data[None, None].to(device)


def _world_spacing(grid: Grid) -> np.ndarray:
    """(3,) mm: a grid's spacing along the world's axes."""
    return np.linalg.norm(grid.direction * grid.spacing, axis=1)


def _check_size(grid: Grid) -> None:
    """Refuse a grid beyond any machine's memory."""
    if math.prod(grid.shape) > MAX_WORKING_VOXELS:
        raise MorphSeekError(
            f"The fixed image would need a working grid of {' x '.join(map(str, grid.shape))} voxels; crop it to "
            "the region of interest, or choose a model with a coarser working grid."
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
    if not labels:
        raise MorphSeekError("The two label images have no label in common; check that they use the same numbers.")
    return {
        "labels": {str(label): {k: per_stage[k][label] for k in per_stage} for label in labels},
        "mean": {k: sum(v.values()) / len(v) for k, v in per_stage.items()},
        "definition": "2|A and B| / (|A| + |B|) per label on the fixed grid, nearest-neighbour warped; labels absent "
        "from either image are left out",
    }


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
    some = length[:: max(1, length.numel() // 1_000_000)]
    return {"mean": float(length.mean()), "p95": float(some.quantile(0.95)), "max": float(length.max())}


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
